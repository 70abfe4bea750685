"""The table of what becomes of a task whose body gave no value."""

import pytest

from actors.contract import FailureKind
from bridge.driver.verdicts import MAX_LOSSES, Standing, Verdict, judge

EARLY = Standing(False, None, False, 2, 1, 1, False)
LATE = EARLY._replace(acks_late=True)
KEPT = LATE._replace(reject_on_worker_lost=False)
REJECTING = LATE._replace(reject_on_worker_lost=True)
RETRIED = LATE._replace(retry_on_worker_lost=True)
LOST, ALONE, AGAIN = Verdict.WORKER_LOST, Verdict.AGAIN_ALONE, Verdict.AGAIN


@pytest.mark.parametrize(
    ("kind", "early", "late", "kept", "rejecting", "retried"),
    [
        ("CRASHED", LOST, ALONE, LOST, ALONE, LOST),
        ("SUSPECT", LOST, ALONE, LOST, ALONE, ALONE),
        ("UNSURE", LOST, AGAIN, LOST, AGAIN, AGAIN),
        ("LOST", AGAIN, AGAIN, AGAIN, AGAIN, AGAIN),
        ("HELD_UP", *[AGAIN] * 5),
        ("NO_ROOM", *[Verdict.AGAIN_LATER] * 5),
        ("EXITED", LOST, LOST, LOST, LOST, LOST),
        ("HARD_LIMIT", *[Verdict.TIMED_OUT] * 5),
        ("CANCELLED", *[Verdict.CANCELLED] * 5),
        ("RAISED", *[Verdict.RESUME] * 5),
        ("RETRY", *[Verdict.RESUME] * 5),
        ("OUT_OF_MEMORY", *[Verdict.RESUME] * 5),
        ("UNKNOWN_TASK", *[Verdict.RESUME] * 5),
        ("NOT_SENDABLE", *[Verdict.RESUME] * 5),
    ],
)
def test_the_settings_of_a_task_decide(kind, early, late, kept, rejecting, retried):
    found = [judge(FailureKind[kind], standing) for standing in (EARLY, LATE, KEPT, REJECTING, RETRIED)]
    assert found == [early, late, kept, rejecting, retried]


def test_every_kind_of_failure_is_in_the_table_above():
    rows = {
        mark.args[1][i][0] for mark in test_the_settings_of_a_task_decide.pytestmark for i in range(len(mark.args[1]))
    }
    assert rows == {kind.name for kind in FailureKind}


@pytest.mark.parametrize("kind", ["CRASHED", "SUSPECT", "LOST", "UNSURE", "NO_ROOM", "HELD_UP"])
def test_what_was_given_up_neither_runs_again_nor_fails(kind):
    for standing in (EARLY, LATE, RETRIED):
        assert judge(FailureKind[kind], standing._replace(cancelled=True)) is Verdict.CANCELLED


def test_the_last_crash_poisons():
    assert judge(FailureKind.CRASHED, LATE._replace(crashes=2)) is Verdict.POISONED
    assert judge(FailureKind.CRASHED, EARLY._replace(crashes=2)) is LOST


@pytest.mark.parametrize("kind", [FailureKind.LOST, FailureKind.UNSURE])
def test_losses_end_some_day(kind):
    assert judge(kind, LATE._replace(losses=MAX_LOSSES)) is AGAIN
    assert judge(kind, LATE._replace(losses=MAX_LOSSES + 1)) is Verdict.UNAVAILABLE
