"""The executors of one actor: which releases have one, which starts or ends next, and when the GPU is fenced.

The shell tells which calls wait and which executor has a call; calls themselves are not touched here. All access is
under the actor's lock, and executors are started on its supervisor thread, because the kernel ends them with it.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from actors.actor.breaker import Breaker, BreakerRules
from actors.actor.child import Child
from actors.contract import STEP_DEVICE, ActorState, Config, NotStarted, StoreConfig
from actors.gateway import Lender

#: Executors at once: the release in use and the one that takes over.
MAX_CHILDREN = 2
#: An executor of a release nobody has called for this long ends, once a newer one is there.
RETIRE_AFTER_S = 30.0
#: First and longest pause between attempts to start an executor.
BACKOFF_S = (0.5, 30.0)
#: After this many failed starts in a row, queued calls are handed back to their drivers.
START_ATTEMPTS = 3
#: An executor whose device has not become warm after this long is ended: the device hangs; in seconds.
WARM_DEVICE_S = 120.0


class Gone(NamedTuple):
    """How an executor has ended, and what follows from a start that failed."""

    how: str
    fences: bool = False  # the GPU
    hopeless: str | None = None  # why its release does not start, after so many attempts that no call waits for more


class Children:
    """An actor's executors, at most one of each release; iterating gives their `Child`ren.

    Args:
        actor: its number.
        reach_ray: gives executors Ray's object store.
    """

    def __init__(self, actor: int, rules: BreakerRules, reach_ray: Callable[[StoreConfig], Lender] | None) -> None:
        self.breaker = Breaker(rules)
        self.generation = self.recycled = 0
        self._actor = actor
        self._reach_ray = reach_ray
        self._configs: dict[str, Config] = {}
        self._latest = ""  # the release of the last hello
        self._by_release: dict[str, Child] = {}
        self._used_at: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._retry_at: dict[str, float] = {}
        self._reasons: dict[str, str] = {}
        self._has_cuda = False  # an executor has had a GPU here
        self._room = MAX_CHILDREN  # executors that the device has memory for together, as far as is known

    def __iter__(self) -> Iterator[Child]:
        return iter(self._by_release.values())

    def __contains__(self, child: Child) -> bool:
        return self._by_release.get(child.release.id) is child

    def of(self, release: str) -> Child | None:
        """The executor of a release, ready or not."""
        return self._by_release.get(release)

    def ready(self, release: str) -> Child | None:
        """The executor of a release once it is warm."""
        child = self._by_release.get(release)
        return child if child is not None and child.ready is not None else None

    # releases

    def knows(self, release: str) -> bool:
        """Whether a driver has said how this release is started."""
        return release in self._configs

    def learn(self, config: Config) -> None:
        """A driver wants this release."""
        self._configs[config.release.id] = config
        self._latest = config.release.id

    def greet(self) -> None:
        """A new driver is there: a device that never started may have been repaired."""
        if self.breaker.greet(time.monotonic()):
            self._failures.clear()
            self._retry_at.clear()

    # start and end

    def supply(self, waiting: Iterable[str], of_drivers: Collection[str], busy: Child | None, is_closing: bool) -> None:
        """Start the executors that are needed, and end those that are not.

        Args:
            waiting: releases of waiting calls, the first call's first.
            of_drivers: releases of living drivers.
            busy: the executor that has a call.
        """
        latest = [self._latest] if self._latest and not is_closing else []  # an actor that ends warms nothing up
        wanted = list(dict.fromkeys([*waiting, *latest]))
        now = time.monotonic()
        self._retire(wanted, of_drivers, busy, now)
        for release in wanted:
            if release in self._by_release or now < self._retry_at.get(release, 0.0):
                continue
            if len(self._by_release) >= (1 if self.breaker.is_fenced else self._room):
                break
            if not self.breaker.may_start(now):
                break
            self.generation += 1
            config = self._config_of(release)
            self._by_release[release] = Child(config, self._reach_ray(config.stores) if self._reach_ray else None)

    def _config_of(self, release: str) -> Config:
        """Where there was a GPU, no executor may take NumPy instead: the GPU is broken, and tasks belong elsewhere."""
        config = self._configs[release]._replace(actor=self._actor)
        return config._replace(device="cuda") if self._has_cuda and config.device == "auto" else config

    def _retire(self, wanted: list[str], of_drivers: Collection[str], busy: Child | None, now: float) -> None:
        """End executors nobody needs: of releases without a living driver, or to make room for the next call's."""
        needed = {*wanted, *of_drivers}
        missing = next((release for release in wanted if release not in self._by_release), None)
        crowded = missing is not None and len(self._by_release) >= self._room
        idle = [child for child in self if not child.planned_end and child is not busy]
        for child in sorted(idle, key=self._last_used):
            release = child.release.id
            if crowded and release != wanted[0]:
                child.kill("retired")
                crowded = False
            elif release not in needed and now - self._last_used(child) > RETIRE_AFTER_S and self.ready(self._latest):
                child.kill("retired")

    def _last_used(self, child: Child) -> float:
        return self._used_at.get(child.release.id, child.started_at)

    def call_ended(self, child: Child) -> None:
        """An executor has done its call; one that is full is replaced."""
        self._used_at[child.release.id] = time.monotonic()
        if child.full:
            print(f"the executor of GPU actor {self._actor} is replaced: {child.full}", flush=True)  # noqa: T201
            self.recycled += 1
            child.kill("recycled")

    def end(self, why: str) -> None:
        """End all of them at once."""
        for child in self:
            child.kill(why)

    # what they say, and how they end

    def heard(self, child: Child) -> None:
        """An executor has said something; one that is warm ends all doubts about its start."""
        if child.ready is None:
            return
        self._failures.pop(child.release.id, None)
        self._reasons.pop(child.release.id, None)
        if not child.planned_end:  # else what it had said before it was ended would end the fence
            self.breaker.started()
        self._has_cuda = self._has_cuda or child.ready.device["kind"] == "cuda"

    def look_at_starting(self, now: float) -> None:
        """A device that hangs when it is touched does not answer at all: end its executor."""
        for child in self:
            is_stuck = child.ready is None and child.step == STEP_DEVICE and now - child.step_since > WARM_DEVICE_S
            if is_stuck and child.failed is None:
                child.failed = NotStarted(f"the device was not warm after {WARM_DEVICE_S:g} s", device=True)
                child.process.kill()

    def bury(self, child: Child) -> Gone:
        """An executor is gone, and its release has none; what its journal says can still be read."""
        how = child.reap()
        del self._by_release[child.release.id]
        if child.ready is not None or child.planned_end:
            return Gone(how)
        reason = child.failed.reason if child.failed else f"its process ended while {child.step}: {how}"
        failures = self._note_failed_start(child.release.id, reason)
        return Gone(how, self._start_fences(child, reason), reason if failures >= START_ATTEMPTS else None)

    def _note_failed_start(self, release: str, reason: str) -> int:
        failures = self._failures[release] = self._failures.get(release, 0) + 1
        first, longest = BACKOFF_S
        self._retry_at[release] = time.monotonic() + min(longest, first * 2 ** (failures - 1))
        self._reasons[release] = f"{reason} (attempt {failures})"
        return failures

    def _start_fences(self, child: Child, reason: str) -> bool:
        """Whether the GPU is to be fenced."""
        is_device = child.failed.device if child.failed else child.step == STEP_DEVICE
        if self._by_release:  # the GPU works for another release: at most there is no room for both
            self._room = 1 if child.failed and child.failed.memory else self._room
            return False
        if child.failed and child.failed.memory:
            return False  # somebody else has it, or too much is wanted of it
        return is_device and self.breaker.start_failed(reason, time.monotonic())

    # what is known of them

    def due(self) -> list[float]:
        """When executors may be started again, as `time.monotonic`; past times among them."""
        return [*self._retry_at.values(), self.breaker.probe_at]

    def is_one_starting(self) -> bool:
        """Whether an executor is not warm yet."""
        return any(child.ready is None for child in self)

    def state(self, release: str) -> tuple[ActorState, str]:
        """What can be done for a release, and why or how far."""
        child = self.of(release)
        if self.breaker.is_fenced:
            return ActorState.FENCED, self.breaker.reason
        if child is not None and child.ready is not None:
            return ActorState.READY, ""
        if release in self._reasons:
            return ActorState.FAILING, self._reasons[release]
        if child is None and release in self._configs and release != self._latest:
            return ActorState.READY, "its executor starts with the next call"
        return ActorState.STARTING, child.step if child else "queued"

    def failed_starts(self, release: str) -> int:
        """How many in a row."""
        return self._failures.get(release, 0)

    def probe_in_s(self) -> float | None:
        """Until a fenced GPU is tried again."""
        return max(0.0, self.breaker.probe_at - time.monotonic()) if self.breaker.is_fenced else None
