"""Whether the Ray head is there, away for a while, or gone for good; asked once per beat.

Calls to actors that are known already need no head, so a driver goes on without one: what runs is finished, and what
comes is started on warm actors. It is of no more use once the head has been away for too long, or has come back as
another cluster: then Ray would end this process by itself, in the middle of whatever it does.
"""

import enum
import logging
import os
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

#: Ray ends its own processes when the head was away for this long, in seconds; their environment may say otherwise.
RAY_WAITS_S = 60.0
#: Ours end before Ray would end them, in seconds.
MARGIN_S = 10.0
#: Where Ray reads it, in seconds.
VARIABLE = "RAY_gcs_rpc_server_reconnect_timeout_s"


class Head(enum.Enum):
    """The head as this process should treat it."""

    HERE = "here"
    AWAY = "away"
    GONE = "gone"


class HeadWatch:
    """Remembers since when the head is away, and which cluster it was the head of.

    Args:
        answers: whether something listens at the head's address.
        identity: which cluster the head there is of; None while it cannot say. Asked at first and after each absence.
        wait_s: an absence longer than this is for good.
    """

    def __init__(self, answers: Callable[[], bool], identity: Callable[[], str | None], wait_s: float) -> None:
        self._answers = answers
        self._identity = identity
        self._wait_s = wait_s
        self._cluster = identity()
        self._away_since: float | None = None

    def look(self) -> Head:
        """One probe."""
        is_there = self._answers()
        if self._away_since is None:
            if is_there:
                return Head.HERE
            self._away_since = time.monotonic()
            logger.warning("Ray's head does not answer: GPU tasks go on for up to %g s without it", self._wait_s)
        found = self._identity() if is_there else None
        if found is not None:
            return self._return(found)
        return Head.GONE if time.monotonic() - self._away_since >= self._wait_s else Head.AWAY

    def _return(self, found: str) -> Head:
        self._away_since = None
        if found != self._cluster:
            logger.warning("Ray's head has come back with nothing of what it knew: actors are to be created anew")
            return Head.GONE
        logger.warning("Ray's head is back, and knows its nodes and actors")
        return Head.HERE


def outlast(wait_s: float) -> None:
    """Have Ray wait longer than we do; before Ray is imported. A value that is set already stays."""
    os.environ.setdefault(VARIABLE, f"{max(RAY_WAITS_S, wait_s + MARGIN_S):.0f}")
