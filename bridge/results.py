"""In the driver: results of tasks that end in the same turn of the loop are stored with one question to Redis.

Celery asks twice for each, whether there is a SUCCESS already, and to store and publish, while every other task waits.
Here the tracer's own last store of its task waits in its greenlet for the end of the turn. All other stores, and all
that is not Celery's own Redis backend writing plain JSON, go Celery's way, which also takes over whatever Redis does
not do here. No result is held back beyond the turn, unless Redis is away: then all of them wait, without holding the
loop, for as long as Celery's retry policy of the backend says, and are asked about again until it is back.
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
from celery.backends.redis import RedisBackend
from kombu.utils.encoding import bytes_to_str
from redis.exceptions import ResponseError

from bridge.errors import as_text
from bridge.tracing import SLOW_S, TracedTask, Tracing

logger = logging.getLogger(__name__)

#: One question stores at most this many results, and no further one when it has this many bytes.
MOST_RESULTS, MOST_BYTES = 200, 1 << 20
#: Of what is stored already, a larger one is read by Celery: reading it would keep Redis from everybody else.
LARGEST_BYTES = 1 << 16
#: After Redis has refused the script, results go Celery's way for this long, in seconds.
REFUSED_PAUSE_S = 60.0
#: Redis that is away is asked again after this long, in seconds.
AWAY_PAUSE_S = 0.5
#: States in which the tracer stores a task's outcome.
_OUTCOMES = frozenset({states.SUCCESS, states.FAILURE, states.RETRY})
#: What of Celery's backend is done here, and must therefore be its own.
_DONE_HERE = ("_store_result", "_get_task_meta_for", "_set_with_state", "set", "_set", "get", "decode_result", "decode")

# For each key: 1 when it is stored and published, 0 when a SUCCESS is there, -1 when Celery has to do it.
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
  return not stored.err and type(redis.pcall('PUBLISH', key, value)) == 'number'
end

for k, key in ipairs(KEYS) do
  answers[k] = is_open(key)
  if answers[k] == 1 and not store(key, ARGV[2 * k], ARGV[2 * k + 1]) then answers[k] = -1 end
end
return answers
"""


class _Result(NamedTuple):
    """A result whose tracer waits for it to be stored."""

    task: TracedTask
    key: bytes
    value: str
    expires: int
    waits_until: float  # for a Redis that is away


