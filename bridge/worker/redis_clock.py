"""In the worker: Redis' own clock, by which unacknowledged messages are noted and given back.

The wall clocks of hosts differ and jump, and a message noted by one of them looks dead or alive to the others. Redis is
the one place all workers share. Its clock may jump, too, when it is set or another host takes over: this sees it.
"""

import logging
import time
from typing import Any

from redis.exceptions import ResponseError

from bridge.errors import as_text
from bridge.worker.taking import lasts

logger = logging.getLogger(__name__)


def boot_s() -> float:
    """Seconds since this host was started: it never jumps and goes on while the host sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class RedisClock:
    """What the clock of one Redis says, and whether it goes steadily. Outlives the connections it is asked on."""

    def __init__(self) -> None:
        self._said = time.time()  # until Redis is asked: if this host's clock is wrong, the first answer is a jump
        self._asked_at = self._answered_at = boot_s()
        self._steady_at = 0.0
        self._is_refused = False

    @property
    def is_steady(self) -> bool:
        """Whether what is noted can be believed: all who live have noted anew what they hold since the last jump."""
        return boot_s() >= self._steady_at

    def now(self) -> float:
        """What it says about now, in seconds, without asking."""
        return self._said + boot_s() - self._asked_at

    def ask(self, client: Any, timeout_s: float, most_s: float) -> float:
        """What it says now, in seconds; after a jump it is not steady for `timeout_s`.

        Args:
            client: of redis-py.
            timeout_s: seconds in which everybody notes anew what they hold.
            most_s: a jump by no more seconds than this does no harm.

        Raises:
            RedisError, OSError: the connection is gone.
        """
        asked_at = boot_s()
        said = self._read(client)
        answered_at = boot_s()
        passed = said - self._said
        expected = min(max(passed, asked_at - self._answered_at), answered_at - self._asked_at)
        self._said, self._asked_at, self._answered_at = said, asked_at, answered_at
        if abs(passed - expected) > most_s:
            self._steady_at = answered_at + timeout_s
            logger.warning(
                "Redis' clock has jumped by %+.0f s, differs so much from this host's, or this host stood still: what "
                "dead workers held is not looked for within %g s (visibility_timeout)", passed - expected, timeout_s,
            )  # fmt: skip
        return said

    def _read(self, client: Any) -> float:
        try:
            seconds, microseconds = client.time()
        except ResponseError as error:
            if not lasts(error):
                raise
            if not self._is_refused:
                self._is_refused = True
                logger.warning("Redis does not tell its time (%s): this host's clock is used", as_text(error))
            return time.time()
        return float(seconds + microseconds / 1e6)
