"""What the driver knows of Celery's result backends: which it may store for, and what their settings mean."""

import math
from typing import Any

from celery import states
from celery.backends.redis import RedisBackend

#: What of Celery's backend is done in results.py, and must therefore be its own.
_DONE_HERE = ("_store_result", "_get_task_meta_for", "_set_with_state", "set", "_set", "get", "decode_result", "decode")


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


def ping(backend: Any) -> Exception | None:
    """Whether Redis answers: None, or why not."""
    try:
        backend.client.ping()
    except Exception as error:
        return error
    return None
