"""In the driver: results of tasks that end in the same turn of the loop are stored with one question to Redis.

Celery asks twice for each, whether there is a SUCCESS already, and to store and publish, while every other task waits.
Here the tracer's own last store of its task waits in its greenlet for the end of the turn. All other stores, and all
that is not Celery's own Redis backend writing plain JSON, go Celery's way, which also takes over whatever Redis does
not do here. No result is held back beyond the turn, unless Redis is away or takes no writes: then all of them wait, for
how long says `unstored.py`, and it is asked again with growing pauses. So do words to chords
(`chord_words.py`). A large result that alone is refused becomes a failure that says so.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import wraps
from threading import Thread
from typing import Any, NamedTuple

import redis
from celery import states
from kombu.utils.encoding import bytes_to_str
from redis.exceptions import ResponseError

from bridge.driver.backends import can_be_grouped, expiry, patience, ping
from bridge.driver.chord_words import ChordWords
from bridge.driver.tracing import SLOW_S, TracedTask, Tracing
from bridge.driver.trouble import Trouble, is_refusal, read_refusal
from bridge.driver.unstored import Backlog, GiveBack, Unstored
from bridge.errors import ResultRefused, as_text

logger = logging.getLogger(__name__)

#: One question stores at most this many results, and no further one when it has this many bytes.
MOST_RESULTS, MOST_BYTES = 200, 1 << 20
#: Of what is stored already, a larger one is read by Celery: reading it would keep Redis from everybody else. And a
#: larger one that is refused is tried as a failure, which is small.
LARGEST_BYTES = 1 << 16
#: Redis cuts the connection over a value above its `proto-max-bulk-len`: what is held to be the cause of so many cuts.
MOST_CUTS = 3
#: After Redis has refused the script, results go Celery's way for this long, in seconds.
REFUSED_PAUSE_S = 60.0
#: States in which the tracer stores a task's outcome.
_OUTCOMES = frozenset({states.SUCCESS, states.FAILURE, states.RETRY})
# For each key: 1 when it is stored and published, 0 when a SUCCESS is there, -1 when Celery has to do it, else why not.
_STORE = """
local largest, answers = tonumber(ARGV[1]), {}

local function is_open(key)
  local current = redis.pcall('GET', key)
  if not current or current == '' then return 1 end
  if type(current) ~= 'string' or #current > largest then return -1 end
  local ok, meta = pcall(cjson.decode, current)
  if not ok or type(meta) ~= 'table' or type(meta.status) ~= 'string' then return -1 end
  return meta.status == 'SUCCESS' and 0 or 1
end

local function store(key, value, expires)
  local stored = expires == '0' and redis.pcall('SET', key, value) or redis.pcall('SETEX', key, expires, value)
  if stored.err then return stored.err end
  return type(redis.pcall('PUBLISH', key, value)) == 'number' and 1 or -1
end

for k, key in ipairs(KEYS) do
  answers[k] = is_open(key)
  if answers[k] == 1 then answers[k] = store(key, ARGV[2 * k], ARGV[2 * k + 1]) end
