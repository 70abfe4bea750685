"""In the driver: which executors' deaths a task is charged with, here and elsewhere, and what is kept of it at the end.

What the journal says stands in an outcome; what follows from it is in `verdicts.py`. Here it is decided whose
crashes are counted over drivers (`ledger.py`); each `then` is called once, on the loop's thread, maybe at once.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from bridge.driver.dead_letters import Crash, last_words, letter_of
from bridge.driver.ledger import Ledger
from bridge.driver.tracing import TracedTask
from bridge.driver.verdicts import Standing
from bridge.errors import TaskPoisoned
from bridge.marks import Mark
from bridge.settings import Settings

logger = logging.getLogger(__name__)


class Blame:
    """The crashes of a driver's tasks."""

    def __init__(
        self, app: Any, settings: Settings, marks: dict[str, Mark], ledger: Ledger, driver: str, worker: str
    ) -> None:
        self._app, self._settings, self._marks = app, settings, marks
        self._driver, self._worker = driver, worker
        self.ledger = ledger

    def standing(self, task: TracedTask) -> Standing:
        """What a task allows, and what has happened to it."""
        options = self._app.tasks[task.run.task]
        return Standing(
            acks_late=bool(options.acks_late),
            reject_on_worker_lost=options.reject_on_worker_lost,
            retry_on_worker_lost=bool(options.retry_on_worker_lost),
            max_crashes=self._marks[task.run.task].gpu.max_crashes or self._settings.max_crashes,
            crashes=len(task.crashes),
            losses=task.losses,
            cancelled=task.cancelled,
        )

    def recall(self, task: TracedTask, then: Callable[[], None]) -> None:
        """Find out what a task has done to executors elsewhere."""

        def take(crashes: dict[str, Crash] | None) -> None:
            task.crashes = crashes or {}
            task.alone = bool(crashes)
            then()

        if self._is_shared(task):
            self.ledger.look(str(task.run.id), take)
        else:
            then()

    def charge(self, task: TracedTask, slot: int, node: str, how: str, then: Callable[[], None]) -> None:
        """Note that its executor died with a task."""

        def take(crashes: dict[str, Crash] | None) -> None:
            task.crashes.update(crashes or {})
            then()

        task.crashes[f"{self._driver}.{task.token}"] = Crash(time.time(), how, self._worker, slot, node)
        if self._is_shared(task) and not task.cancelled:
            self.ledger.add(str(task.run.id), task.crashes.copy(), take)
        else:
            then()

    def acquit(self, task: TracedTask) -> None:
        """Its body has ended by itself: a later message of the same id begins at no crash."""
        if task.crashes and self._is_shared(task):
            self.ledger.forget(str(task.run.id))

    def bury(self, task: TracedTask, then: Callable[[TaskPoisoned], None]) -> None:
        """It has ended too many executors: keep its message; `then` takes the error it fails with."""
        error = TaskPoisoned(task.run.task, len(task.crashes), max(task.crashes.values()).how)
        if not self.ledger.is_shared:
            then(error)
            return
        try:
            words, serializer = last_words(task.told), self._app.conf.task_serializer
            letter = letter_of(task.run, str(error), task.crashes.values(), words, serializer)
        except Exception:  # an odd message; it ends as any other
            logger.exception("%s[%s] leaves no dead letter", task.run.task, task.run.id)
            then(error)
        else:
            self.ledger.bury(letter, lambda _: then(error))

    def _is_shared(self, task: TracedTask) -> bool:
        """Whether its crashes are kept in Redis: it may run again, and Celery does not count its retries."""
        standing = self.standing(task)
        return self.ledger.is_shared and standing.may_run_twice and not standing.retry_on_worker_lost
