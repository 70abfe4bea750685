"""The actor's handle on one executor process: start it, give it a call, read what it says, interrupt it, end it."""

import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from actors import frames
from actors.contract import (
    EXIT_DEVICE_BROKEN,
    EXIT_DEVICE_FAULTY,
    INTERRUPT_SIGNAL,
    Broken,
    Call,
    Config,
    DeviceState,
    Failed,
    Full,
    NotStarted,
    Outcome,
    Ready,
    Reason,
    Step,
    Succeeded,
)
from actors.data.ahead import Reader
from actors.gateway import Gateway, Lender
from actors.journal import Journal, Running

#: An executor that waits for a call takes it at once; one that does not within this many seconds is broken.
SEND_S = 30.0

_HEAD = struct.Struct("!i")  # how multiprocessing's Connection, at the other end, frames messages below 2 GiB
_CHUNK_BYTES = 1 << 20


class Child:
    """One executor. Made and used on the actor's supervisor thread: the kernel ends it with that thread.

    Args:
        config: what it is started with.
        in_ray: Ray's object store, if it is to reach that.
    """

    def __init__(self, config: Config, in_ray: Lender | None = None) -> None:
        self.release = config.release
        self.started_at = time.monotonic()
        self.ready: Ready | None = None
        self.failed: NotStarted | None = None
        self.step, self.step_since = "starting", self.started_at
        self.full = ""  # why it is to be replaced after its call
        self.broken = ""  # how its device broke, as far as it could say
        self.code: int | None = None  # its exit code, after `reap`
        self.device = DeviceState(0, 0, 0, {}, {})
        self._touched: dict[str, tuple[str, ...]] = {}  # task's name -> residents its last body has used
        self.planned_end = ""  # why the actor itself ends it, else ""
        self.serial_to_end = 0  # the body a planned end is meant for
        self.journal = Journal.create()
        self._offset = 0
        self._gateway = Gateway(in_ray) if in_ray is not None else None
        ours, theirs = socket.socketpair()
        self._ahead = Reader(config.stores.timeout_s)
        gateway = [self._gateway.theirs.fileno()] if self._gateway else []
        fds = [theirs.fileno(), self.journal.fd, self._ahead.theirs.fileno(), *gateway]
        try:
            command = [sys.executable, "-m", "actors.executor", *map(str, fds)]
            environment = {**os.environ, **dict(config.release.environment)}
            # The parent's path, so that `actors` is found wherever the actor found it; -m adds the working directory.
            environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
            self.process = subprocess.Popen(command, pass_fds=fds, env=environment, stdin=subprocess.DEVNULL)
        finally:
            theirs.close()
            self._ahead.theirs.close()
            if self._gateway is not None:
                self._gateway.theirs.close()
        self.exit_fd = os.pidfd_open(self.process.pid)  # readable once it has ended, whoever else holds its pipe
        ours.settimeout(SEND_S)
        self.socket = ours
        self._buffer = bytearray()
        self._send(config)

    def send(self, call: Call) -> None:
        """Start a call; only when the last one is done."""
        self.journal.start_call()
        self._offset = 0
        self._send(call._replace(ahead=self._ahead.give(call.id)))

    def read_ahead(self, call: Call | None) -> None:
        """Read what the next call's arguments refer to, if any comes, while a body runs."""
        self._ahead.want(call.id if call else "", (each for task in call.tasks for each in task.large) if call else ())

    def receive(self) -> list[Any]:
        """The executor's messages that have arrived whole, outcomes among them; call it when the socket is readable.

        Never waits for the rest of a message: a body may be stopped in the middle of writing one.

        Raises:
            EOFError: it is gone.
        """
        try:
            data = self.socket.recv(_CHUNK_BYTES)
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        self._buffer += data
        messages = list(self._unpack())
        for message in messages:
            self._note(message)
        return messages

    def has_more(self) -> bool:
        """Whether `receive` would find something now."""
        return bool(select.select([self.socket], [], [], 0)[0])

    def _note(self, message: Any) -> None:
        if isinstance(message, Step):
            self.step, self.step_since = message.text, time.monotonic()
        elif isinstance(message, Ready):
            self.ready = message
        elif isinstance(message, NotStarted):
            self.failed = message
        elif isinstance(message, Broken):
            self.broken = message.text
        elif isinstance(message, Full):
            self.full = message.text
        elif isinstance(message, DeviceState):
            self.device = message
            self._touched = {**self._touched, **message.touched}

    def _unpack(self) -> Iterator[Any]:
        start = 0
        while len(self._buffer) - start >= _HEAD.size:
            (length,) = _HEAD.unpack_from(self._buffer, start)
            end = start + _HEAD.size + length
            if len(self._buffer) < end:
                break
            yield pickle.loads(memoryview(self._buffer)[start + _HEAD.size : end])
            start = end
        self._buffer = self._buffer[start:]

    def _send(self, message: Any) -> None:
        pieces = frames.dump(message)
        self.socket.sendall(frames.length_of(pieces) + pieces[0])
        for part in pieces[1:]:
            self.socket.sendall(part)

    def new_outcomes(self) -> list[Outcome]:
        """Outcomes the journal has got since the last look."""
        found, self._offset = self.journal.outcomes(self._offset)
        return [pickle.loads(data) for data in found]

    def running(self) -> Running | None:
        """The body that runs now, or that ran when the executor died."""
        return self.journal.running()

    def warm_for(self) -> tuple[str, ...]:
        """Names of tasks whose last body has used residents, all of which are on the device now."""
        held = self.device.residents
        return tuple(name for name, used in self._touched.items() if used and all(each in held for each in used))

    def interrupt(self, serial: int, reason: Reason) -> None:
        """Raise inside the body with this serial; a body that has ended meanwhile is not touched."""
        self.journal.want(serial, reason)
        self.process.send_signal(INTERRUPT_SIGNAL)

    def kill(self, why: str, serial: int = 0) -> None:
        """End the process now; the supervisor sees the pipe close."""
        self.planned_end, self.serial_to_end = why, serial
        self.process.kill()

    def reap(self) -> str:
        """Wait for a process that is gone and say how it ended."""
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:  # the pipe is closed but the process lives: a body closed its descriptors
            self.process.kill()
            code = self.process.wait()
        self.socket.close()
        self.code = code
        if self.broke_device:
            return f"its CUDA context broke{': ' if self.broken else ''}{self.broken}"
        if code >= 0:
            return f"exit code {code}"
        return f"signal {-code} ({signal.Signals(-code).name})"

    @property
    def broke_device(self) -> bool:
        """Whether it has ended because its device broke; after `reap`."""
        return self.code in (EXIT_DEVICE_BROKEN, EXIT_DEVICE_FAULTY)

    def close(self) -> None:
        """Forget the journal; after `reap` and the last `running`."""
        os.close(self.exit_fd)
        self.journal.close()
        self._ahead.close()
        if self._gateway is not None:
            self._gateway.close()


def is_outcome(message: Any) -> bool:
    """Whether a message is an outcome too large for the journal."""
    return isinstance(message, Succeeded | Failed)
