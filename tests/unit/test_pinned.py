"""Pinned copies with a CuPy the test holds: pieces, order, and that no buffer is used while a copy still uses it.

The fake copies only when its event is waited for or asked about, as late as a GPU may.
"""

import ctypes
import gc
import threading
import time
import types

import numpy
import pytest

from actors.executor import device, pinned
from actors.executor.device import CpuDevice, to_device, to_host
from actors.executor.pinned import PinnedCopies, is_worth_it


class Event:
    """Done when the copies before it are, which happen as late as possible."""

    def __init__(self, fake):
        self.fake, self.until = fake, 0

    def record(self, stream):
        assert stream is self.fake.stream
        self.until = len(self.fake.copies)

    def synchronize(self):
        self.fake.waits += self.until > self.fake.copied
        self.fake.run(self.until)

    @property
    def done(self):
        return self.until <= self.fake.copied


class Array:
    """A device array: where it is and what a person would ask for."""

    def __init__(self, memory):
        self.memory, self.data = memory, types.SimpleNamespace(ptr=memory.ctypes.data)
        self.shape, self.dtype, self.nbytes = memory.shape, memory.dtype, memory.nbytes

    def set(self, source):
        self.memory[...] = source


class FakeCupy:
    def __init__(self):
        self.copies, self.copied, self.waits, self.slabs = [], 0, 0, 0
        self.stream = types.SimpleNamespace(ptr=17, synchronize=lambda: self.run(len(self.copies)))
        self.lock = threading.RLock()
        self.threads, self.fails_at, self.pool = set(), None, []
        self.cuda = types.SimpleNamespace(
            get_current_stream=lambda: self.stream,
            Event=lambda disable_timing: Event(self),
            alloc_pinned_memory=self.allocate,
            runtime=types.SimpleNamespace(memcpyAsync=self.queue, memcpyHostToDevice=1, memcpyDeviceToHost=2),
        )

    def allocate(self, size):
        self.slabs += 1
        return bytearray(size)

    def empty(self, shape, dtype):
        self.pool.append(numpy.zeros(shape, dtype))  # memory that a copy still writes is not given back
        return Array(self.pool[-1])

    def queue(self, target, source, size, kind, stream):
        assert stream == self.stream.ptr and kind in (1, 2)
        with self.lock:
            self.threads.add(threading.get_ident())
            if len(self.copies) == self.fails_at:
                raise RuntimeError("the context is broken")
            self.copies.append((target, source, size))

    def run(self, until):
        with self.lock:
            for copy in self.copies[self.copied : until]:
                ctypes.memmove(*copy)
            self.copied = max(self.copied, until)


@pytest.fixture
def fake(monkeypatch):
    """One thread, three buffers of 100 bytes; what needs several begins with pieces of 12."""
    monkeypatch.setattr(pinned, "SLAB_BYTES", 100)
    monkeypatch.setattr(pinned, "SLABS", 3)
    monkeypatch.setattr(pinned, "THREADS", 1)
    return FakeCupy()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [0, 1, 24, 25, 26, 50, 75, 76, 1000])
def test_what_goes_in_comes_out(fake, monkeypatch, size, threads):
    """In floats of 4 bytes: nothing, less than a buffer, one, several, more than the ring has, and a rest."""
    monkeypatch.setattr(pinned, "THREADS", threads)
    copies, values = PinnedCopies(fake), numpy.arange(size, dtype="float32")
    there = copies.to_device(values)
    fake.run(len(fake.copies))
    assert there.memory.tolist() == values.tolist()
    assert copies.to_host(there).tolist() == values.tolist()
    assert fake.slabs <= 3


def test_several_threads_share_one_array(fake, monkeypatch):
    """Each waits until all of them have a piece."""
    monkeypatch.setattr(pinned, "THREADS", 3)
    meeting, queue = threading.Barrier(3, timeout=30), fake.queue

    def meets(*copy):
        if threading.get_ident() not in fake.threads:
            meeting.wait()
        queue(*copy)

    fake.cuda.runtime.memcpyAsync = meets
    PinnedCopies(fake).to_device(numpy.zeros(1000, "uint8"))
    assert len(fake.threads) == 3


