"""In the driver: crashes that outlive it, and dead letters; Redis is asked on a thread, so that nobody waits for it.

Only a task that has crashed, or that the broker delivers again, costs a question. What Redis does not answer is as if
there were no Redis: crashes count in this driver alone, and no task waits longer than for the question's deadline.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from actors.shared_redis import shared_redis, uses_redis
from actors.stores import Ref, Stores
from bridge.dead_letters import Bounds, Crash, DeadLetters, Letter
from bridge.discards import Discards
from bridge.errors import as_text
from bridge.settings import Settings

logger = logging.getLogger(__name__)

Then = Callable[[Any], None]

#: After Redis has not answered, crashes are counted here alone for this long, in seconds.
AWAY_PAUSE_S = 5.0


class Answered(NamedTuple):
    """For the driver's inbox: go on with what was asked for."""

    then: Then
    value: Any  # None: Redis does not know, or did not answer


class Ledger:
    """Asks on a thread of its own, which starts with the first question; `notify` takes each `Answered`."""

    def __init__(self, app: Any, settings: Settings, namespace: str, notify: Callable[[Answered], None]) -> None:
        self._app, self._namespace, self._notify = app, namespace, notify
        self._bounds = bounds_of(settings)
        self._store: DeadLetters | None = None
        self._discards = Discards(Stores(app, settings.stores).delete)
        self._away_until = 0.0
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._looks: list[tuple[str, Then]] = []  # redelivered tasks nobody has asked about yet
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.is_shared = uses_redis(app)

    # Each is told `then(answer)` on the loop's thread; None where Redis has not answered.

    def add(self, task_id: str, crashes: dict[str, Crash], then: Then) -> None:
        """Note a task's crashes by execution; the answer is all that are known of it."""
        self._ask(f"crashes of {task_id}", lambda store: store.add_crashes(task_id, crashes), then)

    def look(self, task_id: str, then: Then) -> None:
        """The crashes known of a task; those of one turn are asked for together."""
        with self._lock:
            self._looks.append((task_id, then))
            is_first = len(self._looks) == 1
        if is_first:
            self._do(self._look)

    def forget(self, task_id: str) -> None:
        """The task's body has ended by itself: nobody blames it any more."""
        self._ask(f"the end of {task_id}", lambda store: store.forget_crashes(task_id), lambda _: None)

    def bury(self, letter: Letter, then: Then) -> None:
        """Keep a dead letter; asked also when Redis has just been away."""
        self._ask(f"the dead letter of {letter.id}", lambda store: store.keep(letter), then, always=True)

    def discard(self, refs: Sequence[Ref]) -> None:
        """Delete data by reference whose task has ended; see `Discards`."""
        self._discards.add(refs)

    # ---- on the thread

    def _do(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="ledger", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            self._jobs.get()()

    def _ask(self, what: str, question: Callable[[DeadLetters], Any], then: Then, always: bool = False) -> None:
        self._do(lambda: self._notify(Answered(then, self._try(what, question, always))))

    def _look(self) -> None:
        with self._lock:
            looks, self._looks = self._looks, []
        found = self._try("crashes", lambda store: store.crashes(task_id for task_id, _ in looks))
        for (_, then), crashes in zip(looks, found or [None] * len(looks), strict=True):
            self._notify(Answered(then, crashes))

    def _try(self, what: str, question: Callable[[DeadLetters], Any], always: bool = False) -> Any:
        if not always and time.monotonic() < self._away_until:
            return None
        try:
            if self._store is None:
                self._store = dead_letters(self._app, self._bounds, self._namespace)
            return question(self._store) if self._store is not None else None
        except Exception as error:
            self._away_until = time.monotonic() + AWAY_PAUSE_S
            logger.error("Redis did not take or tell %s, so this driver alone knows: %s", what, as_text(error))
            return None


def bounds_of(settings: Settings) -> Bounds:
    """How much is kept, as the settings say."""
    s = settings
    return Bounds(s.dead_letters, s.dead_letters_bytes, s.dead_letters_s, s.crash_memory_s)


def dead_letters(app: Any, bounds: Bounds, namespace: str) -> DeadLetters | None:
    """The app's, or None without Redis.

    Raises:
        Exception: Redis does not answer.
    """
    shared = shared_redis(app)
    return DeadLetters(shared.client, shared.prefix, namespace, bounds) if shared is not None else None
