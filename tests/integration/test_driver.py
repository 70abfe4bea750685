"""The driver's bookkeeping of calls, with a fleet that answers what the test says: replies late, lost, large, twice."""

import logging
import pickle
import signal
import socket

import pytest
from billiard.exceptions import WorkerLostError
from celery import Celery

from actors.contract import Config, Failed, FailureKind, Large, LogLine, Pending, Release, Reply, Succeeded
from actors.data import arrays
from actors.data.arrays import ArrayRef
from actors.wishes import Wish
from bridge import link
from bridge.data import Array
from bridge.driver import fleet
from bridge.driver.fleet import Fleet
from bridge.driver.loop import Driver
from bridge.driver.news import Fetched, Replied, SlotChanged
from bridge.driver.tracing import prepare
from bridge.marks import find_marks
from bridge.settings import settings


class SaidFleet:
    """Records what the driver asks of its fleet."""

    def __init__(self, *_):
        self.calls, self.collected, self.fetched, self.cancelled, self.forgotten = [], [], [], [], []

    def submit(self, slot, call):
        self.calls.append(call)

    def collect(self, slot, call):
        self.collected.append(call)

    def fetch(self, slot, token):
        self.fetched.append(token)

    def cancel(self, slot, call, tokens, how):
        self.cancelled += tokens

    def forget(self, slot, call, tokens):
        self.forgotten.append((call, tokens))

    def want(self, accelerators):
        self.wanted = accelerators


def echo(value):
    return value


def total(values: Array):
    return float(values.sum())


class Lab:
    def __init__(self, monkeypatch, backend="cache+memory://"):
        monkeypatch.setattr(fleet, "Fleet", SaidFleet)
        self.app = Celery("lab", broker="memory://", backend=backend, set_as_current=False)
        self.app.task(name="lab.echo", gpu=True)(echo)
        self.app.task(name="lab.total", gpu=True)(total)
        self.app.finalize()
        marks = find_marks(self.app.tasks.values(), [])
        release = Release("r", "lab:app", "", (), "", (), tuple(marks), ())
        ours, theirs = socket.socketpair()
        self.link = link.Link(ours)
        self.driver = Driver(self.app, theirs, marks, Config(release, "cpu", "90%", 30, 1000, "50%"), "", True)
        prepare(self.app, marks, self.driver.forward, False)
        from celery.app.trace import build_tracer, setup_worker_optimizations

        setup_worker_optimizations(self.app, "lab@here")
        for name, task in self.app.tasks.items():
            task.__trace__ = build_tracer(name, task, self.app.loader, "lab@here", app=self.app)
        self.fleet = self.driver._fleet
        self.serial = 0

    def event(self, event):
        self.driver._notify(event)
        self.driver._handle_inbox()
        self.driver._turn()

    def ready(self):
        self.event(self.is_ready())

    def is_ready(self):
        from actors.contract import ActorState, Health

        fields = dict.fromkeys(Health._fields, 0) | {"state": ActorState.READY, "device": {}, "node": "here"}
        fields |= {"accelerator": "", "warm_for": (), "share": 1.0}
        return SlotChanged(0, Health(**fields), "")

    def send(self, value, announced=False, name="lab.echo", **more):
        self.serial += 1
        request = {"id": str(self.serial), "task": name, "delivery_info": {}, "argsrepr": "", "kwargsrepr": "", **more}
        body = ((value,), {}, {})
        run = link.Run(self.serial, name, str(self.serial), request, body, None, None, None, None, 0)
        run = run._replace(announced=announced)
        self.driver._take(run)
        self.driver._turn()
        return self.serial

    def answers(self):
        self.driver._flush()
        return [m for m in self.link.receive() if isinstance(m, link.Done | link.Ended)]


@pytest.fixture
def lab(monkeypatch):
    monkeypatch.setenv("BRIDGE_CALL_GAP_S", "0")  # calls leave without a Tick
    settings.cache_clear()
    yield Lab(monkeypatch)
    settings.cache_clear()


def succeeded(task, value):
    return Succeeded(task.token, pickle.dumps(value), 0.0001, 1)


def shared_call(lab, count):
    """Tasks that wait while no actor is ready leave in one call, once their name is known to be short."""
    lab.ready()
    lab.send("first")
    first = lab.fleet.calls.pop()
    lab.event(Replied(first.id, Reply((succeeded(first.tasks[0], "first"),), 0.0), ""))
    lab.event(SlotChanged(0, None, "away"))
    for number in range(count):
        lab.send(number)
    lab.ready()
    (call,) = lab.fleet.calls
    assert len(call.tasks) == count
    return call


