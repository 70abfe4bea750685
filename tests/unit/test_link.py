"""The link over a real socket pair: partial writes, bursts, messages that cannot be pickled or read, the end."""

import socket
import threading

import pytest

from actors import frames
from bridge.link import _CHUNK_BYTES, _HEAD, Accepted, Cancel, Done, Link, Report, Run, Unreadable


@pytest.fixture
def ends():
    ours, theirs = socket.socketpair()
    worker, driver = Link(ours), Link(theirs)
    yield worker, driver
    for end in (ours, theirs):
        end.close()


def done(serial, value=None):
    return Done(serial, (False, value, 0.1))


def run(serial, body):
    return Run(serial, "shop.add", "id", {"retries": 0}, body, "application/json", "utf-8", None, 1.5, 0)


class Refuses:
    """Cannot be pickled."""

    def __reduce__(self):
        raise ValueError("not me")


def refuse_to_load():
    raise KeyError("nowhere to be found")


class Unloadable:
    """Can be pickled here and not unpickled there."""

    def __reduce__(self):
        return refuse_to_load, ()


def test_nothing_to_read_is_an_empty_list(ends):
    assert ends[0].receive() == []


def test_messages_arrive_in_order_and_as_they_were(ends):
    worker, driver = ends
    sent = [run(1, b"body"), Cancel(2), run(3, memoryview(b"x").tobytes())]
    for message in sent:
        worker.send(message)
    assert driver.receive() == [], "nothing leaves before the flush"
    assert worker.flush()
    received = driver.receive()
    assert received == sent
    assert [type(message) for message in received] == [Run, Cancel, Run]


def test_both_directions_are_apart(ends):
    worker, driver = ends
    worker.send(Cancel(1)), driver.send(Accepted(1, 2.0))
    worker.flush(), driver.flush()
    assert worker.receive() == [Accepted(1, 2.0)]
    assert driver.receive() == [Cancel(1)]


def test_a_burst_leaves_in_few_writes_and_arrives_whole():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        counted = Counted(ours)
        link, other = Link(counted), Link(theirs)
        for serial in range(500):
            link.send(Cancel(serial))
        assert link.flush()
        assert counted.writes == 1
        assert [message.serial for message in other.receive()] == list(range(500))


class Counted:
    def __init__(self, sock):
        self.sock, self.writes = sock, 0

    def setblocking(self, flag):
        self.sock.setblocking(flag)

    def send(self, data):
        self.writes += 1
        return self.sock.send(data)


def test_megabytes_cross_a_full_socket_in_parts_and_nobody_blocks(ends):
    worker, driver = ends
    bodies = [bytes([number]) * 5_000_000 for number in range(3)]
    for number, body in enumerate(bodies):
        worker.send(run(number, body))
        worker.send(Cancel(100 + number))
    assert worker.flush() is False, "the socket takes only so much"
    received, rounds = [], 0
    while len(received) < 6:
        received += driver.receive()
        worker.flush()
        rounds += 1
        assert rounds < 100_000
    assert worker.flush()
    assert [message.serial for message in received] == [0, 100, 1, 101, 2, 102]
    assert [message.body for message in received[::2]] == bodies


def test_messages_queued_while_the_socket_is_full_keep_their_order(ends):
    worker, driver = ends
    worker.send(run(0, b"x" * 3_000_000))
    assert not worker.flush()
    received = []
    for serial in range(1, 50):
        worker.send(Cancel(serial))
        worker.flush()
        received += driver.receive()
    while len(received) < 50:
        worker.flush()
        received += driver.receive()
    assert [message.serial for message in received] == list(range(50))


def test_a_message_that_arrives_byte_by_byte_is_put_together():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        link = Link(ours)
        link.send(Cancel(7)), link.send(Cancel(8))
        data = b"".join(bytes(part) for part in link._out)
        other = Link(theirs)
        received = []
        for number in range(len(data)):
            ours.send(data[number : number + 1])
            received += other.receive()
        assert received == [Cancel(7), Cancel(8)]


def test_a_message_that_cannot_be_pickled_costs_only_itself(ends):
    worker, driver = ends
    worker.send(Cancel(1))
    with pytest.raises(ValueError, match="not me"):
        worker.send(done(2, Refuses()))
    with pytest.raises(TypeError):
        worker.send(done(2, threading.Lock()))
    worker.send(Cancel(3))
    assert worker.flush()
    assert driver.receive() == [Cancel(1), Cancel(3)]


def test_a_message_that_cannot_be_read_is_reported_with_its_serial(ends):
    worker, driver = ends
    worker.send(done(1)), worker.send(done(2, Unloadable())), worker.send(done(3))
    worker.flush()
    first, unreadable, last = driver.receive()
    assert (first, last) == (done(1), done(3))
    assert unreadable == Unreadable(2, "KeyError('nowhere to be found')")


def test_a_pickle_of_rubbish_is_reported_with_its_serial(ends):
    worker, driver = ends
    worker._socket.send(_HEAD.pack(7, 42) + b"rubbish")
    worker.send(Cancel(43))
    worker.flush()
    unreadable, good = driver.receive()
    assert isinstance(unreadable, Unreadable) and unreadable.serial == 42
    assert good == Cancel(43)


def test_the_end_is_said_after_everything_that_was_sent(ends):
    worker, driver = ends
    driver.send(done(1)), driver.send(Report(0, {"actors": []}, None))
    driver.flush()
    driver.close()
    assert len(worker.receive()) == 2
    for _ in range(2):
        with pytest.raises(EOFError):
            worker.receive()


def test_the_end_right_behind_a_full_chunk_is_said_after_its_messages():
    class Socket:
        """Hands out what it is told, like a socket whose other side has closed."""

        def __init__(self, *chunks):
            self.chunks = [*chunks]

        def setblocking(self, flag):
            pass

        def recv(self, limit):
            return self.chunks.pop(0) if self.chunks else b""

    message = Done(1, "x" * (_CHUNK_BYTES - 200))
    padding = _CHUNK_BYTES - _HEAD.size - len(frames.dump(message)[0])
    message = Done(1, message.result + "x" * padding)
    data = frames.dump(message)[0]
    link = Link(Socket(_HEAD.pack(len(data), 1) + data))
    assert len(data) + _HEAD.size == _CHUNK_BYTES
    assert link.receive() == [message]
    with pytest.raises(EOFError):
        link.receive()


def test_half_a_message_before_the_end_is_not_delivered(ends):
    worker, driver = ends
    data = frames.dump(Cancel(1))[0]
    driver._socket.send(_HEAD.pack(len(data), 1) + data[:-1])
    driver.close()
    assert worker.receive() == []
    with pytest.raises(EOFError):
        worker.receive()


def test_writing_to_a_side_that_is_gone_is_a_connection_error(ends):
    worker, driver = ends
    driver.close()
    worker.send(Cancel(1))
    with pytest.raises(ConnectionError):
        worker.flush()


def test_a_large_message_is_not_copied_more_often_than_it_must(ends):
    """Partial writes of one big message take slices of it, or 50 MB would take minutes."""
    worker, driver = ends
    worker.send(run(1, b"x" * 50_000_000))
    reader = threading.Thread(target=receive_all, args=(driver, found := []))
    reader.start()
    while not worker.flush():
        pass
    reader.join(60)
    assert len(found[0].body) == 50_000_000


def receive_all(link, found):
    while not found:
        found += link.receive()
