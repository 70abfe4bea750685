"""How the supervisor thread waits: for its executors, until something is due, or until another thread wakes it."""

import math
import os
import select
from contextlib import suppress


class Waker:
    """Wait for descriptors on one thread, wake it from any."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)

    def wake(self) -> None:
        """The thread that waits, or else its next wait, comes back at once."""
        with suppress(BlockingIOError):  # it is awake already
            os.write(self._write, b"x")

    def wait(self, descriptors: list[int], timeout_s: float) -> set[int]:
        """Those that can be read or are closed at the other end; multiprocessing's `wait` costs ten times as much."""
        poll = select.poll()
        for fd in (self._read, *descriptors):
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(math.ceil(1000 * timeout_s))}
        if self._read in ready:
            os.read(self._read, 4096)
        return ready
