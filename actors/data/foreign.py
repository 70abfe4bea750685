"""Arrays of other libraries than NumPy, told by what they speak: none of these libraries is imported here."""

from abc import ABC
from typing import Any

import numpy
from celery.exceptions import SoftTimeLimitExceeded

from actors.data.lists import KINDS


def is_device_array(value: Any) -> bool:
    """Whether a value is a CuPy array or scalar, told without importing CuPy."""
    return _is_cupys(type(value))


def _is_cupys(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "cupy"


class CupyArray(ABC):  # noqa: B024
    """For `isinstance`: what `is_device_array` says, for registries of types."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return _is_cupys(other)


def module_of(array: Any) -> Any:
    """The library whose functions take an array: NumPy or, for CuPy's, CuPy."""
    from actors.executor.device import array_module

    return array_module() if is_device_array(array) else numpy


def adopted(value: Any) -> Any:
    """An array of NumPy or CuPy as it is, another library's as one of NumPy's or, on a GPU, CuPy's; not copied.

    Raises:
        ValueError: it is no array, or its library does not let it be read here; the text says what was found.
    """
    if isinstance(value, numpy.ndarray | numpy.generic) or is_device_array(value):
        return value
    from actors.executor.device import array_module

    name = type(value).__name__
    try:
        if hasattr(value, "__cuda_array_interface__"):
            return array_module().asarray(value)
        if hasattr(value, "__dlpack__"):
            return numpy.from_dlpack(value)
        if hasattr(value, "__array_interface__"):
            return numpy.asarray(value)
    except SoftTimeLimitExceeded:
        raise
    except Exception as error:  # each library has its own
        raise ValueError(f"{name}, which cannot be read here: {error}") from None
    raise ValueError(name)


def on_host(array: Any) -> "numpy.ndarray[Any, Any]":
    """The numbers of an array of any library in the host's memory, on their way into a message or a store.

    Args:
        array: NumPy's, CuPy's, one that speaks DLPack, or what `numpy.asarray` makes one of.

    Raises:
        ValueError: no array of plain numbers; the text says what to send.
        Exception: what its library says, such as that it has to be copied to the host first.
    """
    if is_device_array(array):
        array = array.get()
    elif hasattr(array, "__dlpack__") and not hasattr(array, "__array__"):
        array = numpy.from_dlpack(array)
    if isinstance(array, numpy.ma.MaskedArray):
        raise ValueError("a masked array would lose its mask: send array.filled(value), or data and mask apart")
    array = numpy.asarray(array)
    if array.dtype.kind not in KINDS:
        raise ValueError(f"only arrays of numbers travel, not of {array.dtype}; send a list: array.tolist()")
    return array  # type: ignore[no-any-return]
