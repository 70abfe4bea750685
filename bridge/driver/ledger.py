"""In the driver: crashes that outlive it, and dead letters; Redis is asked on a thread, so that nobody waits for it.

Only a task that has crashed, or that the broker delivers again, costs a question. What Redis does not answer is as if
there were no Redis: crashes count in this driver alone, and no task waits longer than for the question's deadline. Dead
letters, and word of tasks that are blamed no more, wait here until Redis takes them, as many as fit.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from actors.data.shared_redis import shared_redis, uses_redis
from actors.data.stores import Ref, Stores
from bridge.driver.dead_letters import Bounds, Crash, DeadLetters, Letter
from bridge.driver.discards import Discards
from bridge.errors import as_text
from bridge.object_store import use_ray
from bridge.settings import Settings

logger = logging.getLogger(__name__)

Then = Callable[[Any], None]

#: After Redis has not answered, crashes are counted here alone for this long, in seconds.
AWAY_PAUSE_S = 5.0
#: What waits for Redis is offered again after so many seconds.
AGAIN_S = 1.0
#: Dead letters that Redis has not taken have this many bytes together at most, in memory, or BRIDGE_DEAD_LETTERS_BYTES.
WAITING_BYTES = 1 << 26
#: Tasks that Redis has not been told yet to blame no more, at most.
WAITING_ACQUITTALS = 10_000
#: What is raised where Redis is away, full or in a failover: it may take the same later.
_PASSES = (RedisError, OSError, OperationalError)


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
        use_ray()
        self._discards = Discards(Stores(app, settings.stores).delete)
        self._away_until = 0.0
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._looks: list[tuple[str, Then]] = []  # redelivered tasks nobody has asked about yet
        self._letters: list[Letter] = []  # that Redis has not taken yet, the oldest first
        self._acquitted: dict[str, None] = {}  # ids whose crashes Redis has not forgotten yet, the oldest first
        self._is_refused = False  # it is known that Redis is not told of those
        self._again_at = 0.0  # when it is asked to take either
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.is_shared = uses_redis(app)

    # Each is told `then(answer)` on the loop's thread; None where Redis has not answered.

    def add(self, task_id: str, crashes: dict[str, Crash], then: Then) -> None:
        """Note a task's crashes by execution; the answer is all that are known of it."""

        def add(store: DeadLetters) -> Any:
            if task_id in self._acquitted:  # by an earlier run: what Redis still knows does not count
                store.forget_crashes(task_id)
                del self._acquitted[task_id]
            return store.add_crashes(task_id, crashes)

        self._ask(f"crashes of {task_id}", add, then)

    def look(self, task_id: str, then: Then) -> None:
        """The crashes known of a task; those of one turn are asked for together."""
        with self._lock:
            self._looks.append((task_id, then))
            is_first = len(self._looks) == 1
        if is_first:
            self._do(self._look)

    def forget(self, task_id: str) -> None:
        """The task's body has ended by itself: nobody blames it any more, now or as soon as Redis is told."""
        self._do(lambda: self._forget(task_id))

    def bury(self, letter: Letter, then: Then) -> None:
        """Keep a dead letter, now or as soon as Redis takes it; nobody waits for that."""
        self._do(lambda: self._bury(letter, then))

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
            waits = self._letters or self._acquitted
            with suppress(queue.Empty):
                self._jobs.get(timeout=max(0.0, self._again_at - time.monotonic()) if waits else None)()
            if time.monotonic() >= self._again_at:
                self._keep_waiting()
                self._forget_waiting()

    def _ask(self, what: str, question: Callable[[DeadLetters], Any], then: Then) -> None:
        self._do(lambda: self._notify(Answered(then, self._try(what, question))))

    def _look(self) -> None:
        with self._lock:
            looks, self._looks = self._looks, []
        found = self._try("crashes", lambda store: store.crashes(task_id for task_id, _ in looks))
        for (task_id, then), crashes in zip(looks, found or [None] * len(looks), strict=True):
            self._notify(Answered(then, None if task_id in self._acquitted else crashes))

    def _try(self, what: str, question: Callable[[DeadLetters], Any]) -> Any:
        if time.monotonic() < self._away_until:
            return None
        try:
            return self._answer(question)
        except Exception as error:
            self._away_until = time.monotonic() + AWAY_PAUSE_S
            logger.error("Redis did not take or tell %s, so this driver alone knows: %s", what, as_text(error))
            return None

    def _answer(self, question: Callable[[DeadLetters], Any]) -> Any:
        if self._store is None:
            self._store = dead_letters(self._app, self._bounds, self._namespace)
        return question(self._store) if self._store is not None else None

    # ---- what waits

    def _forget(self, task_id: str) -> None:
        self._acquitted[task_id] = None
        if len(self._acquitted) > WAITING_ACQUITTALS:
            del self._acquitted[next(iter(self._acquitted))]
        if time.monotonic() >= self._again_at:
            self._forget_waiting()

    def _forget_waiting(self) -> None:
        while self._acquitted:
            task_id = next(iter(self._acquitted))
            try:
                self._answer(lambda store, task_id=task_id: store.forget_crashes(task_id))  # type: ignore[misc]
            except _PASSES as error:
                self._again_at = time.monotonic() + AGAIN_S
                if not self._is_refused:  # said once, for it is tried every second
                    self._is_refused = True
                    logger.warning(
                        "Redis was not told that %s is blamed no more, it will be: %s", task_id, as_text(error)
                    )
                return
            except Exception as error:  # or the others would wait behind it for ever
                logger.error("Redis goes on blaming %s: %s", task_id, as_text(error))
            self._is_refused = False
            del self._acquitted[task_id]

    def _bury(self, letter: Letter, then: Then) -> None:
        self._letters = [each for each in self._letters if each.id != letter.id]  # this one takes its place
        if not self._is_settled(letter):
            self._letters.append(letter)
            self._drop_oldest()
        self._notify(Answered(then, None))

    def _keep_waiting(self) -> None:
        """Have Redis take what waits; it is left alone again at the first that it does not take."""
        while self._letters and self._is_settled(self._letters[0]):
            self._letters.pop(0)

    def _is_settled(self, letter: Letter) -> bool:
        """Have Redis take a letter; False where it does not and may later."""
        has_waited = letter in self._letters
        try:
            self._answer(lambda store: store.keep(letter))
        except _PASSES as error:
            self._again_at = time.monotonic() + AGAIN_S
            if not has_waited:
                logger.error("Redis did not take the dead letter of %s, it waits here: %s", letter.id, as_text(error))
            return False
        except Exception as error:  # or the others would wait behind it for ever
            logger.error("the dead letter of %s is lost: %s", letter.id, as_text(error))
        else:
            if has_waited:
                logger.warning("Redis has taken the dead letter of %s now", letter.id)
        return True

    def _drop_oldest(self) -> None:
        """Memory is bounded as Redis is."""
        most_bytes = min(WAITING_BYTES, self._bounds.letters_bytes)
        while len(self._letters) > self._bounds.letters or sum(map(_size, self._letters)) > most_bytes:
            logger.error("the dead letter of %s is lost: too many wait for Redis", self._letters.pop(0).id)


def _size(letter: Letter) -> int:
    return len(letter.body) + len(letter.logs)


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
