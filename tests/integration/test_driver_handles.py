"""The driver and arrays that stay: tasks wait for the actor that holds them, others are fetched, nothing is left."""

import pickle

import pytest

from actors.contract import Busy, Failed, FailureKind, Reply, Succeeded
from actors.data.arrays import ArrayRef
from actors.data.handles import DeviceArray
from actors.executor.errands import DELETE, EXPORT
from bridge import link
from bridge.driver import loop, waiting
from bridge.driver.news import Replied, SlotChanged
from bridge.errors import HandleLost
from bridge.settings import settings
from tests.integration.test_driver import Lab

REF = ArrayRef(url="redis:" + "0" * 32, dtype="<f8", shape=(1,), size_bytes=8)


def handle(name, actor, elements=1, kept=None):
    return DeviceArray(
        id=name, actor=actor, executor=f"e{actor}", dtype="<f8", shape=(elements,), size_bytes=8 * elements, kept=kept
    )


class Cluster(Lab):
    """A driver with actors that the test makes come and go; actor n has executor ``en``."""

    def __init__(self, monkeypatch):
        super().__init__(monkeypatch)
        self.discarded = []
        self.driver._ledger.discard = self.discarded.extend

    def actor(self, slot, executor=None):
        health = self.is_ready().health._replace(slot=slot, executor=executor or f"e{slot}")
        self.event(SlotChanged(slot, health, ""))
        return self

    def calls(self):
        """(actor, name of the first task, arguments) of each call not answered."""
        return [
            (actor, call.tasks[0].name, pickle.loads(call.tasks[0].payload)[0])
            for actor, call in self.driver._calls.unanswered.values()
        ]

    def answer(self, outcome, number=-1):
        """Answer one of the calls in hand."""
        call = list(self.driver._calls.unanswered)[number]
        (task,) = self.driver._calls.unanswered[call][1].tasks
        self.event(Replied(call, Reply((outcome(task.token),), 0.0), ""))

    def cancel(self, serial):
        self.link.send(link.Cancel(serial))
        self.link.flush()
        self.driver._read_link()
        self.driver._turn()

    def look(self):
        self.driver._look_at_waiting()
        self.driver._turn()

    def result(self):
        """What the one task that was sent ended with."""
        (answer,) = self.answers()
        error = answer.einfo.exception if isinstance(answer, link.Ended) else answer.result[1]
        error = getattr(error, "exception", error)
        return getattr(error, "exc", error)


def done(value, *made):
    return lambda token: Succeeded(token, pickle.dumps(value), 0.001, 1, made=pickle.dumps(made))


def failed(kind, error=None):
    return lambda token: Failed(token, kind, kind.name, "because", exception=error and pickle.dumps(error))


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("BRIDGE_CALL_GAP_S", "0")
    settings.cache_clear()
    yield Cluster(monkeypatch)
    settings.cache_clear()


def test_a_task_waits_for_the_actor_that_holds_its_array(cluster):
    cluster.actor(0)
    cluster.send(handle("aa", 1))
    assert cluster.calls() == [], "the other one is free"
    cluster.actor(1)
    assert cluster.calls() == [(1, "lab.echo", (handle("aa", 1),))]
    cluster.answer(done("ok"))
    assert cluster.result() == "'ok'"


def test_when_the_executor_ends_it_runs_anywhere_and_is_told_there(cluster):
    cluster.actor(0).actor(1)
    cluster.send("held")
    cluster.send("held")  # both are busy, with what is of unknown length
    cluster.send(handle("aa", 1))
    assert len(cluster.calls()) == 2
    cluster.actor(1, "another")
    cluster.answer(done("ok"), 0)
    assert cluster.calls()[-1] == (0, "lab.echo", (handle("aa", 1),))


def test_a_task_for_the_new_executor_is_not_sent_away_when_the_driver_hears_of_it(cluster):
    """It served others, and was heard of in a handle, before the driver's next beat."""
    cluster.actor(0).actor(1)
    cluster.send("held"), cluster.send("held")
    cluster.send(handle("aa", 1).model_copy(update={"executor": "ee"}))
    cluster.actor(1, "ee")
    cluster.answer(done("ok"), 0)
    assert len(cluster.calls()) == 1, "the other one is free"
    cluster.answer(done("ok"))
    assert [call[:2] for call in cluster.calls()] == [(1, "lab.echo")]


def test_an_actor_that_nobody_hears_of_is_waited_for_no_longer_than_that(cluster, monkeypatch):
    cluster.actor(0)
    cluster.send(handle("aa", 7))
    cluster.look()
    assert cluster.calls() == []
    monkeypatch.setattr(waiting, "HOLDER_WAIT_S", 0.0)
    cluster.look()
    assert cluster.calls() == [(0, "lab.echo", (handle("aa", 7),))]


def test_one_that_was_let_run_anywhere_is_ended_when_it_is_revoked_while_it_waits_there(cluster, monkeypatch):
    cluster.actor(0)
    cluster.send("held")
    serial = cluster.send(handle("aa", 7))
    monkeypatch.setattr(waiting, "HOLDER_WAIT_S", 0.0)
    cluster.look()
    assert len(cluster.calls()) == 1 and cluster.answers() == [], "the other actor is busy"
    cluster.cancel(serial)
    (answer,) = cluster.answers()
    assert answer.serial == serial


