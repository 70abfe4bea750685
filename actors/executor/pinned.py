"""Large copies between host and GPU through a bounded ring of pinned buffers, on the stream that is current.

Only from pinned memory does a copy run while the host goes on and other streams compute; CuPy's own pool of it rounds
up to powers of two and never shrinks. A buffer is used again only after an event says that its last copy is done.
One core moves some 10 GB/s between ordinary memory and a buffer, PCIe 5 takes 55: threads share each large array.
Never imports CuPy: `device.py` passes it in. Interrupts wait until a copy is complete (`interrupt.py`).
"""

import gc
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any

import numpy

_Move = Callable[["_Slab", int, int], None]
_Job = Callable[[], None]

#: One buffer, in bytes: while it is on its way others are filled. Less, and PCIe waits for the next too often.
SLAB_BYTES = 2 << 20
#: Buffers at most, made when they are needed: 128 MiB of host memory that cannot be swapped out.
SLABS = 64
#: Smaller arrays gain nothing: staging costs what it saves.
LEAST_BYTES = 1 << 20
#: That move the bytes of one array, the caller's among them: as many as keep PCIe 5 busy, or half of the cores.
THREADS = max(2, min(8, len(os.sched_getaffinity(0)) // 2))
#: CUDA's handle for the default stream of whatever thread asks (CUPY_CUDA_PER_THREAD_DEFAULT_STREAM=1).
_PER_THREAD = 2


class _Slab:
    """A pinned buffer and the event after its last copy."""

    def __init__(self, cupy: Any) -> None:
        self.bytes = numpy.frombuffer(cupy.cuda.alloc_pinned_memory(SLAB_BYTES), numpy.uint8, SLAB_BYTES)
        self.address = self.bytes.ctypes.data
        self.copied = cupy.cuda.Event(disable_timing=True)


class PinnedCopies:
    """Copies arrays of `LEAST_BYTES` and more; thread-safe.

    Args:
        cupy: the module.
        threads: default `THREADS`.
    """

    def __init__(self, cupy: Any, threads: int | None = None) -> None:
        self._cupy, self._runtime = cupy, cupy.cuda.runtime
        self._lock = threading.Lock()  # one array at a time
        self._ring = threading.Lock()  # over the two below
        self._slabs: deque[_Slab] = deque()  # that nobody fills or empties; whose copy began longest ago comes first
        self._made = 0  # slabs, also those in somebody's hands
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._helpers = (threads or THREADS) - 1
        for _ in range(self._helpers):  # now: an interrupt reaches who waits for a thread to start
            threading.Thread(target=_help, args=(self._jobs,), name="pinned", daemon=True).start()
        os.register_at_fork(after_in_child=self._leave)

    def _leave(self) -> None:
        """What a body forks has none of the threads."""
        self._helpers = 0

    def to_device(self, array: "numpy.ndarray[Any, Any]") -> Any:
        """A device array with the contents of a C-contiguous `array`, which may be changed as soon as this returns.

        The copy goes on while the host continues; what is launched on the current stream afterwards sees it complete.
        """
        target = self._cupy.empty(array.shape, array.dtype)
        self._send(array.reshape(-1).view(numpy.uint8), target.data.ptr)
        return target

    def fill(self, target: Any, start: int, piece: Any) -> int:
        """Put bytes into a C-contiguous device array, from byte `start` on; where the next ones go.

        One piece at a time: who waits for pieces is not in here, so that an interrupt reaches it.

        Raises:
            ValueError: there is no room for so many.
        """
        source = numpy.frombuffer(piece, numpy.uint8)
        end = start + source.nbytes
        if end > target.nbytes:
            raise ValueError(f"the array has {target.nbytes} bytes, and more came")
        self._send(source, target.data.ptr + start)
        return end

    def to_host(self, array: Any) -> "numpy.ndarray[Any, Any]":
        """A NumPy array with the contents of a C-contiguous device array, complete when this returns."""
        stream, source = self._cupy.cuda.get_current_stream(), array.data.ptr
        target = numpy.empty(array.shape, array.dtype)
        flat, kind = target.reshape(-1).view(numpy.uint8), self._runtime.memcpyDeviceToHost

        def move(slab: _Slab, start: int, end: int) -> None:
            self._runtime.memcpyAsync(slab.address, source + start, end - start, kind, stream.ptr)
            slab.copied.record(stream)
            slab.copied.synchronize()
            flat[start:end] = slab.bytes[: end - start]

        self._share(target.nbytes, move, stream)
        return target

    def _send(self, source: "numpy.ndarray[Any, Any]", target: int) -> None:
        stream, kind = self._cupy.cuda.get_current_stream(), self._runtime.memcpyHostToDevice

        def move(slab: _Slab, start: int, end: int) -> None:
            slab.bytes[: end - start] = source[start:end]
            self._runtime.memcpyAsync(target + start, slab.address, end - start, kind, stream.ptr)
            slab.copied.record(stream)

        self._share(source.nbytes, move, stream)

    def _share(self, size_bytes: int, move: _Move, stream: Any) -> None:
        """Have pieces moved, by as many threads as there is work for; none is at work when this returns or raises."""
        left, ends = deque(_pieces(size_bytes)), SimpleQueue[BaseException | None]()
        with self._lock, _no_collection():
            helpers = min(self._helpers, len(left) - 1)
            if stream.ptr == _PER_THREAD:  # each would copy on a stream of its own, in no order with the caller's
                helpers = 0
            for _ in range(helpers):
                self._jobs.put(lambda: ends.put(self._work(left, move)))
            errors = [self._work(left, move)]
            with suppress(Empty):
                while True:
                    self._jobs.get_nowait()()  # that nobody has begun; there is nothing left to do
            errors += [ends.get() for _ in range(helpers)]  # not a future: an interrupt reaches who waits for one
        for error in errors:
            if error is not None:
                raise error

    def _work(self, left: "deque[tuple[int, int]]", move: _Move) -> BaseException | None:
        """Move pieces while there are any; the error that has ended it."""
        try:
            while left:
                try:
                    start, end = left.popleft()
                except IndexError:  # another thread has taken the last
                    break
                slab = self._take()
                try:
                    move(slab, start, end)
                finally:
                    with self._ring:
                        self._slabs.append(slab)
        except BaseException as error:
            left.clear()  # nobody needs the rest
            return error
        return None

    def _take(self) -> _Slab:
        """A buffer that no copy uses any more: a free one, a new one, or the oldest, waited for."""
        with self._ring:
            if not self._slabs or (self._made < SLABS and not self._slabs[0].copied.done):
                slab = _Slab(self._cupy)
                self._made += 1
                return slab
            slab = self._slabs.popleft()
        slab.copied.synchronize()  # not `done` in a loop: it is never true again once the context is broken
        return slab


@contextmanager
def _no_collection() -> Iterator[None]:
    """No destructor runs in a helper: it might wait for what the caller, who waits for the helper, holds."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _help(jobs: "SimpleQueue[_Job]") -> None:
    while True:
        jobs.get()()


def is_worth_it(array: Any) -> bool:
    """Whether an array is large enough, and of plain numbers that are copied byte by byte."""
    return bool(array.nbytes >= LEAST_BYTES and array.dtype.kind in "biufc" and array.dtype.isnative)


def _pieces(size_bytes: int) -> list[tuple[int, int]]:
    """Where each begins and ends; of what needs several the first are small, or PCIe would wait for them to be full."""
    least = SLAB_BYTES // 8 if size_bytes > SLAB_BYTES else SLAB_BYTES
    pieces, start = [], 0
    while start < size_bytes:
        end = min(size_bytes, start + min(SLAB_BYTES, max(least, start // 4 // 4096 * 4096)))
        pieces.append((start, end))
        start = end
    return pieces
