"""From what a body returned or raised to an outcome that any process can read.

Arrays and scalars of NumPy and CuPy become plain Python values, because unchanged producers read JSON. Exceptions are
pickled only when they can be rebuilt; their text and traceback always travel.
"""

import pickle
import traceback
from types import CodeType
from typing import Any

import numpy
from billiard.common import human_status
from celery.exceptions import Ignore, Reject
from pydantic import BaseModel

from actors.contract import Failed, FailureKind
from actors.data.arrays import Form
from actors.data.foreign import is_device_array
from actors.exceptions import dumps
from actors.executor.device import to_host
from actors.executor.interrupt import Cancelled
from actors.wishes import ReplaceWanted, RetryWanted

#: Characters of a traceback and of a message that travel with a failure.
TEXT_LIMIT = 16_384


def plain(value: Any, keep_models: bool) -> Any:
    """Replace arrays, array scalars and (unless `keep_models`) pydantic models inside `value` by plain values."""
    if type(value) in (str, int, float, bool, bytes) or value is None:
        return value
    if isinstance(value, dict):
        return {plain(key, keep_models): plain(item, keep_models) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(item, keep_models) for item in value)
    if isinstance(value, list | set | frozenset):
        return type(value)([plain(item, keep_models) for item in value])
    if is_device_array(value):
        value = to_host(value)
    if isinstance(value, numpy.ndarray | numpy.generic):
        return value.tolist()
    if isinstance(value, Form):
        return value  # kombu's type registry knows them
    if isinstance(value, BaseModel) and not keep_models:
        return value.model_dump(mode="json")
    return value


def failure(token: str, error: BaseException, entry: CodeType, out_of_memory: bool, run_s: float) -> Failed:
    """Describe an exception that left a body; `entry` is the frame below which the body's own frames begin."""
    kind = _kind(error, out_of_memory)
    # MemoryError must not be rebuilt: it would end the Celery worker; the driver raises GpuOutOfMemory instead.
    pickled = None if kind is FailureKind.OUT_OF_MEMORY else _pickled(error)
    return Failed(
        token, kind, _qualified_name(error), _text(error), _traceback_below(error, entry)[-TEXT_LIMIT:], pickled, run_s
    )


def exit_code(error: BaseException | None) -> int:
    """What a process ends with that this exception has left."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return int(error is not None)


def _kind(error: BaseException, out_of_memory: bool) -> FailureKind:
    if isinstance(error, Cancelled):
        return FailureKind.CANCELLED
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return FailureKind.EXITED
    if isinstance(error, RetryWanted | ReplaceWanted):
        return FailureKind.RETRY
    return FailureKind.OUT_OF_MEMORY if out_of_memory else FailureKind.RAISED


def _pickled(error: BaseException) -> bytes | None:
    """The exception, if it survives a round trip; what would end the driver or its greenlet does not travel."""
    if isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit) or type(error).__name__ == "GreenletExit":
        return None
    try:
        pickled = dumps(error)
        rebuilt = pickle.loads(pickled)
    except Exception:
        return None
    return pickled if isinstance(error, Ignore | Reject) or type(rebuilt) is type(error) else None


def _text(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return str(human_status(error.code if isinstance(error.code, int) else int(error.code is not None)))
    if isinstance(error, KeyboardInterrupt):
        return "KeyboardInterrupt"
    try:
        return str(error)[:TEXT_LIMIT]
    except Exception:
        return "(its __str__ failed)"


def _qualified_name(error: BaseException) -> str:
    cls = type(error)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _traceback_below(error: BaseException, entry: CodeType) -> str:
    trace = below = error.__traceback__
    while below is not None:
        if below.tb_frame.f_code is entry:
            trace = below.tb_next
        below = below.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, trace))
    except Exception:
        return "".join(traceback.format_tb(trace))
