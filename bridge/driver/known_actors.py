"""Which actors there are, as this driver knows them: adopted, created, taken back, restarted one by one.

Only the fleet's helper thread changes anything here; how many there should be is said by `bridge/places.py`.
"""

import logging
import math
import re
import time
from collections.abc import Callable
from typing import Any

import ray

from actors.actor import gpu_actor
from actors.actor.breaker import BreakerRules
from actors.actor.entries import Limits
from bridge.places import KIND_SIZE, Bounds, Needs, Place, bounds, missing, nodes, places
from bridge.settings import Settings

logger = logging.getLogger(__name__)

#: States of an actor that waits in Ray for a GPU.
_HOMELESS = ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "RESTARTING")
#: How `Place.name` names actors.
_NAME = re.compile(r"gpu-(?:(?P<kind>.+)-)?(?P<number>\d+)-v\d+")


class KnownActor:
    """One actor as seen from here; `handle` is read by the driver's loop."""

    def __init__(self, place: Place, handle: Any, is_own: bool) -> None:
        self.place = place
        self.handle = handle
        self.is_own = is_own  # asked for by this driver
        self.asked_at: float | None = None  # since when a hello or beat is on its way
        self.greeted = False
        self.pid = 0  # of the actor's process, once heard
        self.ready = False
        self.fenced = False


