"""What a body logs and prints travels back, bounded; the driver logs it as Celery would have.

Lines of a short body travel with its outcome; a longer one's are told while it runs, so that a hanging body can be
followed, and one that is killed has left its last words.

Ray shows a driver only the output of actors it created itself, and actors here outlive their creators.
"""

import logging
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from actors.contract import LogLine

#: What a line costs beside its text, so that empty lines are bounded, too.
LINE_BYTES = 64
#: What every record has; anything else is the caller's ``extra``.
_USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime"}
#: A line of a running body is told after this, in seconds, with all that came meanwhile.
TELL_AFTER_S = 0.3


class Output:
    """Stands for stdout or stderr while the app is imported: who keeps it then writes where the bodies' output goes."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)


class LogCapture(logging.Handler):
    """Collects the log records of the body that runs now; at any other time they go to this process's stderr."""

    def __init__(self, level: int, limit_bytes: int, tell: Callable[[list[LogLine]], None]) -> None:
        super().__init__()
        self._tell = tell
        self._has_lines = threading.Event()
        self._level = level or logging.WARNING
        self._limit = limit_bytes
        self._lines: list[LogLine] | None = None
        self._room = 0

    def install(self, app: Any) -> None:
        """Become the root logger's only handler; prints are logged as Celery's workers log them."""
        root = logging.getLogger()
        for logger in [each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger)]:
            logger.handlers[:] = []  # the driver's loggers have the same ones, and call them
            logger.propagate = True
        root.handlers[:] = [self]
        root.setLevel(self._level)
        if app.conf.worker_redirect_stdouts:
            kept = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Output)]
            logger = logging.getLogger("celery.redirected")
            app.log.redirect_stdouts_to_logger(logger, app.conf.worker_redirect_stdouts_level)
            for stream in kept:
                stream.target = sys.stdout
        threading.Thread(target=self._tell_lines, name="logs", daemon=True).start()
        os.register_at_fork(after_in_child=self._forget_thread)

    def start(self) -> None:
        """A body starts."""
        self._lines = []
        self._room = self._limit

    def take(self) -> tuple[LogLine, ...]:
        """What the body logged; further lines go to stderr."""
        with self.lock:  # type: ignore[union-attr]  # what is being told leaves before the outcome does
            lines, self._lines = self._lines or [], None
        return tuple(lines)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line while there is room; the last one kept says that more were dropped."""
        try:
            text = self.format(record)
        except Exception as error:
            text = f"(a log record could not be formatted: {error!r})"
        if self._lines is None:
            if sys.__stderr__ is not None:
                sys.__stderr__.write(f"{record.levelname} {record.name}: {text}\n")
        elif self._room > 0:
            self._room -= len(text) + LINE_BYTES
            if self._room <= 0:
                text = text[: self._limit] + " … (more output of this task was dropped)"
            where = record.pathname, record.lineno, record.funcName or ""
            of_task = _is_of_task(record.name)
            line = LogLine(record.levelno, record.name, text, of_task, record.created, where, _extra(record))
            self._lines.append(line)
            self._has_lines.set()

    def _forget_thread(self) -> None:
        self._has_lines = threading.Event()  # the thread that has not come along may hold its lock

    def _tell_lines(self) -> None:
        while self._has_lines.wait():
            time.sleep(TELL_AFTER_S)
            self._has_lines.clear()
            with self.lock:  # type: ignore[union-attr]
                if self._lines:
                    self._tell(self._lines)
                    self._lines = []


def _extra(record: logging.LogRecord) -> bytes:
    """What a record has beyond every other, as far as it can travel."""
    found = {name: value for name, value in vars(record).items() if name not in _USUAL}
    if not found:
        return b""
    try:
        return pickle.dumps(found, 5)
    except Exception:
        return pickle.dumps({name: str(value) for name, value in found.items()}, 5)


def _is_of_task(name: str) -> bool:
    """Whether Celery formats the logger's lines with the task's name and id."""
    logger: logging.Logger | None = logging.getLogger(name)
    while logger is not None and logger.name != "celery.task":
        logger = logger.parent
    return logger is not None
