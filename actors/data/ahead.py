"""Reading ahead: while a body runs, its actor reads from Redis what the next call's arguments refer to.

Nothing of a call is sent ahead, and nothing counts that happens here: an executor takes what lies ready in memory that
both share, and asks Redis itself for the rest, in the body's frame as ever. Whatever goes wrong here is that task's
error only if it goes wrong there, too. Nobody waits for anybody, and a value never changes under its name.

The actor knows neither the app nor an address or password of Redis: the executor lends it a connection. One with TLS
cannot be lent; there nothing is read ahead.
"""

import mmap
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from actors.data.redis_values import CHUNK_BYTES, get_into, key_of, wait_at_most

#: What is read ahead of one call, at most, in bytes; of more the first part. There is room for two calls, because the
#: one that runs may still take from its own: 32 MiB for as long as an executor lives that has taken large references.
ROOM_BYTES = 16 << 20
#: References to less are not worth it, in bytes.
LEAST_BYTES = 1 << 20
#: An executor waits so long for the next value, in seconds, before it asks Redis itself; and how often it looks.
PATIENCE_S, LOOK_S = 0.05, 0.0002
#: Calls that are passed over, at most, where what was read came too late again and again: bodies are too short.
MOST_PASSED = 7
_ROOMS = 2
_WORD = struct.Struct("<q")
#: Where the words are: for each room how many bytes are ready, and whether no more will be or are wanted; at last
#: whether the actor has a connection.
_READY_AT, _STOPPED_AT, _CONNECTED_AT = 0, 16, 32
_ROOMS_AT = mmap.PAGESIZE
#: Of a prefix of keys, in bytes, with the mark before it: an empty message would look like the end.
_PREFIX_BYTES, _MARK = 4096, b"="


class Wanted(NamedTuple):
    """Data in Redis that an argument refers to."""

    name: str
    size_bytes: int


class Place(NamedTuple):
    """Where the executor finds what has been read of it, or will be."""

    name: str
    room: int
    start: int
    size_bytes: int


