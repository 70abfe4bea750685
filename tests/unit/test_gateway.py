"""Between an executor and its actor: data through a socket for each request, whatever becomes of either side."""

import contextlib
import os
import signal
import threading
import uuid

import numpy
import pytest

from actors.errors import DataLost, StoreUnavailable
from actors.gateway import ActorStore, Gateway
from tests.support.services import wait_for

MIB = 1 << 20


class Shelf:
    """A lender without Ray."""

    def __init__(self):
        self.kept, self.briefs, self.refuses = {}, [], None

    def write(self, data, keep_s, is_brief=False):
        if self.refuses:
            raise self.refuses
        url = f"ray:{uuid.uuid4().hex}"
        self.kept[url] = numpy.array(data)
        self.briefs.append(is_brief)
        return url

    def lend(self, url, size_bytes):
        if url not in self.kept:
            raise DataLost(f"{url} is not there")
        return self.kept[url]

    def delete(self, url, size_bytes):
        self.kept.pop(url, None)


@pytest.fixture
def shelf():
    return Shelf()


@pytest.fixture
def gateway(shelf):
    gateway = Gateway(shelf)
    yield gateway
    gateway.close()


@pytest.fixture
def store(gateway):
    return ActorStore(os.dup(gateway.theirs.fileno()), 10.0)


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, 5 * MIB + 3])
def test_bytes_go_there_and_come_back(store, shelf, size):
    data = numpy.random.default_rng(size).integers(0, 255, size, numpy.uint8)
    url = store.write(data.data, 60.0)
    assert b"".join(map(bytes, store.read(url, size, size))) == data.tobytes()
    store.delete(url, size)
    assert shelf.kept == {} and shelf.briefs == [False]


def test_errors_of_ours_are_raised_as_they_are_and_others_as_unavailable(store, shelf):
    with pytest.raises(DataLost, match="is not there"):
        list(store.read("ray:x", 3, 3))
    for error, text in ((StoreUnavailable("full"), "^full$"), (ValueError("odd"), "ValueError: odd")):
        shelf.refuses = error
        with pytest.raises(StoreUnavailable, match=text):
            store.write(memoryview(b"123"), 60.0)


def test_many_at_once_do_not_mix(store):
    arrays = [numpy.full(MIB + number, number, numpy.uint8) for number in range(8)]
    found = [0] * len(arrays)

    def round_trip(number):
        url = store.write(arrays[number].data, 60.0)
        found[number] = b"".join(map(bytes, store.read(url, arrays[number].size, 9 * MIB))) == arrays[number].tobytes()

    threads = [threading.Thread(target=round_trip, args=(number,)) for number in range(len(arrays))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(found)


class Stopped(Exception):
    pass


def test_an_interrupt_half_way_spoils_nothing_that_follows(store, shelf):
    """Also of a write: it is kept as a whole or not at all."""
    url = store.write(numpy.ones(64 * MIB, numpy.uint8).data, 60.0)
    pieces = store.read(url, 64 * MIB, 64 * MIB)
    next(pieces)
    pieces.close()  # as when an exception is raised in who reads
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(Stopped()))
    try:
        for _ in range(20):
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            try:
                store.write(shelf.kept[url].data, 60.0)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Stopped:
                pass
    finally:
        signal.signal(signal.SIGALRM, before)
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "gateway-request"], "all requests to end")
    assert {array.size for array in shelf.kept.values()} == {64 * MIB}
    small = store.write(memoryview(b"abc"), 60.0)
    assert b"".join(map(bytes, store.read(small, 3, 3))) == b"abc"


def test_without_its_actor_an_executor_is_told(gateway, store):
    gateway.close()
    with pytest.raises(StoreUnavailable, match="the actor has not answered"):
        store.write(memoryview(b"abc"), 60.0)
    with pytest.raises(StoreUnavailable, match="started by no Ray actor"):
        list(ActorStore(None, 10.0).read("ray:x", 3, 3))


def test_an_actor_that_does_not_answer_is_not_waited_for_long(shelf, store, monkeypatch):
    """As one that waits for a head that is gone: its thread hangs, and the body gets an error."""
    monkeypatch.setattr("actors.gateway.PATIENCE_S", -9.9)  # of 10 s
    goes_on = threading.Event()
    shelf.lend = shelf.write = lambda *_: goes_on.wait(60)
    try:
        for do in (lambda: store.write(memoryview(b"abc"), 60.0), lambda: list(store.read("ray:x", 3, 3))):
            with pytest.raises(StoreUnavailable, match="the actor has not answered"):
                do()
    finally:
        goes_on.set()


def test_what_a_body_starts_does_not_get_the_gateway(gateway):
    fd = os.dup(gateway.theirs.fileno())
    os.set_inheritable(fd, True)  # as `pass_fds` leaves it
    store = ActorStore(fd, 10.0)
    assert not os.get_inheritable(fd)
    pid = os.fork()
    if not pid:
        with contextlib.suppress(StoreUnavailable):
            store.write(memoryview(b"abc"), 60.0)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert store.write(memoryview(b"abc"), 60.0).startswith("ray:")


def test_the_gateway_ends_with_its_executor():
    before = set(threading.enumerate())
    gateway = Gateway(Shelf())
    (thread,) = set(threading.enumerate()) - before
    assert thread.is_alive()
    gateway.theirs.close()  # and nobody else has it
    wait_for(lambda: not thread.is_alive(), "its thread to end")
    gateway.close()
