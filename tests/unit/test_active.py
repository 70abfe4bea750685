"""The call that an executor has, in moments that no real executor can be held in; all others are in test_executor.py.

The journal is a real one, with this test in the executor's place.
"""

import threading
import time

import pytest

from actors.actor.active import HOLDS_UP_S, ActiveCall
from actors.actor.breaker import Breaker, BreakerRules
from actors.actor.entries import Entry
from actors.contract import EXIT_DEVICE_BROKEN, Call, Failed, FailureKind, Reason, Succeeded, TaskCall
from actors.journal import Journal

GRACE_S = 5.0


class Executor:
    """What the call needs of its executor."""

    def __init__(self):
        self.journal = Journal.create()
        self.running = self.journal.running
        self.planned_end, self.serial_to_end, self.code = "", 0, None
        self.interrupts = []
        self.sent = None

    def send(self, call):
        self.sent = call

    def interrupt(self, serial, reason):
        self.interrupts.append(reason)

    def kill(self, why, serial=0):
        self.planned_end, self.serial_to_end = why, serial


@pytest.fixture
def executor():
    executor = Executor()
    yield executor
    executor.journal.close()


@pytest.fixture
def make(executor):
    """A call that the executor has, under a lock this thread holds."""

    def make(*tokens, soft=None, hard=None, **options):
        lock = threading.RLock()
        lock.acquire()
        tasks = tuple(TaskCall(token, "shop.task", b"", soft, hard) for token in tokens)
        active = ActiveCall(Entry(Call("call", "driver", "release", tasks, 0.1, **options), lock), executor)
        active.hand_over()
        return active

    return make


def begin(executor, first, count=1, ago_s=0.0):
    return executor.journal.begin(first, count, time.monotonic_ns() - int(ago_s * 1e9))


def fates(active):
    """Token -> why it has no value, of those that have an outcome."""
    found = active.entry._outcomes.items()
    return {token: outcome.kind for token, outcome in found if isinstance(outcome, Failed)}


def test_only_what_has_no_outcome_is_sent_again(make, executor):
    active = make("a", "b")
    active.entry.record(Succeeded("a", b"", 0.1, 1))
    active.hand_over()
    assert [task.token for task in executor.sent.tasks] == ["b"]


def test_a_body_that_started_after_the_one_its_executor_was_ended_for_is_not_charged(make, executor):
    active = make("a", "b", "c")
    executor.kill("hard limit", begin(executor, 0))
    active.entry.record(Succeeded("a", b"", 0.1, 1))
    begin(executor, 1)
    assert not active.charge("signal 9")
    assert fates(active)["b"] is FailureKind.UNSURE, "it has started, and nobody may run it again unasked"
    assert [task.token for task in active.entry.todo] == ["c"]


def test_a_crash_of_a_shared_run_makes_suspects(make, executor):
    active = make("a", "b", "c")
    begin(executor, 0, 2)
    assert active.charge("signal 11")
    assert fates(active) == dict.fromkeys("ab", FailureKind.SUSPECT)


def test_an_interrupt_that_has_reached_its_body_is_not_sent_again(make, executor):
    active = make("a", soft=0.1)
    serial = begin(executor, 0, ago_s=0.2)
    active.enforce(time.monotonic(), GRACE_S)
    active.enforce(time.monotonic(), GRACE_S)
    assert executor.interrupts == [Reason.SOFT_LIMIT] * 2, "the first may have been lost"
    executor.journal.take(serial)
    active.enforce(time.monotonic(), GRACE_S)
    assert len(executor.interrupts) == 2
    active.entry.cancel(["a"], Reason.CANCEL, active.running_tokens())
    active.enforce(time.monotonic(), GRACE_S)
    assert executor.interrupts[2:] == [Reason.CANCEL]


@pytest.mark.parametrize("how", Reason)
def test_a_cancellation_says_how_its_running_body_ends(make, executor, how):
    active = make("a", "b")
    begin(executor, 0)
    withdrawn = active.entry.cancel(["a", "b"], how, active.running_tokens())
    active.withdraw(withdrawn)
    active.enforce(time.monotonic(), GRACE_S)
    assert executor.journal.is_cancelled(1), "what has not started is withdrawn"
    assert executor.interrupts == ([] if how is Reason.KILL else [how])
    assert executor.planned_end == ("cancelled" if how is Reason.KILL else "")


def test_a_task_that_the_executor_leaves_out_for_a_slow_one_ahead_is_held_up(make, executor):
    """The slow one has just ended: the executor may have looked at the next one before it was withdrawn, or after."""
    active = make("a", "b", may_part=True)
    begin(executor, 0, ago_s=2 * HOLDS_UP_S)
    slow = executor.journal.running()
    executor.running = iter([slow, None]).__next__
    active.enforce(time.monotonic(), GRACE_S)
    assert not fates(active) and executor.journal.is_cancelled(1)
    active.entry.fail([task for task in active.entry.todo if task.token == "b"], FailureKind.CANCELLED, "withdrawn")
    assert fates(active)["b"] is FailureKind.HELD_UP


def test_a_broken_device_counts_against_the_task_whatever_execution_of_it(make, executor):
    breaker = Breaker(BreakerRules(faults=2))
    executor.code = EXIT_DEVICE_BROKEN
    for token in ("1.first", "1.second"):
        active = make(token)
        begin(executor, 0)
        assert not active.blame_device(breaker, "broke"), "one task proves nothing"
    active = make("2.first")
    begin(executor, 0)
    assert active.blame_device(breaker, "broke") and breaker.total == 3


def test_a_late_call_takes_as_long_again_but_not_once_all_its_tasks_have_outcomes(make):
    active = make("a", "b")
    active.entry.started_at -= 20.0
    active.entry.record(Succeeded("a", b"", 20.0, 1))
    assert active.left_s(10.0) >= 20.0
    active.entry.record(Succeeded("b", b"", 0.1, 1))
    assert active.left_s(10.0) == 0.0, (
        "or the next call would be sent back while the executor has not said that it is done"
    )
