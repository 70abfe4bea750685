"""In the driver: what becomes of a task when a run of it has ended, with a value or without one.

A value, or the body's own error, goes to the task's tracer. For all else `blame.py` says what the task is
charged with and `verdicts.py` what follows; here that is done: another run, now or later, or an error.
"""

import logging
import pickle
import time

from billiard.exceptions import WorkerLostError

from actors.contract import Failed, FailureKind, Outcome, Pending, Succeeded
from actors.data.handles import DeviceArray
from bridge.driver.blame import Blame
from bridge.driver.errands import Errands
from bridge.driver.in_hand import TasksInHand
from bridge.driver.ledger import Ledger
from bridge.driver.orders import ActorShort, Event, TaskFinished
from bridge.driver.roster import Roster
from bridge.driver.tracing import TracedTask, einfo
from bridge.driver.verdicts import Verdict, judge
from bridge.driver.waiting import WaitingTasks
from bridge.errors import ClusterUnavailable, GpuOutOfMemory, TaskPoisoned
from bridge.settings import Settings

logger = logging.getLogger(__name__)

#: What a lost task's error says beyond how the process ended.
_REMARKS = {
    FailureKind.CRASHED: " The GPU executor died while the task ran.",
    FailureKind.SUSPECT: " The GPU executor died while a batch ran that the task was part of.",
    FailureKind.UNSURE: " The GPU actor was lost while the task ran, or may have run.",
}


class Finishing:
    """Takes outcomes; `events` takes what the scheduler is to be told."""

    def __init__(
        self, settings: Settings, events: list[Event], tasks: TasksInHand, waiting: WaitingTasks, errands: Errands,
        blame: Blame, ledger: Ledger, roster: Roster,
    ) -> None:  # fmt: skip
        self._settings, self._events, self._roster = settings, events, roster
        self._tasks, self._waiting, self._errands = tasks, waiting, errands
        self._blame, self._ledger = blame, ledger
        self.finished: list[tuple[TracedTask, Succeeded]] = []  # outcomes their tracers have not seen yet

    def finish(self, actor: int, outcome: Outcome) -> None:
        """A task's outcome: give it to its tracer, or let the task run again when somebody else is to blame."""
        task = self._tasks.by_token.get(outcome.token)
        ran = isinstance(outcome, Succeeded) or outcome.kind in (FailureKind.RAISED, FailureKind.RETRY)
        self._events.append(TaskFinished(outcome.token, outcome.run_s if ran else None))
        if task is None:
            self._take_unasked(actor, outcome)
        elif isinstance(outcome, Succeeded):
            self._blame.acquit(task)
            self.finished.append((task, outcome))
        else:
            self._judge(task, actor, outcome)

    def _take_unasked(self, actor: int, outcome: Outcome) -> None:
        """An outcome no message waits for: of an errand, or of a task that was given up; then nothing of it stays."""
        if outcome.token in self._errands:
            if isinstance(outcome, Failed) and outcome.kind is FailureKind.LOST and actor in self._roster.ready:
                self._events += self._roster.lose(actor, outcome.message)  # it is asked again after its next beat
            self._errands.take(outcome)
        elif isinstance(outcome, Succeeded) and outcome.made:
            made = pickle.loads(outcome.made)
            self._errands.delete(each for each in made if isinstance(each, DeviceArray))
            refs = [each.kept if isinstance(each, DeviceArray) else each for each in made]
            self._ledger.discard([ref for ref in refs if ref is not None])

    # ---- failures

    def begin_again(self, task: TracedTask) -> None:
        """Let a task wait that the broker delivers again, unless it has had its crashes elsewhere."""

        def go_on() -> None:
            if task not in self._tasks:
                return  # given back meanwhile
            standing = self._blame.standing(task)
            if task.cancelled:
                self._tasks.terminate(task)
            elif standing.crashes >= standing.max_crashes:
                self._poison(task)
            else:
                self._waiting.wait(task, task.alone)

        self._blame.recall(task, go_on)

    def _judge(self, task: TracedTask, actor: int, outcome: Failed) -> None:
        """A failure: count it, then `_decide`."""
        if outcome.kind is FailureKind.CRASHED:
            node = self._roster.node(actor)
            self._blame.charge(task, actor, node, outcome.message, lambda: self._decide(task, actor, outcome))
            return
        if outcome.kind in (FailureKind.LOST, FailureKind.UNSURE):
            task.losses += 1
            if actor in self._roster.ready:
                self._events += self._roster.lose(actor, outcome.message)
        self._decide(task, actor, outcome)

    def _decide(self, task: TracedTask, actor: int, outcome: Failed) -> None:
        """What becomes of a task that has failed; `verdicts.py` says it."""
        if task not in self._tasks:
            return  # the driver has answered for it while Redis was asked
        standing = self._blame.standing(task)
        if outcome.kind is FailureKind.CRASHED:
            logger.error(
                "%s[%s] was running when its executor died (%s): crash %d of %d",
                task.run.task, task.run.id, outcome.message, standing.crashes, standing.max_crashes,
            )  # fmt: skip
        tracing = self._tasks.tracing
        match judge(outcome.kind, standing):
            case Verdict.RESUME:
                self._blame.acquit(task)
                tracing.resume(task, outcome)
            case Verdict.AGAIN:
                self._waiting.again(task, alone=False)
            case Verdict.AGAIN_LATER:
                self._again_later(task, actor, outcome.message)
            case Verdict.AGAIN_ALONE:
                self._waiting.again(task, alone=True)
            case Verdict.WORKER_LOST:
                self._log(task, outcome)
                reason = f"Worker exited prematurely: {outcome.message}.{_REMARKS.get(outcome.kind, '')}"
                self._tasks.end(task, einfo(WorkerLostError(reason)))
            case Verdict.POISONED:
                self._poison(task)
            case Verdict.UNAVAILABLE:
                tracing.resume(task, ClusterUnavailable(f"lost {task.losses} times, last: {outcome.message}"))
            case Verdict.TIMED_OUT:
                self._tasks.time_out(task)
            case Verdict.CANCELLED:
                self._log(task, outcome)
                self._tasks.terminate(task)

    def _log(self, task: TracedTask, outcome: Failed) -> None:
        """Log what a body said whose tracer will not see its outcome."""
        if outcome.logs:
            self._tasks.tracing.resume(task, Pending(task.token, True, (pickle.dumps(outcome.logs, 5),)))

    def _again_later(self, task: TracedTask, actor: int, why: str) -> None:
        """Too little memory is free there: elsewhere, or there when the actor has been heard of again."""
        task.short_since = task.short_since or time.monotonic()
        if time.monotonic() - task.short_since >= self._settings.cluster_wait_s and not task.cancelled:
            short = GpuOutOfMemory(f"waited {self._settings.cluster_wait_s:g} s for memory: {why}")
            self._tasks.tracing.resume(task, short)
            return
        logger.info("%s[%s] waits for memory of GPU actor %d: %s", task.run.task, task.run.id, actor, why)
        self._events.append(ActorShort(actor, task.run.task))
        self._waiting.again(task, alone=False)

    def _poison(self, task: TracedTask) -> None:
        """It has ended too many executors: it fails when its message is kept."""

        def fail(error: TaskPoisoned) -> None:
            if task not in self._tasks:
                return  # given back meanwhile
            if task.cancelled:
                self._tasks.terminate(task)
            else:
                self._tasks.refuse(task, error)

        self._blame.bury(task, fail)