class _Memory:
    """What both share; each word has one writer at a time."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _ROOMS_AT + _ROOMS * ROOM_BYTES)
        self._view = memoryview(self._map)

    @classmethod
    def create(cls) -> "_Memory":
        fd = os.memfd_create("gpu-ahead")
        os.ftruncate(fd, _ROOMS_AT + _ROOMS * ROOM_BYTES)
        return cls(fd)

    def close(self) -> None:
        self._view.release()
        self._map.close()
        os.close(self.fd)

    def piece(self, room: int, start: int, end: int) -> memoryview:
        begin = _ROOMS_AT + room * ROOM_BYTES
        return self._view[begin + start : begin + end]

    def begin(self, room: int) -> None:
        self._write(_READY_AT + room * _WORD.size, 0)
        self._write(_STOPPED_AT + room * _WORD.size, 0)

    def note_ready(self, room: int, count: int) -> None:
        self._write(_READY_AT + room * _WORD.size, count)

    def ready(self, room: int) -> int:
        return self._read(_READY_AT + room * _WORD.size)

    def stop(self, room: int) -> None:
        self._write(_STOPPED_AT + room * _WORD.size, 1)

    def is_stopped(self, room: int) -> bool:
        return bool(self._read(_STOPPED_AT + room * _WORD.size))

    @property
    def is_connected(self) -> bool:
        return bool(self._read(_CONNECTED_AT))

    @is_connected.setter
    def is_connected(self, value: bool) -> None:
        self._write(_CONNECTED_AT, value)

    def _read(self, place: int) -> int:
        return _WORD.unpack_from(self._map, place)[0]  # type: ignore[no-any-return]

    def _write(self, place: int, value: int) -> None:
        _WORD.pack_into(self._map, place, value)


class _Job:
    """What is to be read for a call."""

    def __init__(self, call: str, wanted: Iterable[Wanted]) -> None:
        self.call = call
        self.is_begun = self.is_dropped = self.is_passed = False
        self.places: list[Place] = []
        left = ROOM_BYTES
        for name, size_bytes in dict.fromkeys(wanted):
            size_bytes = size_bytes if size_bytes <= left else left - left % CHUNK_BYTES  # Redis gives whole values
            if size_bytes:
                self.places.append(Place(name, 0, ROOM_BYTES - left, size_bytes))
                left -= size_bytes


class Reader:
    """The actor's end, for one executor; `theirs` is what that gets. Only its thread ever waits.

    Args:
        timeout_s: Redis has so long for one answer.
    """

    def __init__(self, timeout_s: float) -> None:
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._job: _Job | None = None  # of the call that is next
        self._room = 0  # that of the call that was given one last
        self._memory: _Memory | None = None
        self._connection: socket.socket | None = None
        self._prefix = ""
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._late = self._to_pass = 0  # calls in a row for which it was, and those passed over because of it

    def want(self, call: str, wanted: Iterable[Wanted]) -> None:
        """This call is next, and needs this; what is read for another is dropped."""
        with self._changed:
            if self._job is not None and self._job.call == call:
                return
            self._drop()
            self._job = job = _Job(call, wanted)
            if not job.places or self._is_closed or not self._has_connection():
                job.is_passed = True
            elif self._to_pass:
                self._to_pass, job.is_passed = self._to_pass - 1, True
            if job.is_passed:
                return
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="ahead", daemon=True)
                self._thread.start()

    def give(self, call: str) -> tuple[Place, ...]:
        """This call starts: what is read for it, or under way."""
        with self._changed:
            job = self._job
            if job is None or job.call != call or not job.is_begun:
                self._drop()
                return ()
            self._job, self._room = None, 1 - self._room
            return tuple(job.places)

    def close(self) -> None:
        """The executor has ended."""
        with self._changed:
            self._is_closed = True
            self._drop()
            self._ours.close()
            self.theirs.close()
            if self._thread is None:
                self._release()
            elif self._connection is not None:
                with suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)  # or it might wait for an answer
            self._changed.notify()

    def _drop(self) -> None:
        if self._job is not None:
            self._job.is_dropped, self._job = True, None

    def _has_connection(self) -> bool:
        """Whether there is one, or the executor has lent one."""
        with suppress(OSError):
            text, fds, _, _ = socket.recv_fds(self._ours, _PREFIX_BYTES + 1, 2)
            if len(fds) == 2:  # none when the executor has ended
                self._take(text.removeprefix(_MARK).decode(), *fds)
        return self._connection is not None

    def _take(self, prefix: str, connection: int, memory: int) -> None:
        if self._memory is None:
            self._memory = _Memory(memory)
        else:
            os.close(memory)
        self._hang_up()
        self._connection, self._prefix = socket.socket(fileno=connection), prefix
        wait_at_most(self._connection, self._timeout_s)

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _release(self) -> None:
        self._hang_up()
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    # on the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._has_work())
                if self._is_closed:
                    self._release()
                    return
                job, memory, connection = self._job, self._memory, self._connection
                assert job and memory and connection
                room = 1 - self._room
                job.places = [place._replace(room=room) for place in job.places]
                self._late = self._late + 1 if memory.is_stopped(room) else 0  # for the call that had this room
                self._to_pass = min(2**self._late - 1, MOST_PASSED)
                memory.begin(room)
                job.is_begun = True
            if not self._read(job, memory, connection):
                memory.stop(room)
                with self._changed:
                    self._hang_up()
                    memory.is_connected = False

    def _has_work(self) -> bool:
        job = self._job
        return job is not None and not (job.is_begun or job.is_passed) and self._connection is not None

    def _read(self, job: _Job, memory: _Memory, connection: socket.socket) -> bool:
        """Whether the connection is still good."""
        for name, room, start, size_bytes in job.places:
            for number, first in enumerate(range(0, size_bytes, CHUNK_BYTES)):
                if job.is_dropped or memory.is_stopped(room):
                    return True
                end = min(first + CHUNK_BYTES, size_bytes)
                try:
                    key = key_of(self._prefix, name, number)
                    if not get_into(connection, key, memory.piece(room, start + first, start + end)):
                        return False
                except OSError:
                    return False
                memory.note_ready(room, start + end)
        return True


class Shelf:
    """The executor's end.

    Args:
        fd: of the socket that the actor has given.
    """

    def __init__(self, fd: int) -> None:
        self._actor = socket.socket(fileno=fd)
        self._actor.set_inheritable(False)  # what a body starts is not the executor
        os.register_at_fork(after_in_child=self._leave)  # nor is what it forks
        self._memory: _Memory | None = None
        self._lent: Any = None  # redis-py's connection, which stays open while it is here
        self._can_lend = True
        self._places: dict[str, Place] = {}

    def _leave(self) -> None:
        """Nobody tells this process when the call has ended and other data are where its own were."""
        self._actor.close()
        self._places, self._can_lend = {}, False

    def begin(self, places: Iterable[Place]) -> None:
        """A call starts."""
        self._places = {place.name: place for place in places}

    def end(self) -> None:
        """It has ended."""
        self._places = {}

    def piece(self, name: str, number: int) -> memoryview | None:
        """One value of these data if it is there, good until the call ends. If not, no more are read ahead of it."""
        place = self._places.get(name)
        if place is None or self._memory is None:
            return None
        first, end = number * CHUNK_BYTES, min((number + 1) * CHUNK_BYTES, place.size_bytes)
        if first >= end:
            return None  # there was no room for it
        if not self._comes(self._memory, place.room, place.start + end):
            self._memory.stop(place.room)
            self._places = {}
            return None
        return self._memory.piece(place.room, place.start + first, place.start + end)

    def _comes(self, memory: _Memory, room: int, wanted: int) -> bool:
        """Whether so many bytes are ready; if the first ones are, the others are waited for while they keep coming."""
        seen = ready = memory.ready(room)
        patient_until = time.monotonic() + PATIENCE_S
        while 0 < ready < wanted and not memory.is_stopped(room) and time.monotonic() < patient_until:
            time.sleep(LOOK_S)
            ready = memory.ready(room)
            if ready != seen:
                seen, patient_until = ready, time.monotonic() + PATIENCE_S
        return ready >= wanted

    def lend(self, pool: Any, prefix: str) -> None:
        """Have the actor read from the Redis that has just answered, if it cannot yet.

        Args:
            pool: redis-py's.
            prefix: of keys.

        Raises:
            redis.RedisError, OSError: as redis-py says; AttributeError where it has changed.
        """
        if not self._can_lend or (self._memory is not None and self._memory.is_connected):
            return
        self._can_lend = False  # what goes wrong would go wrong again, each time
        if self._lent is not None:
            self._lent.disconnect()
        self._lent = pool.connection_class(**pool.connection_kwargs)  # not of the pool, which counts
        self._lent.connect()
        sock = self._lent._sock
        if isinstance(sock, ssl.SSLSocket):
            self._lent.disconnect()
            return
        if self._memory is None:
            self._memory = _Memory.create()
        self._memory.is_connected = True  # before the actor has it, for it says when it is of no more use
        socket.send_fds(self._actor, [_MARK + prefix.encode()], [sock.fileno(), self._memory.fd])
        self._can_lend = True
