"""The actor's handle on one executor process: start it, give it a call, read what it says, interrupt it, end it."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from actors.contract import (
    EXIT_DEVICE_BROKEN,
    INTERRUPT_SIGNAL,
    Call,
    Config,
    Failed,
    NotStarted,
    Outcome,
    Ready,
    Reason,
    Step,
    Succeeded,
)
from actors.journal import Journal, Running


class Child:
    """One executor. Made and used on the actor's supervisor thread: the kernel ends it with that thread."""

    def __init__(self, config: Config) -> None:
        self.release = config.release
        self.started_at = time.monotonic()
        self.ready: Ready | None = None
        self.failed: NotStarted | None = None
        self.step = "starting"
        self.planned_end = ""  # why the actor itself ends it, else ""
        self.serial_to_end = 0  # the body a planned end is meant for
        self.journal = Journal.create()
        self._offset = 0
        ours, theirs = socket.socketpair()
        try:
            command = [sys.executable, "-m", "actors.executor", str(theirs.fileno()), str(self.journal.fd)]
            environment = {**os.environ, **dict(config.release.environment)}
            # The parent's path, so that `actors` is found wherever the actor found it; -m adds the working directory.
            environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno(), self.journal.fd], env=environment, stdin=subprocess.DEVNULL
            )
        finally:
            theirs.close()
        self.exit_fd = os.pidfd_open(self.process.pid)  # readable once it has ended, whoever else holds its pipe
        self.pipe = Connection(ours.detach())
        self.pipe.send_bytes(pickle.dumps(config, 5))

    def send(self, call: Call) -> None:
        """Start a call; only when the last one is done."""
        self.journal.start_call()
        self._offset = 0
        self.pipe.send_bytes(pickle.dumps(call, 5))

    def receive(self) -> Any:
        """The next message of the executor, an outcome among them.

        Raises:
            EOFError: it is gone.
        """
        try:
            message = pickle.loads(self.pipe.recv_bytes())
        except OSError as error:
            raise EOFError from error
        if isinstance(message, Step):
            self.step = message.text
        elif isinstance(message, Ready):
            self.ready = message
        elif isinstance(message, NotStarted):
            self.failed = message
        return message

    def new_outcomes(self) -> list[Outcome]:
        """Outcomes the journal has got since the last look."""
        found, self._offset = self.journal.outcomes(self._offset)
        return [pickle.loads(data) for data in found]

    def running(self) -> Running | None:
        """The body that runs now, or that ran when the executor died."""
        return self.journal.running()

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
        self.pipe.close()
        if code == EXIT_DEVICE_BROKEN:
            return "its CUDA context broke"
        if code >= 0:
            return f"exit code {code}"
        return f"signal {-code} ({signal.Signals(-code).name})"

    def close(self) -> None:
        """Forget the journal; after `reap` and the last `running`."""
        os.close(self.exit_fd)
        self.journal.close()


def is_outcome(message: Any) -> bool:
    """Whether a message is an outcome too large for the journal."""
    return isinstance(message, Succeeded | Failed)
