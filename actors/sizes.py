"""Bytes: how people write and read them, and how many the arrays in a value take. Knows no device and no limits."""

from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

#: How far down a value is searched for arrays: a model's layers hold blocks that hold weights.
_DEPTH = 8
#: Objects looked at in one value, at most; what is so large and no array is no table for a GPU.
_OBJECTS = 100_000

_BYTES = TypeAdapter(ByteSize)


def read_bytes(text: str) -> int:
    """Bytes written as people write them: ``"8GiB"``, ``"1000"``.

    Raises:
        ValueError: neither.
    """
    try:
        return int(_BYTES.validate_python(text))
    except ValidationError:
        raise ValueError(f"{text!r} is no size: write bytes such as 8GiB, or a share such as 50%") from None


def read_limit(text: str, whole_bytes: int) -> int | None:
    """A limit in bytes, or a share such as ``"50%"`` of `whole_bytes`; None where a share of 0 (unknown) is asked for.

    Raises:
        ValueError: neither bytes nor a share above 0 and up to 100 %.
    """
    if not text.endswith("%"):
        return read_bytes(text)
    share = float(text[:-1]) if text[:-1].replace(".", "", 1).isdigit() else 0.0
    if not 0 < share <= 100:
        raise ValueError(f"{text!r} is no share: write 1% to 100%, or bytes such as 8GiB")
    return int(whole_bytes * share / 100) or None


def readable(size_bytes: int) -> str:
    """Bytes for a person: ``2.0 GiB``."""
    return ByteSize(size_bytes).human_readable(separator=" ")


def array_bytes(value: Any) -> int:
    """Bytes of the arrays inside `value`, in lists, tuples, sets, dicts and attributes; each buffer once.

    An array is what says ``nbytes``: NumPy's, CuPy's and most others'. A view counts as the buffer it keeps alive.
    """
    seen: set[int] = set()
    level, total = [value], 0
    for _ in range(_DEPTH):
        below: list[Any] = []
        for each in map(_buffer, level):
            if id(each) in seen or len(seen) > _OBJECTS:
                continue
            seen.add(id(each))
            size = _size(each)
            total += size
            if not size:
                below += _parts(each)
        level = below
    return total


def _buffer(value: Any) -> Any:
    while _size(value) and _size(getattr(value, "base", None)):
        value = value.base
    return value


def _size(value: Any) -> int:
    size = None if isinstance(value, type) else getattr(value, "nbytes", None)
    return size if isinstance(size, int) else 0


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, type | ModuleType | FunctionType):
        return ()
    return getattr(value, "__dict__", {}).values()
