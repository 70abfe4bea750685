"""What a body logs and prints travels with its outcome, bounded; the driver logs it as Celery would have.

Ray shows a driver only the output of actors it created itself, and actors here outlive their creators.
"""

import logging
import sys
from typing import Any

from actors.contract import LogLine

#: What a line costs beside its text, so that empty lines are bounded, too.
LINE_BYTES = 64


class LogCapture(logging.Handler):
    """Collects the log records of the body that runs now; at any other time they go to this process's stderr."""

    def __init__(self, level: int, limit_bytes: int) -> None:
        super().__init__()
        self._level = level or logging.WARNING
        self._limit = limit_bytes
        self._lines: list[LogLine] | None = None
        self._room = 0

    def install(self, app: Any) -> None:
        """Become the root logger's only handler; prints are logged as Celery's workers log them."""
        root = logging.getLogger()
        root.handlers[:] = [self]
        root.setLevel(self._level)
        if app.conf.worker_redirect_stdouts:
            logger = logging.getLogger("celery.redirected")
            app.log.redirect_stdouts_to_logger(logger, app.conf.worker_redirect_stdouts_level)

    def start(self) -> None:
        """A body starts."""
        self._lines = []
        self._room = self._limit

    def take(self) -> tuple[LogLine, ...]:
        """What the body logged; further lines go to stderr."""
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
            self._lines.append(LogLine(record.levelno, record.name, text))
