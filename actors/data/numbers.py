"""Lists of numbers in JSON text become arrays, without a Python object for each number."""

import math
from typing import Any, Literal

import numpy
import simdjson

#: What numbers and white space are made of; without them a list of numbers is brackets and commas.
_OF_NUMBERS = b"0123456789+-.eE \t\r\n"
#: A parser keeps what it has needed for the longest text, many times its length: up to here one is kept.
_KEPT_BYTES = 8 << 20
_parser = simdjson.Parser()
_BUFFERS: tuple[tuple[Literal["i", "d"], Any], ...] = (("i", numpy.int64), ("d", numpy.float64))


def array_of(text: Any, as_floats: bool) -> "numpy.ndarray[Any, Any] | None":
    """The array that `numpy.asarray` makes of a JSON list of numbers, or of lists of one length each.

    Args:
        text: valid JSON, bytes or a view of some.
        as_floats: whether integers become float64 at once.

    Returns:
        int64 or float64, writable; None for anything else, or what has to be looked at more closely: no numbers, rows
        of different lengths, nothing at all, integers beyond 64 bits.
    """
    data = bytes(text)
    parser = _parser if len(data) <= _KEPT_BYTES else simdjson.Parser()
    try:
        parsed = parser.parse(data)
    except (ValueError, RuntimeError, RecursionError):
        return None
    if not isinstance(parsed, simdjson.Array):
        return None
    shape = _shape(parsed, data)
    if shape is None:
        return None
    for kind, dtype in _BUFFERS[as_floats:]:
        try:
            array = numpy.frombuffer(parsed.as_buffer(of_type=kind), dtype)
        except TypeError:  # a float among them, or no number
            continue
        except (ValueError, RuntimeError):
            return None
        fits = shape == (-1,) or array.size == math.prod(shape)  # a row of one number looks like one of none
        return array.reshape(shape) if fits else None
    return None


def _shape(parsed: Any, data: bytes) -> tuple[int, ...] | None:
    """By the first element of each level, if all rows are alike; None if not, or if it is empty."""
    shape: list[int] = []
    level = parsed
    while isinstance(level, simdjson.Array):
        if not len(level):
            return None
        shape.append(len(level))
        level = level[0]
    if len(shape) == 1:
        return (-1,) if data.count(b"[") == 1 else None  # simdjson counts no further than 2**24
    size = 0
    for length in reversed(shape):
        size = length * (size + 1) + 1  # each with a comma or, the last one, a bracket
        if size > len(data):  # a long row, then short ones: what is wanted is never longer than what there is
            return None
    wanted = b""
    for length in reversed(shape):
        wanted = b"[" + b",".join([wanted] * length) + b"]"
    return tuple(shape) if data.translate(None, _OF_NUMBERS) == wanted else None