def test_what_another_actor_holds_is_fetched_first_and_deleted_at_the_end(cluster):
    cluster.actor(0).actor(1)
    cluster.send([handle("aa", 0, 1), handle("bb", 1, 2)])
    ((actor, name, args),) = cluster.calls()
    assert (actor, name, args[0].source) == (0, EXPORT, handle("aa", 0, 1))
    cluster.answer(done(REF.model_dump(mode="json")))
    assert cluster.calls() == [(1, "lab.echo", ([REF, handle("bb", 1, 2)],))]
    assert cluster.discarded == []
    cluster.answer(failed(FailureKind.LOST))
    cluster.actor(1)
    assert cluster.calls() == [(1, "lab.echo", ([REF, handle("bb", 1, 2)],))], "the same again"
    cluster.answer(done("ok"))
    assert cluster.result() == "'ok'" and cluster.discarded == [REF]


def test_an_array_on_a_gpu_of_another_model_than_the_task_needs_is_fetched(cluster):
    cluster.actor(0)
    rules = cluster.driver._waiting._rules
    rules["lab.echo"] = rules["lab.echo"]._replace(accelerator="H100")
    health = cluster.is_ready().health._replace(slot=0, executor="e0", accelerator="L4")
    cluster.event(SlotChanged(0, health, ""))
    cluster.send(handle("aa", 0))
    assert [call[:2] for call in cluster.calls()] == [(0, EXPORT)]


def test_one_with_a_copy_is_not_fetched(cluster):
    cluster.actor(0).actor(1)
    cluster.send([handle("aa", 0, 1, kept=REF), handle("bb", 1, 2)])
    assert [call[:2] for call in cluster.calls()] == [(1, "lab.echo")]


def test_what_cannot_be_fetched_ends_the_task(cluster):
    cluster.actor(0).actor(1)
    cluster.send([handle("aa", 0, 1), handle("bb", 1, 2)])
    cluster.answer(failed(FailureKind.RAISED, HandleLost("it was deleted")))
    assert isinstance(cluster.result(), HandleLost)
    assert cluster.calls() == []


def test_an_actor_that_dies_while_something_is_fetched_from_it(cluster):
    cluster.actor(0).actor(1)
    cluster.send([handle("aa", 0, 1), handle("bb", 1, 2)])
    (call,) = cluster.driver._calls.unanswered
    cluster.event(Replied(call, None, "the actor died"))
    assert isinstance(cluster.result(), HandleLost)


def test_an_actor_that_ends_before_something_is_fetched_from_it(cluster):
    cluster.actor(0).actor(1)
    cluster.send("held"), cluster.send("held")
    serial = cluster.send([handle("aa", 0, 1), handle("bb", 1, 2)])
    cluster.actor(0, "another")
    (answer,) = cluster.answers()
    assert answer.serial == serial and "has ended" in str(answer.result[1].exception)


def test_one_that_waits_to_be_fetched_is_waited_for_no_longer_than_that(cluster, monkeypatch):
    cluster.actor(1)
    cluster.send([handle("aa", 0, 1), handle("bb", 1, 2)])
    monkeypatch.setattr(waiting, "HOLDER_WAIT_S", 0.0)
    cluster.look()
    assert "takes no calls" in str(cluster.result())


def test_a_busy_actor_is_asked_again(cluster):
    cluster.actor(0).actor(1)
    cluster.send([handle("aa", 0, 1), handle("bb", 1, 2)])
    (call,) = cluster.driver._calls.unanswered
    cluster.event(Replied(call, Busy(0.0), ""))
    assert cluster.calls() == []
    cluster.actor(0)
    assert [each[:2] for each in cluster.calls()] == [(0, EXPORT)]


def test_a_task_given_up_while_something_is_fetched_for_it_leaves_nothing(cluster):
    cluster.actor(0).actor(1)
    serial = cluster.send([handle("aa", 0, 1), handle("bb", 1, 2)])
    cluster.cancel(serial)
    assert type(cluster.result()).__name__ == "Terminated", "at once: its actor may be busy for long"
    cluster.answer(done(REF.model_dump(mode="json")))
    assert cluster.answers() == [] and cluster.calls() == []
    assert cluster.discarded == [REF]
    tasks = cluster.driver._tasks
    assert cluster.driver._errands._under_way == tasks.by_serial == tasks.by_token == {}


def test_what_is_fetched_from_an_actor_that_was_restarted_is_asked_for_again(cluster):
    cluster.actor(0).actor(1)
    cluster.send([handle("aa", 0, 1), handle("bb", 1, 2)])
    cluster.answer(failed(FailureKind.LOST))
    assert cluster.calls() == [], "not before it is heard of"
    cluster.actor(0)
    assert [each[:2] for each in cluster.calls()] == [(0, EXPORT)]
    cluster.answer(failed(FailureKind.HELD_UP))
    assert [each[:2] for each in cluster.calls()] == [(0, EXPORT)]
    cluster.answer(done(REF.model_dump(mode="json")))
    assert [each[:2] for each in cluster.calls()] == [(1, "lab.echo")]


def test_a_result_nobody_waits_for_is_deleted_where_it_is(cluster):
    cluster.actor(0)
    serial = cluster.send("value")
    tasks = cluster.driver._tasks
    tasks.end(tasks.by_serial[serial], loop.einfo(RuntimeError("given up")))
    other, given = REF.model_copy(update={"url": "redis:" + "1" * 32}), handle("bb", 0)
    made = [handle("aa", 0, kept=REF), other]
    cluster.answer(done({"x": made, "y": given}, *made))
    ((actor, name, args),) = cluster.calls()
    assert (actor, name, [each["id"] for each in args[0]]) == (0, DELETE, ["aa"]), "not what it was given"
    assert cluster.discarded == [REF, other]
    cluster.answer(done(None))
    assert cluster.calls() == []


def test_more_actors_are_not_asked_for_while_a_task_waits_for_one_that_is_there(cluster, monkeypatch):
    cluster.actor(0)
    cluster.send(handle("aa", 7))
    monkeypatch.setattr(loop, "GROW_AFTER_S", -1.0)
    cluster.look()
    assert cluster.fleet.wanted == set()
