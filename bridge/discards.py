"""In the driver: data whose task has ended are deleted on a thread, for a store may hang, and nobody waits for it.

Deleting is tidying up: data in Redis expire, and who owns another place sets a life cycle. So nothing piles up here.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from bridge.errors import DataLost, DataRefused, as_text

logger = logging.getLogger(__name__)

#: References that wait to be deleted, at most.
MOST_WAITING = 10_000
#: After a store has not answered nothing is deleted for this long, in seconds.
PAUSE_S = 5.0


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
