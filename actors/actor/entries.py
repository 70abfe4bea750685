"""A call while the actor has it: what is still to run, what has finished, who waits."""

import math
import pickle
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

from actors.actor.breaker import BreakerRules
from actors.contract import (
    Answer,
    Call,
    Failed,
    FailureKind,
    Large,
    Outcome,
    Pending,
    Reason,
    Reply,
    Succeeded,
    TaskCall,
)


class Limits(NamedTuple):
    """Sizes in bytes, times in seconds; the driver's settings set them when the actor is created."""

    inline_bytes: int  # an outcome above this travels as a return of its own
    queued_tasks: int  # above this a call is refused as Busy
    reply_after_s: float  # a call answers after this, finished or not
    lease_s: float  # queued tasks of a driver not heard of for this long are dropped
    keep_warm_s: float  # without any driver for this long the actor ends
    grace_s: float  # from a cancelled body's interrupt to the end of its executor
    keep_idle_s: float = math.inf  # after this long without a task the actor ends, drivers or not
    share: float = 1.0  # of one GPU that the actor reserves
    breaker: BreakerRules = BreakerRules()


class Entry:
    """One call in the actor's hands; all access under the actor's lock."""

    def __init__(self, call: Call, lock: threading.RLock) -> None:
        self.call = call
        self.changed = threading.Condition(lock)
        self.todo: list[TaskCall] = list(call.tasks)
        self.sent: list[TaskCall] = []  # what the executor has now; the journal's indices point here
        self.cancelled: dict[str, float] = {}  # token -> when; long ago for one that gets no grace time
        self.softened: set[str] = set()  # running tasks to be interrupted as by their soft limit
        self.held_up: set[str] = set()  # tokens given back because a task ahead of them is slow
        self.patient_until = math.inf  # if its turn has not come by then, it goes back
        self.started_at = math.inf  # when an executor got it last
        self.idle_deaths = 0  # executors that died with this call while no body ran
        self._soft_limit_hit: set[str] = set()  # tokens
        self._soft_limit_told: set[str] = set()
        self._outcomes: dict[str, Outcome] = {}
        self._wishes: dict[str, list[bytes]] = {}  # what running bodies ask of Celery, in order
        self._undelivered = {task.token for task in call.tasks}

    @property
    def is_finished(self) -> bool:
        """Every task has an outcome."""
        return not self.todo

    @property
    def has_limits(self) -> bool:
        """Somebody must look at the clock while it runs."""
        return any(task.soft_limit_s or task.hard_limit_s for task in self.todo)

    @property
    def is_delivered(self) -> bool:
        """Every outcome has left; the entry can be forgotten."""
        return not self._undelivered

    def behind(self, place: int) -> list[int]:
        """Places from `place` on, among what the executor has, of tasks without an outcome."""
        left = {task.token for task in self.todo}
        return [index for index in range(place, len(self.sent)) if self.sent[index].token in left]

    def has_news(self) -> bool:
        """There is an outcome or a wish that has not left yet."""
        return bool(self._wishes or self._soft_limit_hit) or not self._undelivered.isdisjoint(self._outcomes)

    def ask(self, token: str, wishes: bytes) -> None:
        """A running body asks something of Celery; a thread it has left behind asks in vain."""
        if token in self._undelivered:
            self._wishes.setdefault(token, []).append(wishes)
            self.changed.notify_all()

    def hit_soft_limit(self, tokens: Iterable[str]) -> None:
        """Running bodies are interrupted by their soft limit; each is told once, however often its run is."""
        news = self._undelivered.intersection(tokens) - self._soft_limit_told
        self._soft_limit_told |= news
        self._soft_limit_hit |= news
        self.changed.notify_all()

    def cancel(self, tokens: list[str], how: Reason, running: frozenset[str]) -> list[str]:
        """Note that tasks are cancelled; those that are to be withdrawn if they have not started.

        Args:
            running: tokens of those that run now, of which a soft limit withdraws none.
        """
        if how is Reason.SOFT_LIMIT:
            self.softened |= running.intersection(tokens)
            tokens = [token for token in tokens if token not in running]
        since = -math.inf if how is Reason.KILL else time.monotonic()
        self.cancelled.update({token: min(since, self.cancelled.get(token, since)) for token in tokens})
        return tokens

    def record(self, outcome: Outcome) -> TaskCall | None:
        """Take a task's outcome; the task, or None when it had one already."""
        if outcome.token in self.held_up and outcome.token not in self.cancelled and _is_cancelled(outcome):
            outcome = Failed(outcome.token, FailureKind.HELD_UP, "HELD_UP", "a task ahead of it was slow")
        for index, task in enumerate(self.todo):
            if task.token == outcome.token:
                del self.todo[index]
                self._outcomes[outcome.token] = outcome
                self.changed.notify_all()
                return task
        return None

    def fail(self, tasks: Iterable[TaskCall], kind: FailureKind, message: str) -> None:
        """Give tasks an outcome that no body produced."""
        for task in list(tasks):
            self.record(Failed(task.token, kind, kind.name, message))

    def deliver(
        self, inline_bytes: int, running: frozenset[str], large: dict[str, tuple[str, bytes]]
    ) -> tuple[Answer, ...]:
        """Answers for all tasks that have not left; large outcomes move to `large` until they are fetched."""
        answers: list[Answer] = []
        for task in self.call.tasks:
            if task.token not in self._undelivered:
                continue
            outcome = self._outcomes.pop(task.token, None)
            wishes, hit = tuple(self._wishes.pop(task.token, ())), task.token in self._soft_limit_hit
            self._soft_limit_hit.discard(task.token)
            if outcome is None:
                answers.append(Pending(task.token, task.token in running, wishes, hit))
                continue
            if wishes or hit:  # they happened before the end, and the driver hears of them before it
                answers.append(Pending(task.token, True, wishes, hit))
            self._undelivered.discard(task.token)
            size = _size(outcome)
            if size > inline_bytes:
                large[task.token] = self.call.driver, pickle.dumps(outcome, 5)
                answers.append(Large(task.token, size))
            else:
                answers.append(outcome)
        return tuple(answers)


def lost(call: Call, kind: FailureKind, message: str) -> Reply:
    """The answer about a call this actor does not have."""
    return Reply(tuple(Failed(task.token, kind, kind.name, message) for task in call.tasks), 0.0)


def _is_cancelled(outcome: Outcome) -> bool:
    return isinstance(outcome, Failed) and outcome.kind is FailureKind.CANCELLED


def _size(outcome: Outcome) -> int:
    return len(outcome.value) if isinstance(outcome, Succeeded) else len(outcome.exception or b"")
