"""The worker as a child process of the demo: start it, notice when it dies, stop it."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

COMMAND = f"{shlex.quote(sys.executable)} -m bridge.worker -A celery_app -Q celery,gpu -c 2 --standalone -l WARNING"

#: Seconds for a warm shutdown, in which running tasks end and Ray and Redis stop; then it is killed.
STOP_TIMEOUT_S = 45.0
#: Lines of output shown when the worker dies; all of it is in the log file.
TAIL_LINES = 40


class WorkerDied(Exception):
    """The worker ended by itself; the text has its exit code and the end of its output."""


class Worker:
    """A running worker. Leaving the ``with`` block stops it, however the block ends."""

    def __init__(self, command: str, broker_url: str, log: Path, echo: Callable[[str], None]) -> None:
        self._command = shlex.split(command)
        self._environment = {**os.environ, "CELERY_BROKER_URL": broker_url, "CELERY_RESULT_BACKEND": broker_url}
        self._log = log
        self._echo = echo
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    def __enter__(self) -> "Worker":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        # In a session of its own: Ctrl-C reaches the demo alone, which then stops the worker in order.
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def check(self) -> None:
        """Raise when the worker has ended.

        Raises:
            WorkerDied: it has.
        """
        code = self._process.poll()
        if code is not None:
            self._reader.join(timeout=2)
            output = "\n".join(self._tail) or "(it printed nothing)"
            raise WorkerDied(f"the worker ended with exit code {code}. The end of its output:\n{output}")

    def stop(self) -> int:
        """SIGTERM, wait for a warm shutdown, and kill what is left; returns the exit code."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._echo(f"no warm shutdown within {STOP_TIMEOUT_S:.0f} s: killed")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
        self._reader.join(timeout=2)
        return code

    def _read(self) -> None:
        stream = self._process.stdout
        if stream is None:
            return
        with stream, self._log.open("w") as log:
            for line in stream:
                log.write(line)
                log.flush()
                self._tail.append(line.rstrip())
                self._echo(line.rstrip())