class GroupedResults:
    """The results of one turn; used on the loop's thread."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self._waiting: dict[int, tuple[Any, list[_Result]]] = {}  # by id of the backend
        self._script = redis.Redis().register_script(_STORE)
        self._refused_until = 0.0
        self._away_until = 0.0

    def adopt(self, tasks: Iterable[Any]) -> None:
        """Store results of these tasks in groups, where their backend is one that `can_be_grouped`."""
        for task in tasks:
            try:
                backend = task.backend
            except Exception:
                continue  # Celery says so to whoever uses it
            if id(backend) not in self._waiting and can_be_grouped(backend):
                self._waiting[id(backend)] = backend, []
                backend._store_result = self._grouped(backend, backend._store_result)

    def warm_up(self) -> None:
        """Connect, and give Redis the script in the background, as it may not answer: the first task need not."""
        Thread(target=self._connect, name="results", daemon=True).start()

    def _connect(self) -> None:
        for backend, _ in self._waiting.values():
            with suppress(Exception):  # whoever stores a result meets it again, and says so
                backend.client.script_load(_STORE)

    @property
    def are_waiting(self) -> bool:
        """Whether `flush` has something to do, now or later."""
        return any(results for _, results in self._waiting.values())

    def due_in_s(self) -> float:
        """Seconds until `flush` has something to do; infinite when nothing waits."""
        return max(0.0, self._away_until - time.monotonic()) if self.are_waiting else math.inf

    def flush(self) -> None:
        """Store what waits and let each tracer go on, unless Redis was away a moment ago."""
        if time.monotonic() < self._away_until:
            return
        for backend, results in self._waiting.values():
            waiting, results[:] = results[:], []
            for group in groups(waiting):
                started = time.monotonic()
                answers = self._ask(backend, group)
                if time.monotonic() - started > SLOW_S:
                    logger.warning("the result backend held the driver for %.1f s", time.monotonic() - started)
                for result, answer in zip(group, answers, strict=True):
                    if self._may_wait(backend, result, answer):
                        results.append(result)
                    else:
                        self._tracing.go_on(result.task, answer)

    def _may_wait(self, backend: Any, result: _Result, answer: Any) -> bool:
        """Redis is away, and Celery's policy leaves time: the body has done its work."""
        now = time.monotonic()
        if not isinstance(answer, backend.connection_errors) or now >= result.waits_until:
            return False
        if now >= self._away_until:
            logger.warning("the result backend is away: %s; results wait for it", as_text(answer))
            self._away_until = now + AWAY_PAUSE_S
        return True

    def _grouped(self, backend: Any, alone: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in the place of a backend's `_store_result`; `alone` is Celery's."""
        _, results = self._waiting[id(backend)]

        @wraps(alone)
        def store(
            task_id: Any, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
        ) -> Any:
            task = None
            if state in _OUTCOMES and time.monotonic() >= self._refused_until:
                task = self._tracing.at_its_outcome(task_id)
            if task is not None:
                meta = backend._get_result_meta(result=result, state=state, traceback=traceback, request=request)
                value = backend.encode({**meta, "task_id": bytes_to_str(task_id)})
                if isinstance(value, str) and len(value) <= backend._MAX_STR_VALUE_SIZE:
                    until = time.monotonic() + patience(backend.retry_policy)
                    waiting = _Result(task, backend.get_key_for_task(task_id), value, expiry(backend, state), until)
                    if self._wait(results, waiting):
                        return result
            return alone(task_id, result, state, traceback=traceback, request=request, **kwargs)

        return store

    def _wait(self, results: list[_Result], result: _Result) -> bool:
        """Give the loop back until the turn's results are stored; False if Celery has to store this one.

        Raises:
            redis.RedisError: Redis is away for too long, or refuses, as for Celery's own first question.
        """
        results.append(result)
        try:
            answer = self._tracing.wait()
        finally:
            if result in results:  # the task is ended from outside meanwhile
                results.remove(result)
        if isinstance(answer, Exception):
            raise answer
        return bool(answer >= 0)

    def _ask(self, backend: Any, group: list[_Result]) -> list[Any]:
        """One question; an answer or an error for each result."""
        arguments: list[Any] = [LARGEST_BYTES]
        for result in group:
            arguments += result.value, result.expires
        try:
            answers: list[Any] = self._script([result.key for result in group], arguments, client=backend.client)
        except ResponseError as error:  # no scripts here, or not now
            logger.warning("Redis refused a script: %s; results are stored one by one for a while", as_text(error))
            self._refused_until = time.monotonic() + REFUSED_PAUSE_S
            return [-1] * len(group)
        except Exception as error:
            return [copy.copy(error) for _ in group]  # each tracer gives it frames of its own
        return answers


def can_be_grouped(backend: Any) -> bool:
    """Whether a backend is Celery's own for Redis, in what is done here, and writes JSON that Redis can read."""
    return (
        isinstance(backend, RedisBackend)
        and all(getattr(type(backend), name) is getattr(RedisBackend, name) for name in _DONE_HERE)
        and not vars(backend).keys() & set(_DONE_HERE)
        and backend.serializer == "json"
        and not backend.compression
    )


def patience(policy: dict[str, Any]) -> float:
    """Seconds for which a retry policy of Celery goes on."""
    tries = policy.get("max_retries")
    if tries is None:
        pauses = math.inf
    else:
        first, step, longest = (policy.get(f"interval_{name}", 1.0) for name in ("start", "step", "max"))
        pauses = sum(min(first + step * n, longest) for n in range(tries))
    return float(min(pauses, policy.get("timeout") or math.inf))


def expiry(backend: Any, state: str) -> int:
    """Seconds until a result of that state expires; 0 for never."""
    expires = backend.failure_expires if state == states.FAILURE else backend.expires
    return int((backend.expires if expires is None else expires) or 0)


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
