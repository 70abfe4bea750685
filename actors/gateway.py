"""Between an executor and its actor: large data in Ray's object store, which only the actor can reach.

The executor makes a socket pair for each request and hands one end over in a single message, so a body that is
interrupted half-way leaves nothing behind but a closed socket. The actor serves each on a thread. Bytes are streamed
from Ray's memory through the socket: nobody waits for a whole array, and no file or port is open to others.
"""

import logging
import os
import pickle
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import numpy

from actors.errors import DataError, StoreUnavailable

logger = logging.getLogger(__name__)

#: Of a socket's buffer: with Linux' own a switch between the processes comes with each 200 KiB, and it takes twice as
#: long.
BUFFER_BYTES = 2 << 20
#: A piece as the executor takes it, in bytes: it stays in the processor's cache until it is where it belongs.
PIECE_BYTES = 1 << 20
_HEAD = struct.Struct("!I")


#: Bytes a second that Ray is expected to move, at least.
SLOWEST = 100e6
#: An executor waits so much longer than its actor, in seconds: for the keeper to be found or made.
PATIENCE_S = 10.0


def patience_s(timeout_s: float, size_bytes: int) -> float:
    """Ray has this long for an answer that takes so many bytes to be moved."""
    return timeout_s + size_bytes / SLOWEST


class _Read(NamedTuple):
    url: str
    size_bytes: int | None


class _Write(NamedTuple):
    size_bytes: int
    keep_s: float
    is_brief: bool


class _Delete(NamedTuple):
    url: str


class Lender(Protocol):
    """What the gateway serves: `actors/data/ray_store.py`."""

    def write(self, data: Any, keep_s: float, is_brief: bool = False) -> str:
        """As `Store.write`; `is_brief` data end with this process."""
        ...

    def lend(self, url: str, size_bytes: int | None) -> "numpy.ndarray[Any, Any]":
        """The bytes where they lie."""
        ...

    def delete(self, url: str, size_bytes: int | None) -> None:
        """As `Store.delete`."""
        ...


class Gateway:
    """The actor's end, for one executor; `theirs` is what that gets."""

    def __init__(self, store: Lender) -> None:
        self._store = store
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        threading.Thread(target=self._serve, name="gateway", daemon=True).start()

    def close(self) -> None:
        """Take no more requests."""
        with suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)  # or the thread would wait on a closed descriptor
        self.theirs.close()

    def _serve(self) -> None:
        with self._ours:
            while True:
                try:
                    word, descriptors, _, _ = socket.recv_fds(self._ours, 1, 1)
                except OSError:
                    return
                for fd in descriptors:
                    line = socket.socket(fileno=fd)
                    threading.Thread(target=self._answer, args=(line,), name="gateway-request", daemon=True).start()
                if not word:
                    return

    def _answer(self, line: socket.socket) -> None:
        with line, suppress(OSError, EOFError):  # the executor, or its body, has given up
            try:
                self._do(line, _receive(line))
            except DataError as error:
                _send(line, error)
            except (OSError, EOFError):
                raise
            except Exception as error:
                logger.exception("a request for data in Ray's object store failed")
                _send(line, StoreUnavailable(f"Ray's object store: {type(error).__name__}: {error}"[:300]))

    def _do(self, line: socket.socket, request: Any) -> None:
        match request:
            case _Read(url, size_bytes):
                data = self._store.lend(url, size_bytes).data
                _send(line, data.nbytes)
                line.sendall(data)
            case _Write(size_bytes, keep_s, is_brief):
                buffer = numpy.empty(size_bytes, numpy.uint8)
                _fill(line, buffer.data)
                url = self._store.write(buffer, keep_s, is_brief)
                try:
                    _send(line, url)
                except OSError:
                    self._store.delete(url, size_bytes)  # nobody knows of it
            case _Delete(url):
                self._store.delete(url, None)
                _send(line, None)


class ActorStore:
    """The executor's end, as a `Store`; the actor on the other side reaches Ray's object store.

    Args:
        control_fd: where requests are handed over; None where no actor of Ray's has started this executor.
        timeout_s: as the actor's own for one answer of Ray.
    """

    def __init__(self, control_fd: int | None, timeout_s: float) -> None:
        self._control = socket.socket(fileno=control_fd) if control_fd is not None else None
        self._timeout_s = timeout_s
        if self._control is not None:
            self._control.settimeout(timeout_s + PATIENCE_S)  # an actor that stands still takes no more one day
            self._control.set_inheritable(False)  # what a body starts is not the executor
            os.register_at_fork(after_in_child=self._control.close)  # nor is what it forks

    def write(self, data: memoryview, keep_s: float, is_brief: bool = False) -> str:
        """As `RayStore.write`; `is_brief` data end with the actor."""
        with self._asked(_Write(data.nbytes, keep_s, is_brief), data.nbytes) as line:
            if data.nbytes:  # of nothing the actor may have answered and hung up already
                line.sendall(data)
            url: str = _receive(line)
        return url

    def read(self, url: str, size_bytes: int | None, most_bytes: int) -> Iterator[Any]:
        """As `Store.read`; a piece is good until the next is asked for."""
        with self._asked(_Read(url, size_bytes), size_bytes or 0) as line:
            left = _receive(line)
            buffer = memoryview(bytearray(min(left, PIECE_BYTES)))
            while left:
                count = line.recv_into(buffer)
                if not count:
                    raise EOFError
                left -= count
                yield buffer[:count]

    def delete(self, url: str, size_bytes: int | None) -> None:
        """As `Store.delete`."""
        with self._asked(_Delete(url)) as line:
            _receive(line)

    @contextmanager
    def _asked(self, request: Any, size_bytes: int = 0) -> Iterator[socket.socket]:
        if self._control is None:
            raise StoreUnavailable("Ray's object store cannot be reached: this executor was started by no Ray actor")
        ours, theirs = socket.socketpair()
        with ours:
            try:
                with theirs:
                    for each in (ours, theirs):
                        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
                    socket.send_fds(self._control, [b"x"], [theirs.fileno()])
                ours.settimeout(patience_s(self._timeout_s, size_bytes) + PATIENCE_S)
                _send(ours, request)
                yield ours
            except (OSError, EOFError) as error:
                raise StoreUnavailable("the actor has not answered for Ray's object store") from error


def _send(line: socket.socket, message: Any) -> None:
    data = pickle.dumps(message, 5)
    line.sendall(_HEAD.pack(len(data)) + data)


def _receive(line: socket.socket) -> Any:
    """The next message. An error that was sent is raised; EOFError if the other side is gone."""
    head = bytearray(_HEAD.size)
    _fill(line, memoryview(head))
    data = bytearray(_HEAD.unpack(head)[0])
    _fill(line, memoryview(data))
    message = pickle.loads(data)
    if isinstance(message, DataError):
        raise message
    return message


def _fill(line: socket.socket, left: memoryview) -> None:
    while left:
        count = line.recv_into(left)
        if not count:
            raise EOFError
        left = left[count:]
