"""Pickles whose large parts lie beside them, so that nobody copies these in order to look at the rest.

A frame is: how many parts, the size of each, the pickle, the parts. `Part` marks what is to lie beside.
"""

import os
import pickle
import struct
from typing import Any

_COUNT, _SIZE = struct.Struct("!I"), struct.Struct("!Q")
#: How multiprocessing's `Connection` writes the length of a message: four bytes, or -1 and eight.
_LENGTH, _LONG = struct.Struct("!i"), struct.Struct("!Q")


class Part:
    """Bytes, or a view of some, that are never copied into a pickle made by `dump`."""

    __slots__ = ("view",)

    def __init__(self, view: Any) -> None:
        self.view = view

    def __reduce__(self) -> Any:
        return Part, (pickle.PickleBuffer(self.view),)

    def __len__(self) -> int:
        return memoryview(self.view).nbytes


def dump(message: Any) -> list[Any]:
    """A frame in pieces: its head, then its parts as they lie in memory. Whatever pickle raises passes through."""
    data, parts = dump_apart(message)
    sizes = b"".join(_SIZE.pack(len(part)) for part in parts)
    return [_COUNT.pack(len(parts)) + sizes + data, *parts]


def dump_apart(message: Any) -> tuple[bytes, list[memoryview]]:
    """A pickle, and its parts for `pickle.loads(..., buffers=...)`."""
    parts: list[memoryview] = []
    return pickle.dumps(message, 5, buffer_callback=lambda part: parts.append(part.raw())), parts


def load(frame: memoryview) -> Any:
    """What `dump` was given; its parts are views of the frame. Whatever pickle raises passes through."""
    (count,) = _COUNT.unpack_from(frame)
    if not count:
        return pickle.loads(frame[_COUNT.size :])
    start = _COUNT.size + count * _SIZE.size
    sizes = [_SIZE.unpack_from(frame, _COUNT.size + n * _SIZE.size)[0] for n in range(count)]
    end = len(frame) - sum(sizes)
    parts, place = [], end
    for size in sizes:
        parts.append(frame[place : place + size])
        place += size
    return pickle.loads(frame[start:end], buffers=parts)


def length_of(pieces: list[Any]) -> bytes:
    """What goes before a frame on a pipe."""
    total = sum(map(len, pieces))
    return _LENGTH.pack(total) if total < 1 << 31 else _LENGTH.pack(-1) + _LONG.pack(total)


def receive(fd: int) -> Any:
    """The next message from a pipe that blocks.

    Raises:
        EOFError: the other side is gone.
    """
    (length,) = _LENGTH.unpack(_read(fd, _LENGTH.size))
    if length < 0:
        (length,) = _LONG.unpack(_read(fd, _LONG.size))
    return load(memoryview(_read(fd, length)))


def _read(fd: int, size: int) -> bytearray:
    data = bytearray(size)
    left = memoryview(data)
    while left:
        count = os.readv(fd, [left])
        if not count:
            raise EOFError
        left = left[count:]
    return data
