"""What an executor is running and has finished, in memory that outlives it.

Executor and actor share one anonymous file. The executor notes the body it starts and appends each outcome when the
body ends; the actor reads both at any time, also after the executor's death: so blame is exact and nothing finished is
lost. One writer per field; a field is published by the last store, which x86 and the GIL keep in order.

Layout (little endian): running serial, first task, task count, started (monotonic ns), bytes used, wanted serial,
wanted reason, taken serial, then one cancelled flag per task, then length-prefixed outcomes.
"""

import mmap
import os
import struct
from typing import NamedTuple

from actors.contract import MAX_TASKS

#: Room for the outcomes of one call; an outcome that does not fit goes through the pipe instead.
AREA_BYTES = 1 << 20

_RUNNING = struct.Struct("<qiiq")  # serial, first, count, started_ns
_SERIAL = struct.Struct("<q")
_RANGE = struct.Struct("<iiq")  # what follows the serial
_USED = struct.Struct("<q")
_WANTED = struct.Struct("<qi")
_LENGTH = struct.Struct("<I")
_USED_AT = 32
_WANTED_AT = 40
_TAKEN_AT = 56
_FLAGS_AT = 64
_AREA_AT = _FLAGS_AT + MAX_TASKS


class Running(NamedTuple):
    """The body that runs now: tasks ``first`` to ``first + size - 1`` of the current call."""

    serial: int
    first: int
    size: int
    started_ns: int


class Journal:
    """Both ends of the shared memory; the actor creates it, the executor opens its descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _AREA_AT + AREA_BYTES)
        self._serial = 0

    @classmethod
    def create(cls) -> "Journal":
        """A new journal in anonymous memory; its descriptor is inheritable through ``pass_fds``."""
        fd = os.memfd_create("gpu-journal")
        os.ftruncate(fd, _AREA_AT + AREA_BYTES)
        return cls(fd)

    def close(self) -> None:
        """Release the memory in this process."""
        self._map.close()
        os.close(self.fd)

    # the executor writes

    def begin(self, first: int, count: int, now_ns: int) -> int:
        """Note that a body starts; returns the serial that interrupts must name.

        While tasks run that have no outcome yet, such as launched ones, the range must cover them: it then changes in
        place, so that at no moment nobody seems to run.
        """
        self._serial += 1
        _RANGE.pack_into(self._map, _SERIAL.size, first, count, now_ns)
        _SERIAL.pack_into(self._map, 0, self._serial)
        return self._serial

    def begin_again(self) -> None:
        """What runs gets another serial: an interrupt that it has had may come once more."""
        running = self.running()
        if running is not None:
            self.begin(running.first, running.size, running.started_ns)

    def end(self) -> None:
        """Note that no body runs."""
        _SERIAL.pack_into(self._map, 0, 0)

    def append(self, outcome: bytes) -> bool:
        """Keep an outcome of the current call; False when there is no room left."""
        used = _USED.unpack_from(self._map, _USED_AT)[0]
        end = used + _LENGTH.size + len(outcome)
        if end > AREA_BYTES:
            return False
        _LENGTH.pack_into(self._map, _AREA_AT + used, len(outcome))
        self._map[_AREA_AT + used + _LENGTH.size : _AREA_AT + end] = outcome
        _USED.pack_into(self._map, _USED_AT, end)
        return True

    def is_cancelled(self, index: int) -> bool:
        """Whether the actor withdrew task `index` of the current call before it started."""
        return bool(self._map[_FLAGS_AT + index])

    def wanted(self) -> tuple[int, int]:
        """(serial, reason) of the last interrupt asked for."""
        return _WANTED.unpack_from(self._map, _WANTED_AT)

    def take(self, serial: int) -> None:
        """Note that the interrupt for this body has reached it, so that it is not sent again."""
        struct.pack_into("<q", self._map, _TAKEN_AT, serial)

    # the actor writes

    def start_call(self) -> None:
        """Forget the outcomes and cancellations of the last call; only while the executor waits for a call."""
        _USED.pack_into(self._map, _USED_AT, 0)
        self._map[_FLAGS_AT:_AREA_AT] = bytes(MAX_TASKS)

    def cancel(self, index: int) -> None:
        """Withdraw task `index` of the current call, if it has not started."""
        self._map[_FLAGS_AT + index] = 1

    def want(self, serial: int, reason: int) -> None:
        """Name the body an interrupt is meant for; the signal follows."""
        _WANTED.pack_into(self._map, _WANTED_AT, serial, reason)

    # the actor reads

    def taken(self) -> int:
        """The serial of the last body an interrupt has reached."""
        return struct.unpack_from("<q", self._map, _TAKEN_AT)[0]  # type: ignore[no-any-return]

    def running(self) -> Running | None:
        """The body that runs now, or that ran when the executor died."""
        running = Running(*_RUNNING.unpack_from(self._map, 0))
        return running if running.serial else None

    def outcomes(self, offset: int) -> tuple[list[bytes], int]:
        """Outcomes of the current call appended since `offset`, and the next offset."""
        used = _USED.unpack_from(self._map, _USED_AT)[0]
        found = []
        while offset < used:
            (length,) = _LENGTH.unpack_from(self._map, _AREA_AT + offset)
            start = _AREA_AT + offset + _LENGTH.size
            found.append(self._map[start : start + length])
            offset += _LENGTH.size + length
        return found, offset
