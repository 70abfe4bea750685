"""Shapes of arrays: which ones a task takes, and how they are told."""

import math
from collections.abc import Iterable, Sequence
from typing import Any


def fit(shape: tuple[int, ...], wanted: Sequence[Any] | None) -> bool:
    """Whether a shape is one that is wanted.

    Args:
        shape: of an array.
        wanted: for each dimension a length, ``"*"``, a name or ``slice(least, most)``; None for any shape.
    """
    if wanted is None:
        return True
    if len(shape) != len(wanted):
        return False
    names: dict[str, int] = {}
    for length, each in zip(shape, wanted, strict=True):
        if isinstance(each, int):
            fits = length == each
        elif isinstance(each, slice):
            fits = (each.start or 0) <= length <= (math.inf if each.stop is None else each.stop)
        else:
            fits = each == "*" or names.setdefault(each, length) == length
        if not fits:
            return False
    return True


def is_dimension(wanted: Any) -> bool:
    """Whether it means something in `fit`, and some array may fit it."""
    if isinstance(wanted, slice):
        least, most = wanted.start or 0, wanted.stop
        return wanted.step is None and _is_length(least) and (most is None or (_is_length(most) and least <= most))
    return isinstance(wanted, str) or _is_length(wanted)


def _is_length(wanted: Any) -> bool:
    return type(wanted) is int and wanted >= 0


def shown(shape: Iterable[Any]) -> str:
    """As Python writes a tuple."""
    parts = [str(each) for each in shape]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def dimension(wanted: Any) -> str:
    """One dimension that is wanted."""
    if not isinstance(wanted, slice):
        return str(wanted)
    return f"{wanted.start or 0}..{'' if wanted.stop is None else wanted.stop}"


def json_schema(wanted: Sequence[Any] | None) -> dict[str, Any]:
    """JSON Schema of the lists that have such a shape, as far as that can say it: not that lengths are equal."""
    if wanted is None:
        return {"type": "array"}
    schema: dict[str, Any] = {"type": "number"}
    for each in reversed(wanted):
        schema = {"type": "array", "items": schema}
        least, most = (each.start, each.stop) if isinstance(each, slice) else (each, each)
        schema |= {"minItems": least} if isinstance(least, int) else {}
        schema |= {"maxItems": most} if isinstance(most, int) else {}
    return schema
