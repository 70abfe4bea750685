"""Large copies between host and GPU through a bounded ring of pinned buffers, on the stream that is current.

Only from pinned memory does a copy run while the host goes on and other streams compute; CuPy's own pool of it rounds
up to powers of two and never shrinks. A buffer is used again only after an event says that its last copy is done.
Never imports CuPy: `device.py` passes it in. Interrupts wait until a copy is complete (`interrupt.py`).
"""

import threading
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

import numpy

#: One buffer; a larger array is copied piece by piece, so that filling one overlaps with the copy out of another.
SLAB_BYTES = 16 << 20
#: Buffers at most, made when they are needed: 128 MiB of host memory that cannot be swapped out.
SLABS = 8
#: Smaller arrays gain nothing: staging costs what it saves.
LEAST_BYTES = 1 << 20
#: Copies out of the device that may be under way while the host takes the one before.
_AHEAD = 2


class _Slab:
    """A pinned buffer and the event after its last copy."""

    def __init__(self, cupy: Any) -> None:
        self.bytes = numpy.frombuffer(cupy.cuda.alloc_pinned_memory(SLAB_BYTES), numpy.uint8, SLAB_BYTES)
        self.copied = cupy.cuda.Event(disable_timing=True)


class PinnedCopies:
    """Copies arrays of `LEAST_BYTES` and more; thread-safe."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._lock = threading.Lock()
        self._slabs: deque[_Slab] = deque()  # the one whose copy began longest ago first

    def to_device(self, array: "numpy.ndarray[Any, Any]") -> Any:
        """A device array with the contents of a C-contiguous `array`, which may be changed as soon as this returns.

        The copy goes on while the host continues; what is launched on the current stream afterwards sees it complete.
        """
        stream = self._cupy.cuda.get_current_stream()
        target = self._cupy.empty(array.shape, array.dtype)
        source, flat = _as_bytes(array), _as_bytes(target)
        with self._lock:
            for start, end in _pieces(array.nbytes):
                slab = self._next_slab()
                piece = slab.bytes[: end - start]
                piece[:] = source[start:end]
                flat[start:end].set(piece, stream=stream)
                slab.copied.record(stream)
        return target

    def fill(self, target: Any, start: int, piece: Any) -> int:
        """Put bytes into a C-contiguous device array, from byte `start` on; where the next ones go.

        One piece at a time: who waits for pieces is not in here, so that an interrupt reaches it.
        """
        stream, flat = self._cupy.cuda.get_current_stream(), _as_bytes(target)
        source = numpy.frombuffer(piece, numpy.uint8)
        for first, last in _pieces(source.nbytes):
            with self._lock:
                slab = self._next_slab()
                staged = slab.bytes[: last - first]
                staged[:] = source[first:last]
                flat[start + first : start + last].set(staged, stream=stream)
                slab.copied.record(stream)
        return start + source.nbytes

    def to_host(self, array: Any) -> "numpy.ndarray[Any, Any]":
        """A NumPy array with the contents of a C-contiguous device array, complete when this returns."""
        stream = self._cupy.cuda.get_current_stream()
        target = numpy.empty(array.shape, array.dtype)
        source, flat = _as_bytes(array), _as_bytes(target)
        under_way: deque[tuple[_Slab, int, int]] = deque()
        with self._lock:
            for start, end in _pieces(array.nbytes):
                if len(under_way) == _AHEAD:
                    _take(under_way.popleft(), flat)
                slab = self._next_slab({id(taken) for taken, _, _ in under_way})
                source[start:end].get(stream=stream, out=slab.bytes[: end - start], blocking=False)
                slab.copied.record(stream)
                under_way.append((slab, start, end))
            while under_way:
                _take(under_way.popleft(), flat)
        return target

    def _next_slab(self, full: Collection[int] = ()) -> _Slab:
        """A buffer that no copy uses any more: a free one, a new one, or the oldest, waited for.

        Args:
            full: ids of buffers whose contents are still wanted; fewer than `SLABS`, and the newest.
        """
        oldest = self._slabs[0] if self._slabs else None
        if oldest and id(oldest) not in full and (len(self._slabs) == SLABS or oldest.copied.done):
            slab = self._slabs.popleft()
            slab.copied.synchronize()  # not `done` in a loop: it is never true again once the context is broken
        else:
            slab = _Slab(self._cupy)
        self._slabs.append(slab)
        return slab


def is_worth_it(array: Any) -> bool:
    """Whether an array is large enough, and of plain numbers that are copied byte by byte."""
    return bool(array.nbytes >= LEAST_BYTES and array.dtype.kind in "biufc" and array.dtype.isnative)


def _pieces(size_bytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size_bytes, SLAB_BYTES):
        yield start, min(start + SLAB_BYTES, size_bytes)


def _as_bytes(array: Any) -> Any:
    return array.reshape(-1).view(numpy.uint8)


def _take(copy: tuple[_Slab, int, int], target: Any) -> None:
    slab, start, end = copy
    slab.copied.synchronize()
    target[start:end] = slab.bytes[: end - start]
