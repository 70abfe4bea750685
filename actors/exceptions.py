"""Exceptions across processes: also those that Python's pickle can write and not read.

An exception whose ``__init__`` takes other arguments than it hands to ``super().__init__`` cannot be rebuilt by calling
its class. Celery delivers class and ``args`` of such a one, so these travel here, with what of its attributes can.
"""

import io
import pickle
import traceback
from collections.abc import Callable
from typing import Any


def dumps(value: Any, reduce: Callable[[Any], Any] | None = None) -> bytes:
    """Pickle a value; exceptions in it that would not survive are taken apart and rebuilt without ``__init__``.

    Args:
        value: anything.
        reduce: asked about whatever is not in an exception, as `pickle.Pickler.reducer_override`.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, 5)
    pickler.reduce = reduce
    pickler.dump(value)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    reduce: Callable[[Any], Any] | None

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, BaseException):
            return self.reduce(value) if self.reduce else NotImplemented
        if _survives(value):
            return (pickle.loads, (pickle.dumps(value, 5),)) if self.reduce else NotImplemented
        state = {name: each for name, each in vars(value).items() if _survives(each)}
        return _rebuild, (type(value), tuple(each if _survives(each) else repr(each) for each in value.args), state)


def _survives(value: Any) -> bool:
    try:
        rebuilt = pickle.loads(pickle.dumps(value, 5))
    except Exception:
        return False
    return type(rebuilt) is type(value)


def _rebuild(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls, *args)
    error.args = args
    vars(error).update(state)
    return error


def clear_frames(error: BaseException) -> None:
    """Let go of the arrays of the frames an error has come through; their lines stay, for the traceback."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and all(cause is not each for each in seen):
        traceback.clear_frames(cause.__traceback__)
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
