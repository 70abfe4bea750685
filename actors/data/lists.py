"""Lists of numbers become arrays: never more memory than their numbers take, never another number than was sent."""

import itertools
from typing import Any

import numpy

#: What arrays in messages may hold: numbers and truth values. Objects would run code when they are read.
KINDS = "biufc"
#: How deep NumPy looks into lists.
_DEEPEST = 64
_NO_NUMBER = "a list with an element that is no number"


def array_of_numbers(values: Any, wanted: "numpy.dtype[Any] | None") -> "numpy.ndarray[Any, Any]":
    """What NumPy makes of a list, or the array that was made of one already.

    Args:
        values: lists or tuples, nested; or an array.
        wanted: what it is for; None takes any numbers.

    Returns:
        One whose dtype may be `cast` to `wanted`.

    Raises:
        ValueError: no numbers, numbers of another kind, or rows of different lengths; the text says what was found.
    """
    is_list = not isinstance(values, numpy.ndarray)
    try:
        array = _array(values, _looked_at(values) if is_list else None)
    except MemoryError:
        raise ValueError("a list for which there is no memory") from None
    if array.dtype.kind not in KINDS:
        raise ValueError(_NO_NUMBER)
    if is_list and wanted is not None and (wanted.kind, wanted.itemsize, array.dtype.kind) == ("u", 8, "f"):
        array = _unsigned(values, array)
    if wanted is not None and array.size and not _takes(wanted, array.dtype):
        raise ValueError(f"a list of {array.dtype.name}")
    return array


def cast(array: "numpy.ndarray[Any, Any]", wanted: "numpy.dtype[Any]") -> "numpy.ndarray[Any, Any]":
    """The same numbers as `wanted`; floats lose precision.

    Raises:
        ValueError: a number beyond the bounds of `wanted`.
    """
    if array.dtype == wanted:
        return array
    if wanted.kind in "iu" and array.size and array.dtype.kind != "b":
        bounds = numpy.iinfo(wanted)
        if array.min() < bounds.min or array.max() > bounds.max:
            raise ValueError(f"a number beyond {bounds.min} to {bounds.max}")
    with numpy.errstate(over="ignore"):
        made = array.astype(wanted)
    if wanted.kind in "fc" and (numpy.isinf(made) & numpy.isfinite(array)).any():
        raise ValueError(f"a number that is too large for {wanted.name}")
    return made


def _array(values: Any, dtype: Any) -> "numpy.ndarray[Any, Any]":
    try:
        return numpy.asarray(values, dtype)
    except ValueError:
        raise ValueError("a list whose rows have different lengths") from None


def _looked_at(values: Any) -> Any:
    """The dtype of a list if that is told cheaply, else None for NumPy to find it.

    Raises:
        ValueError: it, or a list in it, holds text: NumPy would give each element the room of the longest.
    """
    level, first = values, values
    for _ in range(_DEEPEST):
        first = first[0] if first else None
        if not isinstance(first, list | tuple):
            break
        level = itertools.chain.from_iterable(level)
    try:
        total = sum(level)  # at a fifth of what the array costs; text among numbers is a TypeError
    except Exception:  # also of numbers that are no plain ones, and of other shapes: look at each
        if _has_text(values):
            raise ValueError(_NO_NUMBER) from None
        return None
    return numpy.float64 if type(total) is float else None  # which saves NumPy as much time as this took


def _has_text(values: Any) -> bool:
    """Whether there is some at any depth."""
    level = values
    for _ in range(_DEEPEST):
        if any(issubclass(each, str | bytes) for each in set(map(type, level))):
            return True
        level = list(itertools.chain.from_iterable(each for each in level if isinstance(each, list | tuple)))
    return False


def _unsigned(values: Any, floats: "numpy.ndarray[Any, Any]") -> "numpy.ndarray[Any, Any]":
    """Integers of which some are beyond int64, where NumPy has made floats of all; else `floats`."""
    objects = numpy.asarray(values, object)
    if not all(issubclass(each, int) for each in set(map(type, objects.flat))):
        return floats
    try:
        return objects.astype(numpy.uint64)
    except OverflowError:
        return floats


def _takes(wanted: "numpy.dtype[Any]", found: "numpy.dtype[Any]") -> bool:
    """Whether numbers of one dtype may become another; `cast` looks at the numbers themselves."""
    return found.kind in "biu" if wanted.kind in "iu" else numpy.can_cast(found, wanted, "same_kind")
