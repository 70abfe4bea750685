"""The actors as Ray has them: created, looked after, called; Ray's errors turned into ours. Joining is `cluster.py`.

A helper thread does what can block (connect, look up, create, beat); small submits happen on the caller's thread. Ray's
callbacks arrive on Ray's own I/O thread and only hand their result to `notify`, which must do no more than queue it.
"""

import logging
import math
import pickle
import queue
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import ray

from actors import frames
from actors.actor import gpu_actor
from actors.actor.breaker import BreakerRules
from actors.actor.entries import Limits
from actors.contract import ActorState, Call, Config, Health, Reason
from bridge.driver.cluster import answers, connect, find_cluster, identity, look
from bridge.driver.head import Head, HeadWatch
from bridge.driver.news import (
    ActorReleased,
    ClusterLost,
    Connected,
    Fetched,
    FleetEvent,
    Replied,
    SlotChanged,
    StartFailed,
)  # fmt: skip
from bridge.errors import ClusterNotFound, GpuNotFound, StartupError, as_text
from bridge.places import KIND_SIZE, Bounds, Needs, Place, bounds, missing, nodes, places
from bridge.settings import Settings

logger = logging.getLogger(__name__)

#: States of an actor that waits in Ray for a GPU.
_HOMELESS = ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "RESTARTING")
#: How `Place.name` names actors.
_NAME = re.compile(r"gpu-(?:(?P<kind>.+)-)?(?P<number>\d+)-v\d+")
#: An actor that has not answered a beat for this long takes no calls, in seconds.
SILENT_S = 10.0


Notify = Callable[[FleetEvent], None]


class _Slot:
    """One actor as seen from here; owned by the helper thread, `handle` read by the loop's."""

    def __init__(self, place: Place, handle: Any, is_own: bool) -> None:
        self.place = place
        self.handle = handle
        self.is_own = is_own  # asked for by this driver
        self.asked_at: float | None = None  # since when a hello or beat is on its way
        self.greeted = False
        self.pid = 0  # of the actor's process, once heard
        self.ready = False
        self.fenced = False


