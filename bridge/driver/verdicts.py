"""What becomes of a task whose body gave no value: pure, one table. docs/celery-compatibility.md shows it to users.

Celery promises that a task acknowledged early is never executed twice, and that a late one may be. So whatever was lost
while it ran, or may have run, runs again only if the task allows it; what certainly has not started always may.
"""

from enum import Enum, auto
from typing import NamedTuple

from actors.contract import FailureKind

#: Reruns after losses nobody is to blame for, before the task fails instead of going round for ever.
MAX_LOSSES = 10


class Verdict(Enum):
    """What the driver does with the task."""

    RESUME = auto()  # its tracer gets the outcome: it is the body's own
    AGAIN = auto()  # it waits for another run
    AGAIN_LATER = auto()  # it waits until an actor has more memory free
    AGAIN_ALONE = auto()  # the same, sharing its run with nobody
    WORKER_LOST = auto()  # Celery's rules for a lost worker: fail, retry or give back to the broker
    POISONED = auto()  # TaskPoisoned: it has ended too many executors
    UNAVAILABLE = auto()  # ClusterUnavailable: lost too often
    TIMED_OUT = auto()  # TimeLimitExceeded
    CANCELLED = auto()  # the worker has given it up


class Standing(NamedTuple):
    """What a task allows, and what has happened to it so far, this time included."""

    acks_late: bool
    reject_on_worker_lost: bool | None
    retry_on_worker_lost: bool
    max_crashes: int
    crashes: int
    losses: int
    cancelled: bool  # the worker has given it up

    @property
    def may_run_twice(self) -> bool:
        """Only with late acknowledgement, and not when the task says no to redelivery."""
        return self.acks_late and self.reject_on_worker_lost is not False


def judge(kind: FailureKind, task: Standing) -> Verdict:
    """The verdict on one failure."""
    match kind:
        case FailureKind.HARD_LIMIT:
            return Verdict.TIMED_OUT
        case FailureKind.CANCELLED:
            return Verdict.CANCELLED
        case FailureKind.CRASHED | FailureKind.SUSPECT | FailureKind.LOST | FailureKind.UNSURE if task.cancelled:
            return Verdict.CANCELLED
        case FailureKind.NO_ROOM | FailureKind.HELD_UP if task.cancelled:
            return Verdict.CANCELLED
        case FailureKind.NO_ROOM:
            return Verdict.AGAIN_LATER
        case FailureKind.HELD_UP:
            return Verdict.AGAIN
        case FailureKind.EXITED:  # a prefork child would have ended, and nobody would run the task again
            return Verdict.WORKER_LOST
        case FailureKind.CRASHED:
            if task.retry_on_worker_lost or not task.may_run_twice:
                return Verdict.WORKER_LOST
            return Verdict.POISONED if task.crashes >= task.max_crashes else Verdict.AGAIN_ALONE
        case FailureKind.SUSPECT:
            return Verdict.AGAIN_ALONE if task.may_run_twice else Verdict.WORKER_LOST
        case FailureKind.LOST | FailureKind.UNSURE:
            if kind is FailureKind.UNSURE and not task.may_run_twice:
                return Verdict.WORKER_LOST
            return Verdict.UNAVAILABLE if task.losses > MAX_LOSSES else Verdict.AGAIN
    return Verdict.RESUME