def test_only_what_is_owed_is_collected_and_a_late_loss_of_the_rest_is_taken_quietly(lab):
    call = shared_call(lab, 3)
    one, two, three = call.tasks
    lab.event(
        Replied(call.id, Reply((succeeded(one, 0), Pending(two.token, True), Pending(three.token, False)), 0), "")
    )
    assert [task.token for task in lab.fleet.collected[-1].tasks] == [two.token, three.token]
    lost = tuple(Failed(task.token, FailureKind.LOST, "LOST", "the actor was restarted") for task in call.tasks)
    lab.event(Replied(call.id, Reply(lost, 0.0), ""))
    assert len(lab.fleet.calls) == 1, "its actor gets nothing more before it is heard of"
    lab.ready()
    again = lab.fleet.calls[-1]
    assert [task.payload for task in again.tasks] == [two.payload, three.payload], (
        "what had finished does not run again"
    )
    lab.event(Replied(again.id, Reply(tuple(succeeded(task, n) for n, task in enumerate(again.tasks, 1)), 0.0), ""))
    assert sorted(answer.serial for answer in lab.answers()) == [1, 2, 3, 4]


def test_a_large_outcome_on_its_way_survives_the_next_reply_of_its_call(lab):
    call = shared_call(lab, 2)
    big, small = call.tasks
    lab.event(Replied(call.id, Reply((Large(big.token, 10**6), Pending(small.token, True)), 0.0), ""))
    assert lab.fleet.fetched == [big.token]
    lab.event(Replied(call.id, Reply((succeeded(small, 1),), 0.0), ""))
    lab.event(Fetched(big.token, pickle.dumps(succeeded(big, "x" * 10))))
    assert sorted(answer.serial for answer in lab.answers()) == [1, 2, 3]


def test_a_large_outcome_lost_with_its_actor_has_its_task_run_again(lab):
    call = shared_call(lab, 1)
    (big,) = call.tasks
    lab.event(Replied(call.id, Reply((Large(big.token, 10**6),), 0.0), ""))
    lab.event(Fetched(big.token, None))
    assert isinstance(lab.answers()[-1], link.Ended), "it is acknowledged early: never twice"


def test_a_cancelled_task_is_cancelled_again_while_it_is_pending_and_never_runs_again(lab):
    call = shared_call(lab, 1)
    (task,) = call.tasks
    serial = lab.serial
    lab.link.send(link.Cancel(serial))
    lab.link.flush()
    lab.driver._read_link()
    lab.driver._turn()
    lab.event(Replied(call.id, Reply((Pending(task.token, True),), 0.0), ""))
    assert lab.fleet.cancelled == [task.token, task.token], "the first may have overtaken its call"
    lab.event(Replied(call.id, None, "the actor died"))
    lab.ready()
    assert len(lab.fleet.calls) == 1
    assert isinstance(lab.answers()[-1], link.Ended)


def test_a_request_that_cannot_be_taken_costs_only_itself(lab):
    lab.ready()
    lab.link.send(link.Run(77, "lab.echo", "77", {"delivery_info": "odd"}, ((1,), {}, {}), None, None, None, None, 0))
    lab.link.flush()
    lab.driver._read_link()
    lab.driver._turn()
    assert [type(answer) for answer in lab.answers()] == [link.Ended]
    assert lab.driver._tasks.by_serial == lab.driver._tasks.by_token == {}, "nothing of it stays"
    lab.send("fine")
    assert len(lab.fleet.calls) == 1


def test_a_running_task_whose_collect_cannot_be_sent_is_not_taken_for_one_that_never_ran(lab):
    call = shared_call(lab, 1)
    lab.event(Replied(call.id, Reply((Pending(call.tasks[0].token, True),), 0.0), ""))
    real = Fleet.__new__(Fleet)  # an actor that is gone for good by now
    real._actors, real._settings, real._notify = {}, lab.driver._settings, lab.event
    real.collect(0, call)
    lab.ready()
    assert len(lab.fleet.calls) == 1, "with early acknowledgement it must not run again"
    error = lab.answers()[-1].einfo.exception
    assert type(getattr(error, "exc", error)) is WorkerLostError