class Fleet:
    """All GPU actors of the namespace."""

    def __init__(
        self, settings: Settings, namespace: str, driver: str, supersedes: str, config: Config, needs: Needs
    ) -> None:
        self._settings = settings
        self._namespace = namespace
        self._driver = driver
        self._supersedes = supersedes
        self._config = config
        self._needs = needs
        self._bounds = dict.fromkeys(needs.kinds, Bounds(0, 0))
        self._wanted: frozenset[str] = frozenset()  # kinds that tasks wait for; written by the loop
        self._cluster: Connected | None = None
        self._notify: Notify = lambda _event: None
        self._slots: dict[int, _Slot] = {}
        self._since: dict[str, float] = {}  # what is not to last -> since when it is so
        self._events: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="fleet-large")
        self._address = ""
        self._head = Head.HERE
        self._to_restart: dict[int, int] = {}  # slot -> pid of the actor that is to go

    def start(self, notify: Notify, patient: bool) -> None:
        """Connect in the background; a `patient` fleet waits for a cluster for ever."""
        self._notify = notify
        threading.Thread(target=self._help, args=(patient,), name="fleet", daemon=True).start()

    # calls, from the driver's loop

    def submit(self, slot: int, call: Call) -> None:
        """Send a call; the answer arrives as Replied."""
        if sum(task.size_bytes for task in call.tasks) > self._settings.inline_limit_bytes:
            self._pool.submit(self._submit, slot, call)  # a large argument blocks while it is copied to the store
        else:
            self._submit(slot, call)

    def collect(self, slot: int, call: Call) -> None:
        """Ask for what an earlier call has not answered; the answer arrives as Replied."""
        slim = call._replace(tasks=tuple(task._replace(payload=b"", texts=()) for task in call.tasks))
        # Should it not leave: an earlier call has, so the tasks may be running.
        data, wait_s = pickle.dumps(slim, 5), self._settings.collect_wait_s
        self._call(slot, call.id, lambda actor: actor.collect.remote(data, wait_s), sent=True)

    def fetch(self, slot: int, token: str) -> None:
        """Get a large outcome; it arrives as Fetched."""
        self._pool.submit(self._fetch, slot, token)

    def cancel(self, slot: int, call: str, tokens: list[str], how: Reason) -> None:
        """Withdraw or interrupt tasks of a call; their outcomes say what became of them."""
        self._say(slot, "cancel", call, tokens, how)

    def forget(self, slot: int, call: str, tokens: list[str]) -> None:
        """A call's answer is lost: should its actor live, it must not keep what nobody will ask for again.

        Args:
            slot: the actor.
            call: id of the call.
            tokens: tasks of which nothing has been heard.
        """
        self._say(slot, "forget", call, tokens)

    def _say(self, slot: int, method: str, *args: Any) -> None:
        """Tell an actor something that has no answer; one that is gone need not hear it."""
        known = self._slots.get(slot)  # once: the helper may forget it meanwhile
        if known is not None:
            try:
                getattr(known.handle, method).remote(*args)
            except Exception as error:
                logger.warning("GPU actor %d could not be told to %s: %s", slot, method, as_text(error))

    def want(self, accelerators: set[str]) -> None:
        """Tasks wait for actors of these kinds: there may be more of them, within the settings' bounds."""
        if "" in accelerators and "" not in self._needs.kinds:
            accelerators = accelerators | set(self._needs.kinds)  # a map over GPU tasks: any actor will do
        self._wanted = frozenset(accelerators)

    def restart_actors(self) -> None:
        """Drain and restart the actors that are there now, one at a time; also when other drivers are told the same."""
        self._events.put((-1, None))

    def close(self) -> None:
        """Leave the cluster; actors stay warm."""
        self._events.put(None)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if ray.is_initialized():
            ray.shutdown()

    def _submit(self, slot: int, call: Call) -> None:
        data, parts = frames.dump_apart(call)
        rest = [[numpy.frombuffer(part, numpy.uint8) for part in parts]] if parts else []
        self._call(slot, call.id, lambda actor: actor.run.remote(data, self._settings.collect_wait_s, *rest))

    def _call(self, slot: int, call: str, submit: Callable[[Any], Any], sent: bool = False) -> None:
        try:
            ref = submit(self._slots[slot].handle)
        except Exception as error:
            self._notify(Replied(call, None, as_text(error), sent))
            return
        _when_done(ref, lambda value, error: self._notify(Replied(call, value and pickle.loads(value), error)))

    def _fetch(self, slot: int, token: str) -> None:
        try:
            data = ray.get(self._slots[slot].handle.fetch.remote(token))
        except Exception as error:
            logger.warning("a large result is lost with its actor: %s", as_text(error))
            data = None
        self._notify(Fetched(token, data))

    # the helper thread

    def _help(self, patient: bool) -> None:
        try:
            self._address = self._find(patient)
            self._cluster = connect(self._address, self._namespace, self._settings.start_wait_s)
            self._require_gpu(patient)
            self._notify(self._cluster)
        except StartupError as error:
            self._notify(StartFailed(error))
            return
        except Exception as error:
            logger.exception("the fleet's start broke")
            self._notify(StartFailed(ClusterNotFound(f"Ray could not be used: {as_text(error)}")))
            return
        watch = HeadWatch(lambda: answers(self._address), lambda: identity(self._address), self._settings.head_wait_s)
        threading.Thread(target=self._watch_head, args=(watch,), name="head", daemon=True).start()
        next_beat = 0.0
        while True:
            try:
                answer = self._events.get(timeout=max(0.0, next_beat - time.monotonic()))
                if answer is None:
                    return
                if answer[0] < 0:
                    self._to_restart = {number: slot.pid for number, slot in self._slots.items() if slot.pid}
                else:
                    self._guard(self._hear, *answer)
                continue
            except queue.Empty:
                next_beat = time.monotonic() + self._settings.beat_s
            if self._head is Head.HERE and answers(self._address):  # with the head away a look-up would hang
                self._guard(self._restart_next)
                self._guard(self._beat)
            self._guard(self._ask_all)  # actors hear and answer without a head

    def _watch_head(self, watch: HeadWatch) -> None:
        """On a thread of its own, for a beat in the middle of which the head goes hangs until Ray itself gives up."""
        while self._head is not Head.GONE:
            time.sleep(self._settings.beat_s)
            self._guard(self._look_at_head, watch)
        self._notify(ClusterLost())

    def _look_at_head(self, watch: HeadWatch) -> None:
        self._head = watch.look()

    def _guard(self, step: Callable[..., None], *args: Any) -> None:
        """One step of a thread of ours; an error in it must not end what that thread does for good."""
        try:
            step(*args)
        except Exception:
            logger.exception("a look at the cluster or its GPU actors failed; it is tried again")

    def _find(self, patient: bool) -> str:
        """The head's address, once something listens there."""
        deadline, given, is_said = time.monotonic() + self._settings.connect_wait_s, self._settings.ray_address, False
        while True:
            try:
                address = find_cluster(given)
                if answers(address):
                    return address
                problem = f"nothing answers at {address}"
            except ClusterNotFound as error:
                problem = str(error)
            if not patient and time.monotonic() > deadline:
                raise ClusterNotFound(
                    f"no Ray cluster: {problem}. Start one with `ray start --head` "
                    "(and --port=6380 where Redis holds 6379), or set BRIDGE_RAY_ADDRESS=host:port"
                )
            if patient and not is_said:
                is_said = True  # this process cannot learn of another address: its environment stays as it is
                moved = "; if its head has moved, restart this worker with the new BRIDGE_RAY_ADDRESS" if given else ""
                logger.warning("no Ray cluster: %s; GPU tasks wait until there is one%s", problem, moved)
            time.sleep(0.5)

    def _require_gpu(self, patient: bool) -> None:
        may_grow = self._settings.max_actors is not None  # Ray's autoscaler is to bring GPUs
        if not patient and not may_grow and not self._cluster.gpus:  # type: ignore[union-attr]  # it is connected
            raise GpuNotFound(
                f"the Ray cluster at {self._address} offers no GPU: join a GPU node with "
                f"`ray start --address={self._address}`, or start it with `--num-gpus=1` for a logical GPU"
            )

    def _beat(self) -> None:
        """One look at the cluster; actors that are missing are created."""
        try:
            self._look_at_cluster()
            self._adopt()
            for kind in reversed(self._needs.kinds):  # "" last: such an actor may be placed on any GPU that is free
                self._fill(kind)
                self._make_room(kind)
                self._withdraw(kind)
        except Exception as error:
            logger.warning("Ray did not answer a beat: %s", as_text(error))

    def _ask_all(self) -> None:
        """Each actor's health; it renews this driver's lease there, too."""
        waits = f"waits in Ray for {self._needs.share:g} GPU and {self._settings.actor_cpus:g} CPUs (BRIDGE_ACTOR_CPUS)"
        for slot, known in list(self._slots.items()):
            self._ask(slot, known)
            has_left = not known.greeted and known.place.number >= self._bounds[known.place.accelerator].most
            if known.asked_at is not None and time.monotonic() - known.asked_at > SILENT_S and not has_left:
                self._notify(SlotChanged(slot, None, "does not answer" if known.greeted else waits))

    def _look_at_cluster(self) -> None:
        now = look(self._address)
        if now != self._cluster:
            self._cluster = now
            self._notify(now)
        s, fitting = self._settings, places(nodes(ray.nodes()), self._needs)
        self._bounds = {kind: bounds(fit, s.min_actors, s.max_actors) for kind, fit in fitting.items()}

    def _adopt(self) -> None:
        """Actors that other workers have created are used, too."""
        for name in ray.util.list_named_actors():
            found = _NAME.fullmatch(name)
            place = Place(found["kind"] or "", int(found["number"])) if found else None
            if place and place.name == name and place.accelerator in self._needs.kinds:
                slot = place.slot(self._needs)
                if slot not in self._slots:
                    self._slots[slot] = _Slot(place, ray.get_actor(name), is_own=False)

    def _fill(self, kind: str) -> None:
        """Create the actors of a kind that should be there; take back what nobody waits for any more."""
        mine = {slot: known for slot, known in self._slots.items() if known.place.accelerator == kind}
        is_wanted, within = kind in self._wanted, self._bounds[kind]
        pending = [slot for slot, known in mine.items() if not known.pid]
        for number in missing({known.place.number for known in mine.values()}, bool(pending), is_wanted, within):
            place = Place(kind, number)
            self._slots[place.slot(self._needs)] = _Slot(place, self._create(place), is_own=True)
        for slot, known in mine.items():
            idle_demand = known.is_own and not known.greeted and not is_wanted and not self._belongs(known.place)
            if idle_demand and _state(known.handle) in _HOMELESS:
                ray.kill(known.handle)  # it would show as demand to Ray's autoscaler, and get a GPU for nothing
                self._release(slot)

    def _make_room(self, kind: str) -> None:
        """GPUs have left for long: an actor beyond the others ends if one that is always there waits for a GPU.

        It never ends by itself, since it was created while there were more; a node that came back before its old self
        was known to be gone is enough. A node that is gone for a while costs no warm actor.
        """
        if self._settings.max_actors is not None:
            return  # Ray's autoscaler brings a GPU for whoever waits
        mine = [known for known in self._slots.values() if known.place.accelerator == kind]
        beyond = [known for known in mine if known.ready and known.place.number >= self._bounds[kind].most]
        waiting = [known for known in mine if not known.ready and self._belongs(known.place)]
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
                is_beyond = not known.ready and known.place.number >= self._bounds[kind].most
                if self._lasts(f"beyond {slot}", is_beyond and _state(known.handle) in _HOMELESS):
                    ray.kill(known.handle)
                    logger.info("GPU actor %s ends: there is no GPU for it", known.place.name)
                    self._release(slot)

    def _lasts(self, what: str, is_so: bool) -> bool:
        """Whether it has been so for longer than an actor may be idle; that is counted anew then."""
        now = time.monotonic()
        if is_so and now - self._since.setdefault(what, now) <= self._settings.keep_idle_s:
            return False
        self._since.pop(what, None)
        return is_so

    def _belongs(self, place: Place) -> bool:
        """Whether it is one of those that are always there."""
        return place.number < self._bounds[place.accelerator].least

    def _release(self, slot: int) -> None:
        del self._slots[slot]
        self._notify(ActorReleased(slot))

    def _restart_next(self) -> None:
        """One actor at a time: the next one is drained when the one before is ready again."""
        for number, pid in list(self._to_restart.items()):
            slot = self._slots.get(number)
            if slot is not None and slot.pid == pid:
                slot.handle.drain.remote()
                return
            if slot is not None and self._belongs(slot.place) and not (slot.ready or slot.fenced):
                return
            if slot is None and self._was_kept(number):
                return
            del self._to_restart[number]  # it is another one by now, or its GPU has left the cluster

    def _was_kept(self, slot: int) -> bool:
        kind, number = divmod(slot, KIND_SIZE)
        return self._belongs(Place(self._needs.kinds[kind], number))

    def _create(self, place: Place) -> Any:
        s = self._settings
        keep_idle_s = math.inf if self._belongs(place) else s.keep_idle_s
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

    def _ask(self, number: int, slot: _Slot) -> None:
        if slot.asked_at is not None:
            return
        slot.asked_at = time.monotonic()
        if slot.greeted:
            ref = slot.handle.health.remote(self._driver, self._config.release.id)
        else:
            ref = slot.handle.hello.remote(self._driver, self._supersedes, self._config)
        _when_done(ref, lambda value, error: self._events.put((number, (slot, error if value is None else value))))

    def _hear(self, number: int, said: tuple[_Slot, Any]) -> None:
        slot, answer = said
        if self._slots.get(number) is not slot:
            return  # released meanwhile, and perhaps another's by now
        slot.asked_at = None
        slot.ready = isinstance(answer, Health) and answer.state is ActorState.READY
        slot.fenced = isinstance(answer, Health) and answer.state is ActorState.FENCED
        if isinstance(answer, Health):
            slot.pid = answer.pid
            slot.greeted = answer.knows_release  # an actor that came back has forgotten it
            self._notify(SlotChanged(number, answer, ""))
        else:
            slot.greeted = False
            has_ended = "ActorDied" in str(answer)
            if has_ended and not self._belongs(slot.place):
                self._release(number)
                return
            if has_ended:
                del self._slots[number]  # for good: the next beat creates it again by name
            self._notify(SlotChanged(number, None, str(answer)))


def _state(handle: Any) -> str:
    """What Ray's control service says of an actor; Ray has no public way to ask without the dashboard."""
    from ray._private.state import actors

    return str(actors(handle._actor_id.hex()).get("State", ""))


def _when_done(ref: Any, callback: Callable[[Any, str], None]) -> None:
    """Call back with (value, "") or (None, what happened), on Ray's I/O thread."""

    # `held`: nobody else holds the reference. Ray looks up the owner of a value too large to come inline, and ends the
    # whole process when the last reference is gone by then.
    def completed(value: Any, held: Any = ref) -> None:
        if isinstance(value, BaseException):
            callback(None, as_text(value.as_instanceof_cause() if hasattr(value, "as_instanceof_cause") else value))
        else:
            callback(value, "")

    ref._on_completed(completed)  # half the cost of `future()`, which is built on it
