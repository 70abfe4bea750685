"""Data whose task has ended are deleted by the driver on a thread, for a store may hang, and nobody waits for it.

Deleting is tidying up: data in Redis expire, and who owns another place sets a life cycle. So nothing piles up here.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from billiard.exceptions import Terminated, WorkerLostError
from celery.exceptions import Ignore, Reject, Retry

from actors.data.arrays import ArrayRef, as_form
from actors.data.blobs import BlobRef
from bridge.driver.verdicts import Standing
from bridge.errors import DataLost, DataRefused, TaskPoisoned, as_text
from bridge.link import Done, Ended, Flushed, TimedOut

logger = logging.getLogger(__name__)

#: References that wait to be deleted, at most.
MOST_WAITING = 10_000
#: Objects of a revoked task's arguments looked at for references, at most: the worker's loop does it.
MOST_OBJECTS = 10_000
#: After a store has not answered nothing is deleted for this long, in seconds.
PAUSE_S = 5.0


def is_final(message: Done | TimedOut | Ended | Flushed, task: Standing, acks_on_timeout: bool) -> bool:
    """Whether no other run of a task follows what the driver answers for it.

    Not after `Terminated`, which looks the same when a worker that shuts down gives a task back: of a revoked one the
    worker says so. Nor of a poisoned one, which may be replayed.
    """
    match message:
        case Done(_, (failed, value, _)):
            return not (failed and isinstance(_error(value), Retry | Ignore | Reject | TaskPoisoned))
        case TimedOut():
            return acks_on_timeout or not task.acks_late
        case Ended(_, einfo):
            error = _error(einfo)
            comes_back = task.retry_on_worker_lost or (task.acks_late and task.reject_on_worker_lost)
            return not isinstance(error, Terminated) and not (isinstance(error, WorkerLostError) and comes_back)
    return False


def _error(einfo: Any) -> Any:
    """An exception that billiard has wrapped."""
    return getattr(einfo.exception, "exc", einfo.exception)


def once_in(value: Any) -> tuple[Any, ...]:
    """References to data meant for one task, anywhere in lists, tuples and dicts of decoded arguments."""
    found, level, left = [], [value], MOST_OBJECTS
    while level and left > 0:
        left -= len(level)
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict) and each.get("kind") in ("ref", "blob") and each.get("once") is True:
                with suppress(ValueError):
                    found.append(as_form(each))
            elif isinstance(each, ArrayRef | BlobRef):
                found += [each] if each.once else []
            elif type(each) is dict:
                below += each.values()
            elif type(each) in (list, tuple):
                below += each
        level = below
    return tuple(found)


class Discards:
    """Calls `delete` with each reference, one after the other; the thread starts with the first."""

    def __init__(self, delete: Callable[[Any], None]) -> None:
        self._delete = delete
        self._waiting: queue.Queue[Any] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._not_before = 0.0

    def add(self, refs: Iterable[Any]) -> None:
        """Delete these when their turn comes; never blocks."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="discards", daemon=True)
            self._thread.start()
        for ref in refs:
            try:
                self._waiting.put_nowait(ref)
            except queue.Full:
                return

    def _work(self) -> None:
        while True:
            ref = self._waiting.get()
            if time.monotonic() < self._not_before:
                continue
            try:
                self._delete(ref)
            except (DataRefused, DataLost) as error:  # of this one; the store is well
                logger.warning("data of a task that has ended are not deleted: %s", as_text(error))
            except Exception as error:
                self._not_before = time.monotonic() + PAUSE_S
                logger.warning("data of tasks that have ended are left to expire: %s", as_text(error))