class KnownActors:
    """All actors of the namespace that this driver has created or found; by slot.

    Args:
        released: is told the slot of one that has ended for good.
    """

    def __init__(self, settings: Settings, namespace: str, needs: Needs, released: Callable[[int], None]) -> None:
        self._settings = settings
        self._namespace = namespace
        self._needs = needs
        self._released = released
        self.wanted: frozenset[str] = frozenset()  # kinds that tasks wait for; written by the loop
        self._bounds = dict.fromkeys(needs.kinds, Bounds(0, 0))
        self._slots: dict[int, KnownActor] = {}
        self._since: dict[str, float] = {}  # what is not to last -> since when it is so
        self._to_restart: dict[int, int] = {}  # slot -> pid of the actor that is to go

    def __getitem__(self, slot: int) -> KnownActor:
        """Raises KeyError where there is none any more."""
        return self._slots[slot]

    def get(self, slot: int) -> KnownActor | None:
        """The actor of a slot."""
        return self._slots.get(slot)

    def items(self) -> list[tuple[int, KnownActor]]:
        """Slots and actors, at this moment."""
        return list(self._slots.items())

    # one look per beat

    def count_gpus(self) -> None:
        """See how many actors of each kind the cluster has GPUs for."""
        s, fitting = self._settings, places(nodes(ray.nodes()), self._needs)
        self._bounds = {kind: bounds(fit, s.min_actors, s.max_actors) for kind, fit in fitting.items()}

    def look(self) -> None:
        """Adopt, create and end. Whatever Ray raises passes through."""
        self._adopt()
        for kind in reversed(self._needs.kinds):  # "" last: such an actor may be placed on any GPU that is free
            self._fill(kind)
            self._make_room(kind)
            self._withdraw(kind)

    def _adopt(self) -> None:
        """Actors that other workers have created are used, too."""
        for name in ray.util.list_named_actors():
            found = _NAME.fullmatch(name)
            place = Place(found["kind"] or "", int(found["number"])) if found else None
            if place and place.name == name and place.accelerator in self._needs.kinds:
                slot = place.slot(self._needs)
                if slot not in self._slots:
                    self._slots[slot] = KnownActor(place, ray.get_actor(name), is_own=False)

    def _fill(self, kind: str) -> None:
        """Create the actors of a kind that should be there; take back what nobody waits for any more."""
        mine = {slot: known for slot, known in self._slots.items() if known.place.accelerator == kind}
        is_wanted, within = kind in self.wanted, self._bounds[kind]
        pending = [slot for slot, known in mine.items() if not known.pid]
        for number in missing({known.place.number for known in mine.values()}, bool(pending), is_wanted, within):
            place = Place(kind, number)
            self._slots[place.slot(self._needs)] = KnownActor(place, self._create(place), is_own=True)
        for slot, known in mine.items():
            idle_demand = known.is_own and not known.greeted and not is_wanted and not self.belongs(known.place)
            if idle_demand and _state(known.handle) in _HOMELESS:
                ray.kill(known.handle)  # it would show as demand to Ray's autoscaler, and get a GPU for nothing
                self.release(slot)

    def _make_room(self, kind: str) -> None:
        """GPUs have left for long: an actor beyond the others ends if one that is always there waits for a GPU.

        It never ends by itself, since it was created while there were more; a node that came back before its old self
        was known to be gone is enough. A node that is gone for a while costs no warm actor.
        """
        if self._settings.max_actors is not None:
            return  # Ray's autoscaler brings a GPU for whoever waits
        mine = [known for known in self._slots.values() if known.place.accelerator == kind]
        beyond = [known for known in mine if known.ready and self.is_beyond(known.place)]
        waiting = [known for known in mine if not known.ready and self.belongs(known.place)]
        is_crowded = bool(beyond) and any(_state(known.handle) in _HOMELESS for known in waiting)
        if self._lasts(f"crowded {kind}", is_crowded):
            last = max(beyond, key=lambda known: known.place.number)  # every driver says so, of the same one
            last.handle.drain.remote()
            logger.info("GPU actor %s ends: others have left, and one of those that stay waits", last.place.name)

    def _withdraw(self, kind: str) -> None:
        """An actor beyond the GPUs that itself waits for one, for long: who has created it may be gone."""
        if self._settings.max_actors is not None:
            return  # as above
        for slot, known in list(self._slots.items()):
            if known.place.accelerator == kind:
                is_beyond = not known.ready and self.is_beyond(known.place)
                if self._lasts(f"beyond {slot}", is_beyond and _state(known.handle) in _HOMELESS):
                    ray.kill(known.handle)
                    logger.info("GPU actor %s ends: there is no GPU for it", known.place.name)
                    self.release(slot)

    def _lasts(self, what: str, is_so: bool) -> bool:
        """Whether it has been so for longer than an actor may be idle; that is counted anew then."""
        now = time.monotonic()
        if is_so and now - self._since.setdefault(what, now) <= self._settings.keep_idle_s:
            return False
        self._since.pop(what, None)
        return is_so

    # one of them

    def belongs(self, place: Place) -> bool:
        """Whether it is one of those that are always there."""
        return place.number < self._bounds[place.accelerator].least

    def is_beyond(self, place: Place) -> bool:
        """Whether there are fewer GPUs than it would take."""
        return place.number >= self._bounds[place.accelerator].most

    def release(self, slot: int) -> None:
        """It has ended for good."""
        del self._slots[slot]
        self._released(slot)

    def forget(self, slot: int) -> None:
        """It has ended; the next look creates it again, by its name."""
        del self._slots[slot]

    def _create(self, place: Place) -> Any:
        s = self._settings
        keep_idle_s = math.inf if self.belongs(place) else s.keep_idle_s
        limits = Limits(
            s.inline_limit_bytes, s.queued_tasks, s.reply_after_s, s.lease_s, s.keep_warm_s, s.grace_s, keep_idle_s,
            self._needs.share,
            BreakerRules(s.fence_after, s.fence_window_s, s.fence_good_tasks, tuple(s.fence_probe_s)),
        )  # fmt: skip
        options = gpu_actor.options(
            place.name, self._namespace, s.actor_cpus, self._needs.share, place.accelerator or None
        )
        actor: Any = gpu_actor.GpuActor  # a class to mypy, an actor class to Ray
        return actor.options(**options).remote(place.slot(self._needs), limits)

    # restarts

    def restart_all(self) -> None:
        """Those that are there now are to go, one after the other."""
        self._to_restart = {number: known.pid for number, known in self._slots.items() if known.pid}

    def restart_next(self) -> None:
        """One actor at a time: the next one is drained when the one before is ready again."""
        for number, pid in list(self._to_restart.items()):
            slot = self._slots.get(number)
            if slot is not None and slot.pid == pid:
                slot.handle.drain.remote()
                return
            if slot is not None and self.belongs(slot.place) and not (slot.ready or slot.fenced):
                return
            if slot is None and self._was_kept(number):
                return
            del self._to_restart[number]  # it is another one by now, or its GPU has left the cluster

    def _was_kept(self, slot: int) -> bool:
        kind, number = divmod(slot, KIND_SIZE)
        return self.belongs(Place(self._needs.kinds[kind], number))


def _state(handle: Any) -> str:
    """What Ray's control service says of an actor; Ray has no public way to ask without the dashboard."""
    from ray._private.state import actors

    return str(actors(handle._actor_id.hex()).get("State", ""))
