"""Between worker and driver: messages over a socket pair, neither side ever blocked by the other.

Each message is pickled on its own and framed with its kind's serial, so that one that cannot be pickled or unpickled
costs only itself. Writes are partial and buffered; a burst of messages leaves in one system call.
"""

import signal
import socket
import struct
from collections import deque
from typing import Any, NamedTuple

from actors import frames

_HEAD = struct.Struct("!IQ")  # length of the frame, serial of the request it is about

#: What one system call hands over or takes, at most.
_CHUNK_BYTES = 1 << 20


class Run(NamedTuple):
    """Worker to driver: trace this request. `body` is the message's: encoded, its `Texts`, or decoded if it came so."""

    serial: int
    task: str
    id: str
    request: dict[str, Any]
    body: Any
    content_type: str | None
    content_encoding: str | None
    soft_limit_s: float | None
    hard_limit_s: float | None
    lost: int  # drivers that died while they had it
    refusal: str = ""  # why it must not run
    announced: bool = False  # Celery knows it as started, so the broker may not have it any more


class Cancel(NamedTuple):
    """Worker to driver: this request is no longer wanted; a running body is interrupted, as the signal says."""

    serial: int
    signum: int = signal.SIGTERM


class Withdraw(NamedTuple):
    """Worker to driver: give this request back if it has not started; if it has, nothing is meant."""

    serial: int


class Flush(NamedTuple):
    """Worker to driver: give back what has not started; the broker will send it again."""

    serial: int = 0
    ends: bool = False  # the worker ends: so does what has run, late, and cannot be stored in time


class RestartActors(NamedTuple):
    """Worker to driver: drain and restart the actors, one at a time."""

    serial: int = 0


class Discard(NamedTuple):
    """Worker to driver: delete these data; the task they were for has ended without a driver."""

    refs: tuple[Any, ...]
    serial: int = 0


class Stop(NamedTuple):
    """Worker to driver: end."""

    serial: int = 0


class Accepted(NamedTuple):
    """Driver to worker: the task's call leaves for an actor; `at` is `time.monotonic`."""

    serial: int
    at: float


class Returned(NamedTuple):
    """Driver to worker: an accepted task waits again, because its actor was lost; it has not started after all."""

    serial: int


class Flushed(NamedTuple):
    """Driver to worker: this task has not started, or its outcome could not be stored; it is forgotten here."""

    serial: int


class Done(NamedTuple):
    """Driver to worker: what Celery's tracer returned, (failed, value or ExceptionInfo, runtime)."""

    serial: int
    result: Any


class Ended(NamedTuple):
    """Driver to worker: the tracer did not return; `einfo` is for the error callback."""

    serial: int
    einfo: Any


class SoftLimited(NamedTuple):
    """Driver to worker: the task's body is interrupted by its soft limit, and goes on as it likes."""

    serial: int
    limit_s: float


class TimedOut(NamedTuple):
    """Driver to worker: the hard limit ended the task."""

    serial: int
    limit_s: float


class Report(NamedTuple):
    """Driver to worker: the fleet as JSON-able data; `error` is (class name, text) of a start-up error."""

    serial: int
    fleet: dict[str, Any]
    error: tuple[str, str] | None


class Unreadable(NamedTuple):
    """In place of a message that could not be unpickled here."""

    serial: int
    reason: str


class Link:
    """One end of the link; used on one thread."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._out: deque[memoryview] = deque()
        self._in = bytearray()

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._socket.fileno()

    def send(self, message: Any) -> None:
        """Queue a message; `flush` writes it. Whatever pickle raises passes through, and nothing is queued."""
        pieces = frames.dump(message)
        size = sum(map(len, pieces))
        self._out.append(memoryview(_HEAD.pack(size, message.serial) + pieces[0]))
        self._out.extend(pieces[1:])

    def flush(self) -> bool:
        """Write what the socket takes; False while something is left.

        Raises:
            ConnectionError: the other side is gone.
        """
        while self._out:
            chunk = self._next_chunk()
            try:
                sent = self._socket.send(chunk)
            except BlockingIOError:
                self._out.appendleft(chunk)
                return False
            if sent < len(chunk):
                self._out.appendleft(chunk[sent:])
        return True

    def receive(self) -> list[Any]:
        """All messages that have arrived whole.

        Raises:
            EOFError: the other side is gone and everything it sent has been received.
        """
        messages: list[Any] = []
        while True:
            try:
                data = self._socket.recv(_CHUNK_BYTES)
            except BlockingIOError:
                return messages
            except ConnectionError:
                data = b""
            if not data:
                if messages:
                    return messages  # the next receive says EOFError
                raise EOFError
            self._in += data
            messages += self._unpack()
            if len(data) < _CHUNK_BYTES:
                return messages

    def close(self) -> None:
        """Close the socket; the other side receives EOFError."""
        self._socket.close()

    def _next_chunk(self) -> memoryview:
        """The queued messages up to a chunk's size, as one buffer."""
        first = self._out.popleft()
        if not self._out or len(first) >= _CHUNK_BYTES:
            return first
        parts, size = [first], len(first)
        while self._out and size + len(self._out[0]) <= _CHUNK_BYTES:
            parts.append(self._out.popleft())
            size += len(parts[-1])
        return memoryview(b"".join(parts))

    def _unpack(self) -> list[Any]:
        messages = []
        start = 0
        while len(self._in) - start >= _HEAD.size:
            length, serial = _HEAD.unpack_from(self._in, start)
            end = start + _HEAD.size + length
            if len(self._in) < end:
                break
            try:
                messages.append(frames.load(memoryview(self._in)[start + _HEAD.size : end]))
            except Exception as error:
                messages.append(Unreadable(serial, repr(error)))
            start = end
        if start:
            self._in = self._in[start:]
        return messages
