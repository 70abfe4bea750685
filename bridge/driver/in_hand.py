"""In the driver: the tasks it has in hand, and what the worker hears of each. Every Run gets exactly one answer.

A task keeps its serial and gets a new token for each run, so that nothing late ever touches the next one. What was
fetched for it, and data meant for it alone, go with its answer.
"""

import logging
import signal
import time
from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated

from bridge import link as messages
from bridge.driver.blame import Blame
from bridge.driver.discards import is_final
from bridge.driver.ledger import Ledger
from bridge.driver.tracing import TracedTask, Tracing, einfo
from bridge.errors import BridgeError
from bridge.marks import Mark

logger = logging.getLogger(__name__)


class TasksInHand:
    """By serial and by token, with their tracers; `send` takes messages for the worker."""

    def __init__(
        self, app: Any, marks: dict[str, Mark], send: Callable[[Any], None], blame: Blame, ledger: Ledger
    ) -> None:
        self._app, self._send, self._blame, self._ledger = app, send, blame, ledger
        self.tracing = Tracing(app, self.answer, marks)
        self.by_serial: dict[int, TracedTask] = {}
        self.by_token: dict[str, TracedTask] = {}

    def __contains__(self, task: TracedTask) -> bool:
        """Whether it has not been answered."""
        return self.by_serial.get(task.run.serial) is task

    def take(self, run: messages.Run) -> TracedTask:
        """A request of the worker is a task from now on."""
        task = TracedTask(run)
        self.by_serial[run.serial] = self.by_token[task.token] = task
        return task

    def forget(self, serial: int) -> None:
        """A request could not become a task, and is answered as it is."""
        task = self.by_serial.pop(serial, None)
        if task is not None:
            self.by_token.pop(task.token, None)

    def renew(self, task: TracedTask) -> None:
        """It is to run again: a new token, so that nothing late ever touches it; it counts as started no more."""
        self.by_token.pop(task.token, None)
        task.attempt += 1
        task.token = f"{task.run.serial}.{task.attempt}"
        self.by_token[task.token] = task
        if task.accepted:
            task.accepted = False
            self._send(messages.Returned(task.run.serial))

    def accept(self, task: TracedTask) -> None:
        """Its call leaves for an actor."""
        task.accepted = task.announced = True
        self._send(messages.Accepted(task.run.serial, time.monotonic()))

    def tell_soft_limit(self, task: TracedTask) -> None:
        """Its body is interrupted by its soft limit."""
        self._send(messages.SoftLimited(task.run.serial, task.run.soft_limit_s or 0.0))

    # ---- answers

    def refuse(self, task: TracedTask, error: BridgeError) -> None:
        """End a task with an error of ours, through its tracer, so that the result is stored as for any other."""
        if task.tracer is None:
            self.accept(task)
            self.tracing.start(task, refusal=error)
        else:
            self.tracing.resume(task, error)

    def terminate(self, task: TracedTask) -> None:
        """End a task that the worker has given up."""
        self.end(task, einfo(Terminated(signal.SIGTERM)))

    def end(self, task: TracedTask, einfo: ExceptionInfo) -> None:
        """End a task from outside: its tracer stores nothing."""
        self.tracing.stop(task)
        self.answer(task, messages.Ended(task.run.serial, einfo))

    def time_out(self, task: TracedTask) -> None:
        """End a task whose hard limit has passed: its tracer stores nothing."""
        self.tracing.stop(task)
        self.answer(task, messages.TimedOut(task.run.serial, task.run.hard_limit_s or 0.0))

    def give_back(self, task: TracedTask) -> None:
        """To the worker, as what has not started: its tracer stores nothing."""
        self.tracing.stop(task)
        self.answer(task, messages.Flushed(task.run.serial))

    def lose_outcome(self, task: TracedTask, error: Exception) -> None:
        """A late task has run, the worker ends, and the result backend still does not store it."""
        logger.error(
            "%s[%s] has run and its outcome is not stored (%r): its message goes back to the broker, and it runs again",
            task.run.task, task.run.id, error,
        )  # fmt: skip
        self.answer(task, messages.Flushed(task.run.serial))

    def answer(self, task: TracedTask, message: Any) -> None:
        """The worker's answer; the task is in hand no more."""
        self.by_serial.pop(task.run.serial, None)
        self.by_token.pop(task.token, None)
        self._send(message)
        self.discard_refs(task)
        acks_on_timeout = getattr(self._app.tasks.get(task.run.task), "acks_on_timeout", True)
        if task.once and is_final(message, self._blame.standing(task), acks_on_timeout):
            self._ledger.discard(task.once)

    def discard_refs(self, task: TracedTask) -> None:
        """Delete what was fetched for it."""
        if task.refs:
            self._ledger.discard([*task.refs.values()])
            task.refs = {}
