"""Pinned copies with a CuPy the test holds: pieces, order, and that no buffer is used while a copy still uses it.

The fake copies only when its event is waited for or asked about, as late as a GPU may.
"""

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
    """A device array, flat or not; copies from and to it are only queued."""

    def __init__(self, fake, memory):
        self.fake, self.memory = fake, memory
        self.shape, self.dtype, self.nbytes = memory.shape, memory.dtype, memory.nbytes

    def reshape(self, shape):
        return Array(self.fake, self.memory.reshape(shape))

    def view(self, dtype):
        return Array(self.fake, self.memory.view(dtype))

    def __getitem__(self, part):
        return Array(self.fake, self.memory[part])

    def set(self, source, stream):
        self.fake.queue(self.memory, source, stream)

    def get(self, stream, out, blocking):
        assert not blocking
        self.fake.queue(out, self.memory, stream)


class FakeCupy:
    def __init__(self):
        self.copies, self.copied, self.waits, self.slabs = [], 0, 0, 0
        self.stream = object()
        self.cuda = types.SimpleNamespace(
            get_current_stream=lambda: self.stream,
            Event=lambda disable_timing: Event(self),
            alloc_pinned_memory=self.allocate,
        )

    def allocate(self, size):
        self.slabs += 1
        return bytearray(size)

    def empty(self, shape, dtype):
        return Array(self, numpy.zeros(shape, dtype))

    def queue(self, target, source, stream):
        assert stream is self.stream
        self.copies.append((target, source))

    def run(self, until):
        for target, source in self.copies[self.copied : until]:
            target[...] = source
        self.copied = max(self.copied, until)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(pinned, "SLAB_BYTES", 100)
    monkeypatch.setattr(pinned, "SLABS", 3)
    return FakeCupy()


@pytest.mark.parametrize("size", [1, 24, 25, 50, 75, 76, 1000])
def test_what_goes_in_comes_out(fake, size):
    """In floats of 4 bytes: less than a buffer, several, more than the ring has, and a rest."""
    copies, values = PinnedCopies(fake), numpy.arange(size, dtype="float32")
    there = copies.to_device(values)
    fake.run(len(fake.copies))
    assert there.memory.tolist() == values.tolist()
    assert copies.to_host(there).tolist() == values.tolist()
    assert fake.slabs == min(3, -(-size * 4 // 100))


def test_shape_and_type_are_kept(fake):
    copies = PinnedCopies(fake)
    values = numpy.arange(60, dtype="complex64").reshape(3, 4, 5)
    back = copies.to_host(copies.to_device(values))
    assert back.shape == (3, 4, 5) and back.dtype == values.dtype
    assert (back == values).all(), "although nobody has waited in between: both are in the order of the stream"


def test_a_copy_to_the_device_is_not_waited_for_while_buffers_are_free(fake):
    copies = PinnedCopies(fake)
    copies.to_device(numpy.zeros(300, "uint8"))
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
