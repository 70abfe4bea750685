"""The Redis that all workers of an app share: of its result backend, else of its broker, else none.

What is kept there beside Celery's own keys are crash counts and dead letters (`bridge/driver/dead_letters.py`) and
large data (`stores.py`). Whoever asks waits a bounded time, where that is possible: never in a tracer or on the
driver's loop.
"""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import redis
from celery.backends.redis import RedisBackend
from kombu.utils.encoding import bytes_to_str
from kombu.utils.url import maybe_sanitize_url
from redis.backoff import NoBackoff
from redis.retry import Retry

#: How long one connect, one write or one answer may take, in seconds.
ANSWER_S = 2.0
#: A connection that went stale is made anew once; all that is asked may be asked twice without harm.
RETRIES = 1
#: What its connections have beside what the app says: nothing.
NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


class SharedRedis(NamedTuple):
    """A client with a deadline and what the app's keys begin with."""

    client: Any
    prefix: str  # the user's global key prefix, "" for none
    where: str  # its address without a password


def uses_redis(app: Any) -> bool:
    """Whether there is one; asks nobody."""
    return isinstance(_backend(app), RedisBackend) or _is_redis(app.connection_for_write())


def shared_redis(app: Any, answer_s: float = ANSWER_S, options: Mapping[str, Any] = NO_OPTIONS) -> SharedRedis | None:
    """Its client, or None where neither result backend nor broker is Redis.

    Args:
        app: the Celery app.
        answer_s: how long one connect, one write or one answer may take.
        options: of redis-py's connections, beside the app's.

    Raises:
        Exception: the broker is Redis and does not answer; kombu asks it when a channel is made.
    """
    backend = _backend(app)
    if isinstance(backend, RedisBackend):
        shared = _of_backend(backend, answer_s, options)
    else:
        connection = app.connection_for_write()
        if not _is_redis(connection):
            return None
        shared = _of_broker(connection, answer_s, options)
    shared.client.set_retry(Retry(NoBackoff(), RETRIES))
    return shared


def _backend(app: Any) -> Any:
    try:
        return app.backend
    except Exception:
        return None  # Celery says so to whoever stores a result


def _is_redis(connection: Any) -> bool:
    return bool(connection.transport.driver_type == "redis")


def _of_backend(backend: RedisBackend, answer_s: float, options: Mapping[str, Any]) -> SharedRedis:
    parameters = copy.copy(backend.connparams)
    for name in ("socket_timeout", "socket_connect_timeout"):
        if name in parameters:  # a Unix socket takes no time to connect, and no such parameter
            parameters[name] = answer_s
    parameters |= options
    prefix = bytes_to_str(backend.task_keyprefix).removesuffix(RedisBackend.task_keyprefix)
    return SharedRedis(backend._create_client(**parameters), prefix, maybe_sanitize_url(backend.as_uri()))


def _of_broker(connection: Any, answer_s: float, options: Mapping[str, Any]) -> SharedRedis:
    connection.transport_options |= {
        "socket_timeout": answer_s, "socket_connect_timeout": answer_s, "max_retries": RETRIES, "interval_start": 0,
    }  # fmt: skip
    channel = connection.default_channel
    channel.pool.connection_kwargs |= options
    return SharedRedis(redis.Redis(connection_pool=channel.pool), channel.global_keyprefix, connection.as_uri())
