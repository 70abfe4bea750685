"""The actors: called, and asked how they are; Ray's errors turned into ours. Which ones there are is `known_actors.py`.

A helper thread does what can block (connect, `cluster.py`; look up, create, beat); small submits happen on the
caller's thread. Ray's callbacks arrive on Ray's own I/O thread and only hand their result to `notify`, which must do no
more than queue it.
"""

import logging
import pickle
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import ray

from actors import frames
from actors.contract import ActorState, Call, Config, Health, Reason
from bridge.driver.cluster import answers, connect, find_cluster, identity, look
from bridge.driver.head import Head, HeadWatch
from bridge.driver.known_actors import KnownActor, KnownActors
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
from bridge.places import Needs
from bridge.settings import Settings

logger = logging.getLogger(__name__)

#: An actor that has not answered a beat for this long takes no calls, in seconds.
SILENT_S = 10.0

Notify = Callable[[FleetEvent], None]


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
        self._cluster: Connected | None = None
        self._notify: Notify = lambda _event: None
        self._actors = KnownActors(settings, namespace, needs, lambda slot: self._notify(ActorReleased(slot)))
        self._events: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="fleet-large")
        self._address = ""
        self._head = Head.HERE

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
        known = self._actors.get(slot)  # once: the helper may forget it meanwhile
        if known is not None:
            try:
                getattr(known.handle, method).remote(*args)
            except Exception as error:
                logger.warning("GPU actor %d could not be told to %s: %s", slot, method, as_text(error))

    def want(self, accelerators: set[str]) -> None:
        """Tasks wait for actors of these kinds: there may be more of them, within the settings' bounds."""
        if "" in accelerators and "" not in self._needs.kinds:
            accelerators = accelerators | set(self._needs.kinds)  # a map over GPU tasks: any actor will do
        self._actors.wanted = frozenset(accelerators)

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
            ref = submit(self._actors[slot].handle)
        except Exception as error:
            self._notify(Replied(call, None, as_text(error), sent))
            return
        _when_done(ref, lambda value, error: self._notify(Replied(call, value and pickle.loads(value), error)))

    def _fetch(self, slot: int, token: str) -> None:
        try:
            data = ray.get(self._actors[slot].handle.fetch.remote(token))
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
                    self._actors.restart_all()
                else:
                    self._guard(self._hear, *answer)
                continue
            except queue.Empty:
                next_beat = time.monotonic() + self._settings.beat_s
            if self._head is Head.HERE and answers(self._address):  # with the head away a look-up would hang
                self._guard(self._actors.restart_next)
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
            now = look(self._address)
            if now != self._cluster:
                self._cluster = now
                self._notify(now)
            self._actors.count_gpus()
            self._actors.look()
        except Exception as error:
            logger.warning("Ray did not answer a beat: %s", as_text(error))

    def _ask_all(self) -> None:
        """Each actor's health; it renews this driver's lease there, too."""
        waits = f"waits in Ray for {self._needs.share:g} GPU and {self._settings.actor_cpus:g} CPUs (BRIDGE_ACTOR_CPUS)"
        for slot, known in self._actors.items():
            self._ask(slot, known)
            has_left = not known.greeted and self._actors.is_beyond(known.place)
            if known.asked_at is not None and time.monotonic() - known.asked_at > SILENT_S and not has_left:
                self._notify(SlotChanged(slot, None, "does not answer" if known.greeted else waits))

    def _ask(self, number: int, slot: KnownActor) -> None:
        if slot.asked_at is not None:
            return
        slot.asked_at = time.monotonic()
        if slot.greeted:
            ref = slot.handle.health.remote(self._driver, self._config.release.id)
        else:
            ref = slot.handle.hello.remote(self._driver, self._supersedes, self._config)
        _when_done(ref, lambda value, error: self._events.put((number, (slot, error if value is None else value))))

    def _hear(self, number: int, said: tuple[KnownActor, Any]) -> None:
        slot, answer = said
        if self._actors.get(number) is not slot:
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
            if has_ended and not self._actors.belongs(slot.place):
                self._actors.release(number)
                return
            if has_ended:
                self._actors.forget(number)
            self._notify(SlotChanged(number, None, str(answer)))


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