def test_a_destructor_runs_in_no_helper(fake, monkeypatch):
    """It may want a lock that the caller holds, who waits for the helper."""

    class Garbage:
        def __init__(self):
            self.me = self

        def __del__(self):
            collected_in.add(threading.get_ident())

    def litters(*copy):
        if threading.get_ident() not in fake.threads:
            meeting.wait()
        for _ in range(100):
            Garbage()
        queue(*copy)

    monkeypatch.setattr(pinned, "THREADS", 3)
    copies, queue, collected_in, meeting = PinnedCopies(fake), fake.queue, set(), threading.Barrier(3, timeout=30)
    fake.cuda.runtime.memcpyAsync = litters
    before = gc.get_threshold()
    gc.set_threshold(10)
    try:
        copies.to_device(numpy.zeros(1000, "uint8"))
        assert len(fake.threads) == 3 and collected_in <= {threading.get_ident()} and gc.isenabled()
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert collected_in


def test_work_that_no_helper_begins_is_the_callers(fake, monkeypatch):
    monkeypatch.setattr(pinned, "THREADS", 3)
    copies, busy = PinnedCopies(fake), threading.Event()
    for _ in range(2):
        copies._jobs.put(busy.wait)  # as long as it takes
    while not copies._jobs.empty():
        time.sleep(0.001)
    copies.to_device(numpy.zeros(1000, "uint8"))
    assert fake.threads == {threading.get_ident()}
    busy.set()


def test_a_stream_that_is_each_threads_own_is_left_to_the_caller(fake, monkeypatch):
    monkeypatch.setattr(pinned, "THREADS", 3)
    fake.stream.ptr = 2
    copies = PinnedCopies(fake)
    assert copies.to_host(copies.to_device(numpy.ones(1000, "uint8"))).sum() == 1000
    assert fake.threads == {threading.get_ident()}


def test_an_array_of_one_piece_is_the_callers_own(fake, monkeypatch):
    monkeypatch.setattr(pinned, "THREADS", 3)
    PinnedCopies(fake).to_device(numpy.zeros(100, "uint8"))
    assert fake.threads == {threading.get_ident()} and len(fake.copies) == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_of_any_thread_is_raised_when_none_is_at_work_any_more(fake, monkeypatch, threads):
    monkeypatch.setattr(pinned, "THREADS", threads)
    copies, fake.fails_at = PinnedCopies(fake), 4
    with pytest.raises(RuntimeError, match="broken"):
        copies.to_device(numpy.zeros(10_000, "uint8"))
    assert len(copies._slabs) == fake.slabs, "each has been put back"
    assert len(fake.copies) <= 4, "the others have left the rest alone"
    fake.fails_at = None
    assert copies.to_host(copies.to_device(numpy.ones(500, "uint8"))).sum() == 500


@pytest.mark.parametrize("size", [0, 1, 2 << 20, (2 << 20) + 1, 64 << 20, (300 << 20) + 5])
def test_pieces_are_all_there_is_and_no_larger_than_a_buffer(size):
    pieces = pinned._pieces(size)
    assert [start for start, _ in pieces] == [0, *(end for _, end in pieces)][: len(pieces)]
    assert sum(end - start for start, end in pieces) == size
    assert all(0 < end - start <= pinned.SLAB_BYTES for start, end in pieces)