end
return answers
"""


class _Result(Unstored):
    """A result whose tracer waits for it to be stored."""

    def __init__(self, task: TracedTask, key: bytes, value: str, state: str, expires: int, patience_s: float) -> None:
        super().__init__(task, state, patience_s)
        self.key, self.value, self.expires = key, value, expires
        self.cuts = 0  # connections that ended over it while Redis was there


class _Place(NamedTuple):
    """What waits for one backend."""

    results: Backlog[_Result]
    chords: ChordWords


class GroupedResults:
    """The results of one turn; used on the loop's thread.

    Args:
        tracing: of the tasks.
        give_back: called in place of all else with a task that has run and whose result cannot be stored before the
            worker ends, and the error; its message goes back to the broker.
    """

    def __init__(self, tracing: Tracing, give_back: GiveBack) -> None:
        self._tracing = tracing
        self._give_back = give_back
        self._places: dict[int, _Place] = {}  # by id of the backend
        self._script = redis.Redis().register_script(_STORE)
        self._refused_until = 0.0

    def adopt(self, tasks: Iterable[Any]) -> None:
        """Store results of these tasks in groups, where their backend is one that `can_be_grouped`."""
        for task in tasks:
            try:
                backend = task.backend
            except Exception:
                continue  # Celery says so to whoever uses it
            if id(backend) not in self._places and can_be_grouped(backend):
                common = backend, self._tracing, self._give_back
                self._places[id(backend)] = place = _Place(Backlog(*common), ChordWords(*common))
                backend._store_result = self._grouped(place.results, backend._store_result)
                backend.on_chord_part_return = place.chords.patient(backend.on_chord_part_return)

    def warm_up(self) -> None:
        """Connect, and give Redis the script in the background, as it may not answer: the first task need not."""
        Thread(target=self._connect, name="results", daemon=True).start()

    def _connect(self) -> None:
        for place in self._places.values():
            with suppress(Exception):  # whoever stores a result meets it again, and says so
                place.results.backend.client.script_load(_STORE)

    @property
    def are_waiting(self) -> bool:
        """Whether `flush` has something to do, now or later."""
        return any(place.results.waiting or place.chords.are_waiting for place in self._places.values())

    @property
    def trouble(self) -> str:
        """Why results wait, for people; "" while they are stored."""
        texts = [text for place in self._places.values() for text in (place.results.trouble.text, place.chords.trouble)]
        return next(filter(None, texts), "")

    def due_in_s(self) -> float:
        """Seconds until `flush` has something to do; infinite when nothing waits."""
        return min((each.due_in_s() for place in self._places.values() for each in place), default=math.inf)

    def end(self) -> None:
        """The worker ends: from now on nothing waits for longer than Celery's retry policy says."""
        for place in self._places.values():
            place.results.end()
            place.chords.end()

    def flush(self) -> None:
        """Store what waits and let each tracer go on, unless Redis did not store a moment ago."""
        for place in self._places.values():
            if not place.results.due_in_s():
                self._store_all(place.results)
            place.chords.flush()

    def _store_all(self, backlog: Backlog[_Result]) -> None:
        waiting, backlog.waiting[:] = backlog.waiting[:], []
        for group in groups(waiting):
            started = time.monotonic()
            answers = self._ask(backlog.backend, group)
            if time.monotonic() - started > SLOW_S:
                logger.warning("the result backend held the driver for %.1f s", time.monotonic() - started)
            for result, answer in zip(group, answers, strict=True):
                self._settle(backlog, result, answer)

    def _settle(self, backlog: Backlog[_Result], result: _Result, answer: int | Exception) -> None:
        if isinstance(answer, int):
            if answer >= 0:
                backlog.trouble.end()
            backlog.go_on(result, answer)
        elif self._is_refused_alone(backlog.backend, result, answer):
            backlog.go_on(result, self._refused(result, answer))
        elif backlog.may_wait(result, answer):
            backlog.waiting.append(result)
        else:
            backlog.go_on(result, answer)

    def _is_refused_alone(self, backend: Any, result: _Result, error: Exception) -> bool:
        """Whether Redis takes a failure in place of this large result: then the failure is stored."""
        if len(result.value) <= LARGEST_BYTES or result.state == states.RETRY:
            return False
        if not is_refusal(error):
            if len(result.value) > MOST_BYTES and ping(backend) is None:
                result.cuts += 1
            if result.cuts < MOST_CUTS:
                return False
        refused = self._refused(result, error)
        meta = backend._get_result_meta(backend.prepare_exception(refused), states.FAILURE, None, None)
        value = backend.encode({**meta, "task_id": result.task.run.id})
        # Redis keeps as much memory for the connection as the large value took, for one more like it.
        backend.client.connection_pool.disconnect(inuse_connections=False)
        small = _Result(result.task, result.key, value, states.FAILURE, expiry(backend, states.FAILURE), 0.0)
        return self._ask(backend, [small])[0] in (0, 1)

    @staticmethod
    def _refused(result: _Result, error: Exception) -> ResultRefused:
        cause = f"{type(error).__name__}: {error}"
        if result.cuts >= MOST_CUTS:
            cause += " (Redis cuts the connection over a value above its proto-max-bulk-len)"
        return ResultRefused(result.task.run.task, len(result.value), cause)

    def _grouped(self, backlog: Backlog[_Result], alone: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in the place of a backend's `_store_result`; `alone` is Celery's."""
        backend = backlog.backend

        @wraps(alone)
        def store(
            task_id: Any, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
        ) -> Any:
            def by_celery() -> Any:
                return alone(task_id, result, state, traceback=traceback, request=request, **kwargs)

            task = self._tracing.at_its_outcome(task_id) if state in _OUTCOMES else None
            if task is None:
                return self._without_trouble(backlog.trouble, by_celery, task_id, result, state)
            meta = backend._get_result_meta(result=result, state=state, traceback=traceback, request=request)
            value = backend.encode({**meta, "task_id": bytes_to_str(task_id)})
            if not isinstance(value, str):
                return by_celery()
            policy = patience(backend.retry_policy)
            waiting = _Result(task, backend.get_key_for_task(task_id), value, state, expiry(backend, state), policy)
            self._store(backlog, waiting, by_celery)
            return result

        return store

    def _without_trouble(
        self, trouble: Trouble, store: Callable[[], Any], task_id: Any, result: Any, state: str
    ) -> Any:
        """STARTED, or progress, which the tracer stores: no reason to fail a task for."""
        try:
            return store()
        except Exception as error:
            if state in _OUTCOMES or not is_refusal(error) or not self._tracing.running(task_id):
                raise
            trouble.begin(error)
            logger.info("%s of %s is not stored: %r", state, task_id, error)
            return result

    def _store(self, backlog: Backlog[_Result], result: _Result, by_celery: Callable[[], Any]) -> None:
        """Called in a tracer: return when the result is stored.

        Raises:
            ResultRefused: it is too large, and a failure is stored in its place or can be.
            redis.RedisError: Redis does not store for too long, or never will, as for Celery's own question.
            GreenletExit: the message goes back to the broker.
        """
        try:
            if len(result.value) > backlog.backend._MAX_STR_VALUE_SIZE:
                raise ResultRefused(result.task.run.task, len(result.value), "Redis takes no value above 512 MB")
            is_stored = time.monotonic() >= self._refused_until and self._wait(backlog, result)
            while not is_stored:
                try:
                    by_celery()
                    is_stored = True
                    backlog.trouble.end()
                except Exception as error:
                    if not backlog.may_wait(result, error):
                        raise
                    is_stored = self._wait(backlog, result)
        except ResultRefused:
            self._tracing.has_another_outcome(result.task)
            raise
        except Exception as error:
            if not backlog.is_trouble(error):
                raise
            if result.state == states.RETRY:  # its next run is in the broker already
                logger.warning("RETRY of %s is not stored: %r", result.task.run.id, error)
            elif backlog.holds_message(result):
                backlog.leave(result, error)
            else:
                raise

    @staticmethod
    def _wait(backlog: Backlog[_Result], result: _Result) -> bool:
        """Give the loop back until the turn's results are stored; False if Celery has to store this one."""
        answer = backlog.wait(result)
        if isinstance(answer, Exception):
            raise answer
        return bool(answer >= 0)

    def _ask(self, backend: Any, group: list[_Result]) -> list[int | Exception]:
        """One question; an answer or an error for each result."""
        if time.monotonic() < self._refused_until:
            return [-1] * len(group)
        arguments: list[Any] = [LARGEST_BYTES]
        for result in group:
            arguments += result.value, result.expires
        try:
            answers = self._script([result.key for result in group], arguments, client=backend.client)
        except ResponseError as error:
            if is_refusal(error) and not isinstance(error, redis.exceptions.NoPermissionError):
                return [copy.copy(error) for _ in group]
            # no scripts here, or not now
            logger.warning("Redis refused a script: %s; results are stored one by one for a while", as_text(error))
            self._refused_until = time.monotonic() + REFUSED_PAUSE_S
            return [-1] * len(group)
        except Exception as error:
            return [copy.copy(error) for _ in group]  # each tracer gives it frames of its own
        return [answer if isinstance(answer, int) else _error_of(answer) for answer in answers]


def _error_of(answer: bytes | str) -> int | Exception:
    """What the script says of one result that is not stored; what is no refusal is left to Celery."""
    error = read_refusal(answer)
    return error if is_refusal(error) else -1


def groups(results: list[_Result]) -> Iterable[list[_Result]]:
    """Results as they are stored together."""
    group: list[_Result] = []
    size = 0
    for result in results:
        if group and (len(group) == MOST_RESULTS or size + len(result.value) > MOST_BYTES):
            yield group
            group, size = [], 0
        group.append(result)
        size += len(result.value)
    if group:
        yield group