def test_what_a_revoked_body_says_is_logged_and_its_progress_only_if_it_may_go_on(lab, monkeypatch, caplog):
    states = []
    monkeypatch.setattr(lab.app.tasks["lab.echo"], "update_state", lambda **kwargs: states.append(kwargs["state"]))
    news = pickle.dumps(
        [LogLine(logging.WARNING, "lab", "last words", False), Wish("update_state", (), {"state": "P"})]
    )
    for number, expected in ((signal.SIGUSR1, ["P"]), (signal.SIGTERM, [])):
        call = shared_call(lab, 1)
        (task,) = call.tasks
        lab.link.send(link.Cancel(lab.serial, number))
        lab.link.flush()
        lab.driver._read_link()
        lab.driver._turn()
        lab.event(Replied(call.id, Reply((Pending(task.token, True, (news,)),), 0.0), ""))
        assert "last words" in caplog.text and states == expected
        failed = Failed(task.token, FailureKind.CANCELLED, "", "", logs=(LogLine(40, "lab", "gone", False),))
        lab.event(Replied(call.id, Reply((failed,), 0.0), ""))
        assert "gone" in caplog.text
        caplog.clear(), states.clear(), lab.fleet.calls.clear()


def test_a_body_whose_progress_cannot_be_stored_ends_with_its_task(lab, monkeypatch):
    def away(**_):
        raise ConnectionError("the result backend is away")

    monkeypatch.setattr(lab.app.tasks["lab.echo"], "update_state", away)
    call = shared_call(lab, 1)
    (task,) = call.tasks
    wish = pickle.dumps([Wish("update_state", (), {"state": "P"})])
    lab.event(Replied(call.id, Reply((Pending(task.token, True, (wish,)),), 0.0), ""))
    assert lab.answers()[-1].serial == lab.serial
    assert lab.fleet.cancelled == [task.token], "or it would run on, perhaps beside its own retry"


def test_the_worker_is_told_before_a_call_leaves(lab, monkeypatch):
    """Should the driver die right after, the worker must not take the task for one that has never started."""
    told = []
    submit = lab.fleet.submit

    def look(slot, call):
        told.append([type(message) for message in lab.link.receive()])
        submit(slot, call)

    lab.fleet.submit = look
    lab.ready()
    lab.link.receive()
    lab.send(1)
    assert told[0][-1] is link.Accepted
    flush, lab.driver._link.flush = lab.driver._link.flush, lambda: False  # the worker takes nothing at the moment
    lab.event(Replied(lab.fleet.calls[0].id, Reply((succeeded(lab.fleet.calls[0].tasks[0], 1),), 0.0), ""))
    lab.send(2)
    assert len(lab.fleet.calls) == 1
    lab.driver._link.flush = flush
    lab.driver._submit()
    assert len(lab.fleet.calls) == 2


def test_what_an_earlier_driver_has_announced_is_not_given_back(lab):
    first = lab.send("waits")
    lab.send("announced", announced=True)
    lab.link.send(link.Flush())
    lab.link.flush()
    lab.driver._read_link()
    lab.driver._turn()
    lab.driver._flush()
    flushed = [message.serial for message in lab.link.receive() if isinstance(message, link.Flushed)]
    assert flushed == [first], "the broker may not have the other any more"


def test_a_late_task_that_came_back_from_its_actor_is_given_back(lab):
    """Neither running nor acknowledged: at shutdown with the cluster gone it must not hold the worker."""
    lab.app.tasks["lab.echo"].acks_late = True
    call = shared_call(lab, 1)
    lab.event(Replied(call.id, None, "the actor died"))
    lab.driver._flush()
    lab.link.receive()
    lab.link.send(link.Flush())
    lab.link.flush()
    lab.driver._read_link()
    lab.driver._turn()
    lab.driver._flush()
    assert [type(message) for message in lab.link.receive()] == [link.Flushed]
    assert not lab.driver._tasks.by_serial


# ---- memory


def no_room(task):
    return Failed(task.token, FailureKind.NO_ROOM, "NO_ROOM", "needs 2.0 GiB, 1.0 GiB of 8.0 GiB are free")


def refuse_for_memory(lab, value):
    """Send a task, and let its actor say that too little memory is free."""
    lab.ready()
    lab.send(value)
    call = lab.fleet.calls.pop()
    lab.event(Replied(call.id, Reply((no_room(call.tasks[0]),), 0.0), ""))
    return call.tasks[0]