def test_the_first_of_many_pieces_are_small():
    """PCIe has something to do while the threads fill the next ones; most of them are whole buffers."""
    lengths = [end - start for start, end in pinned._pieces(64 << 20)]
    assert lengths[:4] == [pinned.SLAB_BYTES // 8] * 4
    assert lengths.count(pinned.SLAB_BYTES) > len(lengths) / 2


def test_more_bytes_than_an_array_has_are_refused(fake):
    """They would be written over those of another array."""
    copies, target = PinnedCopies(fake), fake.empty((10,), "uint8")
    assert copies.fill(target, 0, bytes(6)) == 6
    with pytest.raises(ValueError, match="10 bytes"):
        copies.fill(target, 6, bytes(5))
    assert len(fake.copies) == 1


def test_what_a_body_forks_waits_for_no_thread(fake, monkeypatch):
    monkeypatch.setattr(pinned, "THREADS", 3)
    copies = PinnedCopies(fake)
    copies._leave()
    copies.to_device(numpy.zeros(1000, "uint8"))
    assert fake.threads == {threading.get_ident()}


def test_shape_and_type_are_kept(fake):
    copies = PinnedCopies(fake)
    values = numpy.arange(60, dtype="complex64").reshape(3, 4, 5)
    back = copies.to_host(copies.to_device(values))
    assert back.shape == (3, 4, 5) and back.dtype == values.dtype
    assert (back == values).all(), "although nobody has waited in between: both are in the order of the stream"


def test_a_copy_to_the_device_is_not_waited_for_while_buffers_are_free(fake):
    copies = PinnedCopies(fake)
    for _ in range(3):
        copies.to_device(numpy.zeros(100, "uint8"))
    assert (fake.waits, fake.copied, fake.slabs) == (0, 0, 3)
    copies.to_device(numpy.zeros(1, "uint8"))
    assert (fake.waits, fake.copied, fake.slabs) == (1, 1, 3), "only for the oldest"


def test_the_source_may_change_at_once(fake):
    copies, values = PinnedCopies(fake), numpy.ones(250, "uint8")
    there = copies.to_device(values)
    values[:] = 7
    fake.run(len(fake.copies))
    assert set(there.memory.tolist()) == {1}


def test_a_free_buffer_is_used_before_a_new_one_is_made(fake):
    copies = PinnedCopies(fake)
    for _ in range(5):
        copies.to_device(numpy.zeros(10, "uint8"))
        fake.run(len(fake.copies))
    assert fake.slabs == 1


@pytest.mark.parametrize(
    ("array", "worth"),
    [
        (numpy.zeros(1 << 20, "uint8"), True),
        (numpy.zeros((1 << 20) - 1, "uint8"), False),
        (numpy.zeros(1 << 20, ">f4"), False),
        (numpy.zeros(1 << 20, object), False),
        (numpy.zeros((512, 512), "float32"), True),
    ],
)
def test_large_arrays_of_plain_numbers_are_worth_it(array, worth):
    assert is_worth_it(array) is worth


# ---- on NumPy


def test_without_a_gpu_arrays_stay_what_they_are(monkeypatch):
    monkeypatch.setattr(device, "_current", CpuDevice(""))
    large = numpy.ones(1 << 18)
    assert to_device(large) is large and to_host(large) is large
    assert to_device([[1, 2], [3, 4]]).tolist() == [[1, 2], [3, 4]]
    assert to_host(2.5) == 2.5


# ---- an executor's start


@pytest.fixture
def starting(fake, monkeypatch):
    monkeypatch.setattr(pinned, "THREADS", 3)
    monkeypatch.setattr(device, "SLAB_BYTES", pinned.SLAB_BYTES)
    gpu = device.CudaDevice.__new__(device.CudaDevice)
    gpu._cupy, gpu._copies = fake, PinnedCopies(fake)
    return gpu


def test_copies_are_tried_before_an_executor_is_ready(fake, starting):
    starting._check_copies()
    assert sum(size for _, _, size in fake.copies) == 2 * 4 * pinned.SLAB_BYTES


@pytest.mark.parametrize(
    ("place", "error"), [(0, "has changed"), (None, "copy to the GPU and back failed: RuntimeErr")]
)
def test_a_gpu_that_copies_wrongly_is_not_used(fake, starting, place, error):
    queue = fake.queue

    def wrong(target, *rest):
        if place is None:
            raise RuntimeError("the context is broken")
        queue(target, *rest)
        fake.run(len(fake.copies))
        ctypes.memset(target + place, 77, 1)

    fake.cuda.runtime.memcpyAsync = wrong
    with pytest.raises(device.DeviceUnusable, match=error):
        starting._check_copies()
