"""The drivers of one actor: who is heard of, which release each wants, and when the actor itself may end.

All access is under the actor's lock. Calls are not touched here: of a driver that is gone the shell drops them.
"""

import time
from collections.abc import Collection

from actors.actor.entries import Limits

#: A reply needs this long, in seconds, to leave the process before it may end.
REPLY_LEAVES_S = 0.5


class Leases:
    """Which drivers an actor has, and whether it stays for them."""

    def __init__(self, limits: Limits) -> None:
        self.is_closing = False  # it takes no new calls, and ends
        self._limits = limits
        self._drivers: dict[str, float] = {}  # -> when heard of last
        self._releases: dict[str, str] = {}  # of each driver
        self._superseded: set[str] = set()
        self._untold: set[str] = set()  # drivers that do not know yet that it is closing
        self._heard_at = self._replied_at = self._worked_at = time.monotonic()

    def __contains__(self, driver: str) -> bool:
        return driver in self._drivers

    def hear(self, driver: str) -> None:
        """A driver has said something: its lease begins anew."""
        self._drivers[driver] = self._heard_at = time.monotonic()

    def want(self, driver: str, release: str) -> None:
        """A driver's calls will be of this release."""
        self._releases[driver] = release

    def releases(self) -> Collection[str]:
        """Those that living drivers want."""
        return self._releases.values()

    def supersede(self, driver: str) -> None:
        """Another driver has taken over; whatever this one still sends is refused."""
        self._superseded.add(driver)
        self._drivers.pop(driver, None)
        self._releases.pop(driver, None)

    def is_superseded(self, driver: str) -> bool:
        """Whether another driver has taken over from this one."""
        return driver in self._superseded

    def expire(self, now: float) -> set[str]:
        """Drivers not heard of for too long; from now on they are gone."""
        gone = {driver for driver, heard in self._drivers.items() if now - heard > self._limits.lease_s}
        for driver in gone:
            del self._drivers[driver]
            self._releases.pop(driver, None)
        return gone

    # the actor's end

    def note_reply(self) -> None:
        """A reply is about to leave, which the process must outlive."""
        self._replied_at = time.monotonic()

    def note_told(self, driver: str) -> None:
        """A driver is about to hear how the actor is, and so whether it is closing."""
        if driver in self._untold:
            self._untold.discard(driver)
            self.note_reply()  # the word must leave before the process does

    def drain(self) -> None:
        """Take no new calls; it is over when all drivers have been told."""
        if not self.is_closing:
            self.is_closing = True
            self._untold = set(self._drivers)

    def close(self) -> None:
        """The same, and no driver is waited for."""
        self.is_closing = True
        self._untold.clear()

    def drain_if_idle(self, is_idle: bool) -> None:
        """An actor beyond those that always stay gives its GPU back: it takes no new calls and ends."""
        if not is_idle:
            self._worked_at = time.monotonic()
        elif time.monotonic() - self._worked_at > self._limits.keep_idle_s:
            self.drain()

    def is_over(self) -> bool:
        """Whether an actor that has nothing more to deliver may end."""
        if self.is_closing and not self._untold.isdisjoint(self._drivers):
            return False  # that driver may send a call at any moment
        unwanted = time.monotonic() - self._heard_at > self._limits.keep_warm_s
        return time.monotonic() - self._replied_at > REPLY_LEAVES_S and (self.is_closing or unwanted)