def test_a_task_without_room_waits_until_its_actor_is_heard_of_again(lab):
    refused = refuse_for_memory(lab, 1)
    assert not lab.fleet.calls and not lab.answers(), "neither tried again at once nor failed"
    lab.ready()
    (again,) = lab.fleet.calls
    assert again.tasks[0].payload == refused.payload and again.tasks[0].token != refused.token
    lab.event(Replied(again.id, Reply((succeeded(again.tasks[0], "in"),), 0.0), ""))
    (answer,) = lab.answers()
    assert answer.result[:2] == (0, "'in'")


def test_a_task_without_room_for_too_long_fails_with_the_numbers(monkeypatch):
    monkeypatch.setenv("BRIDGE_CALL_GAP_S", "0")
    monkeypatch.setenv("BRIDGE_CLUSTER_WAIT_S", "0.000001")
    settings.cache_clear()
    lab = Lab(monkeypatch)
    refuse_for_memory(lab, 1)
    lab.ready()
    call = lab.fleet.calls.pop()
    lab.event(Replied(call.id, Reply((no_room(call.tasks[0]),), 0.0), ""))
    (answer,) = lab.answers()
    failed, error = answer.result[0], answer.result[1]
    assert failed and error.type.__name__ == "GpuOutOfMemory"
    assert "needs 2.0 GiB, 1.0 GiB of 8.0 GiB are free" in str(error.exception)
    settings.cache_clear()


def test_a_revoked_task_without_room_is_not_tried_again(lab):
    lab.ready()
    serial = lab.send(1)
    call = lab.fleet.calls.pop()
    lab.link.send(link.Cancel(serial))
    lab.link.flush()
    lab.driver._read_link()
    lab.driver._turn()
    lab.event(Replied(call.id, Reply((no_room(call.tasks[0]),), 0.0), ""))
    lab.ready()
    assert not lab.fleet.calls
    assert [type(answer) for answer in lab.answers()] == [link.Ended]


def test_an_actor_whose_reply_was_lost_is_told_to_forget_the_call(lab):
    """It may live: then it would keep the outcomes for ever, and never be idle."""
    call = shared_call(lab, 1)
    lab.event(Replied(call.id, None, "the connection was reset"))
    assert lab.fleet.forgotten == [(call.id, [call.tasks[0].token])]


def test_large_outcomes_that_are_on_their_way_are_not_forgotten_with_their_call(lab):
    call = shared_call(lab, 2)
    heard, unheard = (each.token for each in call.tasks)
    lab.event(Replied(call.id, Reply((Large(heard, 10), Pending(unheard, False)), 0.0), ""))
    assert lab.fleet.fetched == [heard]
    lab.event(Replied(call.id, None, "the connection was reset"))
    assert lab.fleet.forgotten == [(call.id, [unheard])]


def waits_for(lab, cluster_wait_s):
    waiting = lab.driver._waiting
    waiting._settings = waiting._settings.model_copy(update={"cluster_wait_s": cluster_wait_s})


def test_a_task_given_back_in_this_turn_is_not_failed_for_want_of_an_actor(lab):
    waits_for(lab, 1e-6)
    serial = lab.send(1)
    lab.link.send(link.Withdraw(serial))
    lab.link.flush()
    lab.driver._read_link()
    lab.driver._look_at_waiting()
    lab.driver._turn()
    lab.driver._flush()
    assert [type(message) for message in lab.link.receive()] == [link.Flushed]


def test_tasks_that_waited_are_not_refused_in_the_turn_in_which_their_actor_comes(lab, monkeypatch, caplog):
    monkeypatch.setattr("bridge.driver.waiting.GROW_AFTER_S", 0.0)
    waits_for(lab, 0.0)
    lab.send("waits")
    lab.driver._notify(lab.is_ready())
    lab.driver._handle_inbox()
    lab.driver._look_at_waiting()
    lab.driver._turn()
    assert len(lab.fleet.calls) == 1 and lab.answers() == []
    assert "no GPU actor has it" not in caplog.text


def test_a_call_says_what_may_be_read_ahead_of_it(lab, monkeypatch):
    """Large data in Redis that its arguments refer to, and nothing of the task before."""
    monkeypatch.setattr(arrays, "passes_on", True)
    lab.ready()
    for number, size in enumerate((1 << 20, 8)):
        lab.send(
            ArrayRef(url=f"redis:{number:032}", dtype="<f8", shape=(size // 8,), size_bytes=size), name="lab.total"
        )
        (sent,) = lab.fleet.calls[number].tasks
        assert sent.large == (((f"{number:032}", size),) if size > 8 else ())
        lab.event(Replied(lab.fleet.calls[number].id, Reply((succeeded(sent, 1.0),), 0.0), "", True))
    assert not arrays.seen
