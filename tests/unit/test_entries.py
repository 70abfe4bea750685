"""A call in the actor's hands: outcomes once each, delivery once each, large ones apart, and the tally."""

import pickle
import threading

import pytest

from actors.actor.account import Tally
from actors.actor.entries import Entry, lost
from actors.contract import Call, Failed, FailureKind, Large, Pending, Succeeded, TaskCall


def call(*tokens):
    tasks = tuple(TaskCall(token, f"shop.{token[0]}", b"", None, None) for token in tokens)
    return Call("call", "driver", "release", tasks, 0.1)


def make(*tokens):
    """An entry under a lock this thread holds, as the actor's threads do."""
    lock = threading.RLock()
    lock.acquire()
    return Entry(call(*tokens), lock)


def succeeded(token, value=b"", run_s=0.5, batch=1):
    return Succeeded(token, value, run_s, batch)


def test_an_entry_is_finished_when_every_task_has_an_outcome():
    entry = make("a1", "a2")
    assert not entry.is_finished
    assert entry.record(succeeded("a1")).token == "a1"
    entry.fail(entry.todo, FailureKind.LOST, "why")
    assert entry.is_finished
    assert not entry.is_delivered


def test_a_second_outcome_is_ignored():
    entry = make("a1")
    entry.record(succeeded("a1", b"first"))
    assert entry.record(succeeded("a1", b"second")) is None
    entry.fail(entry.call.tasks, FailureKind.CRASHED, "late")
    assert entry.deliver(100, frozenset(), {}) == (succeeded("a1", b"first"),)


def test_a_stranger_is_ignored():
    assert make("a1").record(succeeded("b9")) is None


def test_what_has_not_finished_is_pending_with_whether_it_runs():
    entry = make("a1", "a2", "a3")
    entry.record(succeeded("a1"))
    found = entry.deliver(100, frozenset(["a2"]), {})
    assert found == (succeeded("a1"), Pending("a2", True), Pending("a3", False))
    assert not entry.is_delivered


def test_nothing_is_delivered_twice():
    entry = make("a1", "a2")
    entry.record(succeeded("a1"))
    entry.deliver(100, frozenset(), {})
    assert entry.deliver(100, frozenset(), {}) == (Pending("a2", False),)
    assert not entry.has_news()
    entry.record(succeeded("a2"))
    assert entry.has_news()
    assert entry.deliver(100, frozenset(), {}) == (succeeded("a2"),)
    assert entry.is_delivered
    assert entry.deliver(100, frozenset(), {}) == ()


@pytest.mark.parametrize(("size", "large"), [(99, False), (100, False), (101, True)])
def test_large_outcomes_wait_to_be_fetched(size, large):
    entry, kept = make("a1"), {}
    entry.record(succeeded("a1", b"x" * size))
    (answer,) = entry.deliver(100, frozenset(), kept)
    if large:
        assert answer == Large("a1", size)
        driver, data = kept["a1"]
        assert driver == "driver"
        assert pickle.loads(data) == succeeded("a1", b"x" * size)
    else:
        assert kept == {}
    assert entry.is_delivered


def test_a_large_exception_counts_too():
    entry, kept = make("a1"), {}
    entry.record(Failed("a1", FailureKind.RAISED, "E", "m", exception=b"x" * 200))
    assert entry.deliver(100, frozenset(), kept) == (Large("a1", 200),)


def test_what_a_running_body_asks_leaves_once_and_before_its_outcome():
    entry = make("a1", "a2")
    entry.ask("a1", b"one")
    entry.ask("a1", b"two")
    assert entry.has_news()
    assert entry.deliver(100, frozenset(["a1"]), {}) == (Pending("a1", True, (b"one", b"two")), Pending("a2", False))
    assert not entry.has_news()
    entry.ask("a1", b"three")
    entry.record(succeeded("a1"))
    found = entry.deliver(100, frozenset(), {})
    assert found[:2] == (Pending("a1", True, (b"three",)), succeeded("a1"))


def test_a_soft_limit_is_told_once_for_each_task():
    """A run of several is interrupted once for each body that goes on."""
    entry = make("a1", "a2")
    entry.hit_soft_limit(["a1"])
    entry.hit_soft_limit(["a1"])
    found = entry.deliver(100, frozenset(["a1", "a2"]), {})
    assert found == (Pending("a1", True, (), True), Pending("a2", True, (), False))
    entry.hit_soft_limit(["a1", "a2"])
    found = entry.deliver(100, frozenset(["a1", "a2"]), {})
    assert found == (Pending("a1", True, (), False), Pending("a2", True, (), True))


def test_news_wake_who_waits():
    lock = threading.RLock()
    entry = Entry(call("a1"), lock)
    woken = threading.Event()

    def wait():
        with lock:
            entry.changed.wait_for(entry.has_news, 30)
            woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    with lock:
        entry.record(succeeded("a1"))
    assert woken.wait(30)
    thread.join()


def test_a_call_nobody_has_is_lost_task_by_task():
    reply = lost(call("a1", "b1"), FailureKind.LOST, "the actor was restarted")
    assert [(answer.token, answer.kind) for answer in reply.answers] == [
        ("a1", FailureKind.LOST),
        ("b1", FailureKind.LOST),
    ]
    assert reply.answers[0].message == "the actor was restarted"


def test_the_tally_counts_tasks_runs_and_seconds():
    tally = Tally()
    for token in ("a1", "a2", "a3", "a4"):
        tally.add("shop.many", succeeded(token, run_s=0.25, batch=4))
    tally.add("shop.one", succeeded("b1", run_s=1.0))
    tally.add("shop.one", Failed("b2", FailureKind.RAISED, "E", "m", run_s=3.0))
    assert tally.tasks == 6
    assert tally.by_task() == {
        "shop.many": {"tasks": 4, "runs": 1, "mean_s": 0.25},
        "shop.one": {"tasks": 2, "runs": 2, "mean_s": 2.0},
    }
