"""In the driver: a result backend that is away or refuses to store; when it is asked again, and what is said of it."""

import logging
import math
import re
import time
from typing import Any

from redis import exceptions

from bridge.errors import as_text

logger = logging.getLogger(__name__)

#: First and longest pause before it is asked again, in seconds; each is half as long again as the one before.
PAUSES_S = (0.5, 5.0)
#: While it goes on it is said again this often, in seconds.
SAY_AGAIN_S = 60.0
#: What Redis answers when it takes no writes: full, a replica, no disk, too few replicas, an ACL, no master. What
#: concerns one key only, such as WRONGTYPE, is not among them.
_REFUSAL = re.compile(r"\b(OOM|READONLY|MISCONF|NOREPLICAS|NOPERM|MASTERDOWN|CLUSTERDOWN)\b")
#: Where redis-py takes that first word away.
_REFUSALS = (
    exceptions.OutOfMemoryError, exceptions.ReadOnlyError, exceptions.NoPermissionError, exceptions.ClusterDownError,
)  # fmt: skip


def is_refusal(error: BaseException) -> bool:
    """Whether Redis is there and takes no writes now, whatever is written."""
    return isinstance(error, _REFUSALS) or (
        isinstance(error, exceptions.ResponseError) and bool(_REFUSAL.search(str(error)))
    )


def read_refusal(answer: bytes | str) -> exceptions.ResponseError:
    """An error that a script has told as text."""
    text = answer.decode(errors="replace") if isinstance(answer, bytes) else answer
    return exceptions.ResponseError(" ".join(text.lstrip("-").split()))


class Trouble:
    """The pauses of one backend, which grow until something is stored again."""

    def __init__(self) -> None:
        self.text = ""  # the last error while it goes on, for people
        self._pause_s = 0.0
        self._until = 0.0
        self._said_at = -math.inf

    @property
    def due_in_s(self) -> float:
        """Seconds until it may be asked; 0 when it is well."""
        return max(0.0, self._until - time.monotonic())

    def begin(self, error: Any) -> None:
        """It was asked, and has not stored what waits; errors of the same question count once."""
        now = time.monotonic()
        if now < self._until:
            return
        first, longest = PAUSES_S
        self._pause_s = min(longest, self._pause_s * 1.5) or first
        self._until = now + self._pause_s
        self.text = f"{type(error).__name__}: {error}"
        if now - self._said_at >= SAY_AGAIN_S:
            self._said_at = now
            how = "refuses results" if is_refusal(error) else "is away"
            logger.warning("the result backend %s: %s; results wait for it", how, as_text(error))

    def end(self) -> None:
        """It has stored something."""
        if self._pause_s:
            logger.warning("the result backend stores results again")
            self.__init__()  # type: ignore[misc]

    def ask_now(self) -> None:
        """Pause no longer."""
        self._until = 0.0
