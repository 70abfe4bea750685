"""The call that an executor has: who runs now, when they are interrupted or ended, and who is charged for a death.

The journal tells who runs. What waits behind this call, and what becomes of the executor, is the shell's.
"""

import math
import time
from collections.abc import Collection
from typing import Any

from actors.actor.breaker import Breaker
from actors.actor.child import Child
from actors.actor.entries import Entry
from actors.contract import EXIT_DEVICE_FAULTY, FailureKind, Reason, TaskCall
from actors.journal import Running

#: Executors that may die with one call while no body runs, before the call is blamed.
MAX_IDLE_DEATHS = 2
#: A body that runs this long in a call of tasks that should take far less holds up those behind it, in seconds.
HOLDS_UP_S = 0.1
#: An interrupt that has not reached its body is sent again after this pause.
RESEND_S = 0.02


class ActiveCall:
    """A call and the executor that has it; all access under the actor's lock."""

    def __init__(self, entry: Entry, child: Child) -> None:
        self.entry = entry
        self.child = child
        self._interrupted: dict[int, Reason] = {}  # serial of the running body -> how it was last signalled

    def hand_over(self) -> None:
        """Give the call to the executor, which waits for one."""
        entry = self.entry
        entry.sent = list(entry.todo)
        entry.started_at, entry.patient_until = time.monotonic(), math.inf
        entry.held_up.clear()
        try:
            self.child.send(entry.call._replace(tasks=tuple(entry.sent)))
        except OSError:  # it is dead, or will not take a call: its end is read next, and the entry goes back
            self.child.process.kill()

    def running(self) -> list[TaskCall]:
        """Those that run now, or ran when the executor died."""
        running = self.child.running()
        return self._tasks_of(running) if running else []

    def running_tokens(self) -> frozenset[str]:
        """The same, by token."""
        return frozenset(task.token for task in self.running())

    def left_s(self, at_least_if_late: float) -> float:
        """How long it will still take, as far as foreseen.

        Of a call that has run longer than foreseen nobody knows: as long again, and no less than `at_least_if_late`. A
        call whose tasks all have outcomes is over, although its executor may not have said so yet, on busy cores.
        """
        if self.entry.is_finished:
            return 0.0
        ran_s, estimate_s = time.monotonic() - self.entry.started_at, self.entry.call.estimate_s
        is_late = ran_s > max(estimate_s, HOLDS_UP_S)
        return max(ran_s, at_least_if_late) if is_late else max(0.0, estimate_s - ran_s)

    # limits and cancellation

    def withdraw(self, tokens: Collection[str]) -> None:
        """Have the executor leave out those of these tasks that have not started."""
        for index, task in enumerate(self.entry.sent):
            if task.token in tokens:
                self.child.journal.cancel(index)

    def enforce(self, now: float, grace_s: float) -> None:
        """Enforce limits and cancellations on the body that runs now."""
        entry, child = self.entry, self.child
        running = child.running()
        if running is None or child.planned_end:
            return
        tasks = self._tasks_of(running)
        ran_s = now - running.started_ns / 1e9
        if entry.call.may_part and ran_s > HOLDS_UP_S:
            self._part(running)
        cancelled = [entry.cancelled[task.token] for task in tasks if task.token in entry.cancelled]
        alone = len(tasks) == 1  # one cancelled task of a shared run ends when the run ends
        softened = alone and tasks[0].token in entry.softened
        if alone and cancelled and now - cancelled[0] > grace_s:
            child.kill("cancelled", running.serial)
        elif _exceeded(ran_s, [task.hard_limit_s for task in tasks]):
            child.kill("hard limit", running.serial)
        elif alone and cancelled:
            self._interrupt(running.serial, Reason.CANCEL)
        elif softened or _exceeded(ran_s, [task.soft_limit_s for task in tasks]):
            if running.serial not in self._interrupted:
                entry.hit_soft_limit(task.token for task in tasks if _exceeded(ran_s, [task.soft_limit_s]))
            self._interrupt(running.serial, Reason.SOFT_LIMIT)

    def looks(self, now: float) -> list[float]:
        """In how many seconds `enforce` may have something to do."""
        entry, running = self.entry, self.child.running()
        ran_s = now - running.started_ns / 1e9 if running else 0.0
        limits = [limit for task in entry.todo for limit in (task.soft_limit_s, task.hard_limit_s) if limit]
        times = [limit - ran_s if limit > ran_s else RESEND_S for limit in limits]
        if entry.call.may_part and running and entry.behind(running.first + running.size):
            times.append(HOLDS_UP_S - ran_s if ran_s < HOLDS_UP_S else RESEND_S)
        if entry.cancelled or entry.softened:
            times.append(RESEND_S)
        return times

    def _part(self, running: Running) -> None:
        """Give back the tasks behind a slow one: another actor may be free."""
        entry, child = self.entry, self.child
        waiting = entry.behind(running.first + running.size)
        if not waiting:
            return
        entry.held_up.update(entry.sent[index].token for index in waiting)
        for index in waiting:
            child.journal.cancel(index)
        if child.running() == running:  # it has not ended meanwhile, so the next one has not been looked at
            slow = "a task ahead of it takes far longer than foreseen"
            entry.fail([entry.sent[index] for index in waiting], FailureKind.HELD_UP, slow)

    def _interrupt(self, serial: int, reason: Reason) -> None:
        if self.child.journal.taken() != serial or self._interrupted.get(serial) != reason:
            self._interrupted = {serial: reason}
            self.child.interrupt(serial, reason)

    # blame

    def blame_device(self, breaker: Breaker, how: str) -> bool:
        """The device has broken under the executor: count it; whether the GPU is to be fenced."""
        tasks, is_faulty = self.running() or self.entry.sent, self.child.code == EXIT_DEVICE_FAULTY
        whose = frozenset(f"{self.entry.call.driver} {task.token.rpartition('.')[0] or task.token}" for task in tasks)
        return breaker.body_broke(whose, tasks[0].name, how, is_faulty, time.monotonic())

    def charge(self, how: str) -> bool:
        """The executor is gone: give those that ran an outcome; whether one of them has ended it."""
        entry, child = self.entry, self.child
        running = child.running()
        if running is None:
            self._count_idle_death(how)
            return False
        tasks = [task for task in self._tasks_of(running) if task in entry.todo]
        if child.planned_end and running.serial == child.serial_to_end:
            aimed = [task for task in tasks if len(tasks) == 1 or task.token in entry.cancelled]
            kind = FailureKind.CANCELLED if child.planned_end == "cancelled" else FailureKind.HARD_LIMIT
            entry.fail(aimed or tasks, kind, child.planned_end)
        elif not child.planned_end:
            entry.fail(tasks, FailureKind.CRASHED if len(tasks) == 1 else FailureKind.SUSPECT, how)
        # whoever else was running when the actor itself ended the executor is innocent, but it has started
        entry.fail([task for task in tasks if task in entry.todo], FailureKind.UNSURE, "ended because of another task")
        return not child.planned_end

    def _count_idle_death(self, how: str) -> None:
        """An executor that dies twice around the bodies of one call has been ended by that call all the same."""
        entry = self.entry
        entry.idle_deaths += not self.child.planned_end
        if entry.idle_deaths >= MAX_IDLE_DEATHS:
            entry.fail(entry.todo, FailureKind.CRASHED if len(entry.todo) == 1 else FailureKind.SUSPECT, how)

    def _tasks_of(self, running: Running) -> list[TaskCall]:
        return self.entry.sent[running.first : running.first + running.size]


def _exceeded(ran_s: float, limits: list[Any]) -> bool:
    return any(limit is not None and limit and ran_s >= limit for limit in limits)
