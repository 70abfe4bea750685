"""The only Ray code on this side: connect, actors, calls, and Ray's errors turned into ours.

A helper thread does what can block (connect, look up, create, beat); small submits happen on the caller's thread. Ray's
callbacks arrive on Ray's own I/O thread and only hand their result to `notify`, which must do no more than queue it.
"""

import logging
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ray
import ray.exceptions

from actors import gpu_actor
from actors.contract import PROTOCOL, ActorState, Busy, Call, Config, Health, Reason, Reply
from actors.entries import Limits
from bridge.auth import TOKEN_FILE, use_token
from bridge.errors import (
    ClusterAuthFailed,
    ClusterMismatch,
    ClusterNotFound,
    GpuNotFound,
    StartupError,
    as_text,
)
from bridge.settings import Settings

logger = logging.getLogger(__name__)

#: The head's port is probed with this deadline, in seconds.
PROBE_S = 1.0
#: The cluster counts as gone after this many failed probes in a row.
PROBES = 5
#: An actor that has not answered a beat for this long takes no calls, in seconds.
SILENT_S = 10.0


class Connected(NamedTuple):
    """This process is a driver of the cluster now."""

    address: str
    ray_version: str
    nodes: int
    gpus: int


class SlotChanged(NamedTuple):
    """An actor's health is new; `health` is None while it does not answer, and `reason` says why."""

    slot: int
    health: Health | None
    reason: str


class ClusterLost(NamedTuple):
    """The head does not answer; this process can never use another cluster."""


class StartFailed(NamedTuple):
    """The fleet cannot start."""

    error: StartupError


class Replied(NamedTuple):
    """A call or collect has come back; `reply` is None when the actor is gone, and `reason` says why."""

    call: str
    reply: Reply | Busy | None
    reason: str
    sent: bool = True  # False when the call never left this process


class Fetched(NamedTuple):
    """A large outcome, pickled; None when its actor is gone."""

    token: str
    data: bytes | None


FleetEvent = Connected | SlotChanged | ClusterLost | StartFailed | Replied | Fetched
Notify = Callable[[FleetEvent], None]


class _Slot:
    """One actor as seen from here; owned by the helper thread, `handle` read by the loop's."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.heard_at = time.monotonic()
        self.asked = False  # a hello or beat is on its way
        self.greeted = False
        self.pid = 0  # of the actor's process, once heard
        self.ready = False


class Fleet:
    """All GPU actors of the namespace."""

    def __init__(self, settings: Settings, namespace: str, driver: str, supersedes: str, config: Config) -> None:
        self._settings = settings
        self._namespace = namespace
        self._driver = driver
        self._supersedes = supersedes
        self._config = config
        self._notify: Notify = lambda _event: None
        self._slots: dict[int, _Slot] = {}
        self._events: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="fleet-large")
        self._address = ""
        self._to_restart: dict[int, int] = {}  # slot -> pid of the actor that is to go

    def start(self, notify: Notify, patient: bool) -> None:
        """Connect in the background; a `patient` fleet waits for a cluster for ever."""
        self._notify = notify
        threading.Thread(target=self._help, args=(patient,), name="fleet", daemon=True).start()

    # calls, from the driver's loop

    def submit(self, slot: int, call: Call) -> None:
        """Send a call; the answer arrives as Replied."""
        if sum(len(task.payload) for task in call.tasks) > self._settings.inline_limit_bytes:
            self._pool.submit(self._submit, slot, call)  # a large argument blocks while it is copied to the store
        else:
            self._submit(slot, call)

    def collect(self, slot: int, call: Call) -> None:
        """Ask for what an earlier call has not answered; the answer arrives as Replied."""
        slim = call._replace(tasks=tuple(task._replace(payload=b"") for task in call.tasks))
        # Should it not leave: an earlier call has, so the tasks may be running.
        self._call(slot, call.id, lambda actor: actor.collect.remote(slim, self._settings.collect_wait_s), sent=True)

    def fetch(self, slot: int, token: str) -> None:
        """Get a large outcome; it arrives as Fetched."""
        self._pool.submit(self._fetch, slot, token)

    def cancel(self, slot: int, call: str, tokens: list[str], how: Reason) -> None:
        """Withdraw or interrupt tasks of a call; their outcomes say what became of them."""
        if slot in self._slots:
            self._slots[slot].handle.cancel.remote(call, tokens, how)

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
        self._call(slot, call.id, lambda actor: actor.run.remote(call))

    def _call(self, slot: int, call: str, submit: Callable[[Any], Any], sent: bool = False) -> None:
        try:
            ref = submit(self._slots[slot].handle)
        except Exception as error:
            self._notify(Replied(call, None, as_text(error), sent))
            return
        _when_done(ref, lambda value, error: self._notify(Replied(call, value, error)))

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
            self._notify(connect(self._address, self._namespace))
            self._require_gpu(patient)
        except StartupError as error:
            self._notify(StartFailed(error))
            return
        except Exception as error:
            logger.exception("the fleet's start broke")
            self._notify(StartFailed(ClusterNotFound(f"Ray could not be used: {as_text(error)}")))
            return
        failed_probes, next_beat = 0, 0.0
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
            failed_probes = 0 if _answers(self._address) else failed_probes + 1
            if failed_probes >= PROBES:
                self._notify(ClusterLost())
                return
            if not failed_probes:  # with the head away a look-up would hang
                self._guard(self._restart_next)
                self._guard(self._beat)

    def _guard(self, step: Callable[..., None], *args: Any) -> None:
        """One step of the helper; an error in it must not end the beats for good."""
        try:
            step(*args)
        except Exception:
            logger.exception("a look at the GPU actors failed; it is tried again")

    def _find(self, patient: bool) -> str:
        """The head's address, once something listens there."""
        deadline = time.monotonic() + self._settings.connect_wait_s
        while True:
            try:
                address = find_cluster(self._settings.ray_address)
                if _answers(address):
                    return address
                problem = f"nothing answers at {address}"
            except ClusterNotFound as error:
                problem = str(error)
            if not patient and time.monotonic() > deadline:
                raise ClusterNotFound(
                    f"no Ray cluster: {problem}. Start one with `ray start --head` "
                    "(and --port=6380 where Redis holds 6379), or set BRIDGE_RAY_ADDRESS=host:port"
                )
            time.sleep(0.5)

    def _require_gpu(self, patient: bool) -> None:
        if not patient and not _gpus():
            raise GpuNotFound(
                f"the Ray cluster at {self._address} offers no GPU: join a GPU node with "
                f"`ray start --address={self._address}`, or start it with `--num-gpus=1` for a logical GPU"
            )

    def _beat(self) -> None:
        """One look at the cluster and every actor."""
        try:
            wanted = range(_gpus())
            for number in wanted:
                if number not in self._slots:
                    self._slots[number] = _Slot(self._create(number))
        except Exception as error:
            logger.warning("Ray did not answer a beat: %s", as_text(error))
            return
        waits = f"waits in Ray for a free GPU and {self._settings.actor_cpus:g} CPUs (BRIDGE_ACTOR_CPUS)"
        for number, slot in list(self._slots.items()):
            if number not in wanted and not slot.greeted:
                continue
            self._ask(number, slot)
            if slot.asked and time.monotonic() - slot.heard_at > SILENT_S:
                self._notify(SlotChanged(number, None, waits if not slot.greeted else "does not answer"))

    def _restart_next(self) -> None:
        """One actor at a time: the next one is drained when the one before is ready again."""
        for number, pid in list(self._to_restart.items()):
            slot = self._slots.get(number)
            if number < _gpus():  # its GPU may have left the cluster
                if slot is not None and slot.pid == pid:
                    slot.handle.drain.remote()
                    return
                if slot is None or not slot.ready:
                    return
            del self._to_restart[number]  # it is another one by now

    def _create(self, slot: int) -> Any:
        s = self._settings
        limits = Limits(s.inline_limit_bytes, s.queued_tasks, s.reply_after_s, s.lease_s, s.keep_warm_s, s.grace_s)
        name = f"gpu-{slot}-v{PROTOCOL}"
        options = gpu_actor.options(name, self._namespace, s.actor_cpus)
        actor: Any = gpu_actor.GpuActor  # a class to mypy, an actor class to Ray
        return actor.options(**options).remote(slot, limits)

    def _ask(self, number: int, slot: _Slot) -> None:
        if slot.asked:
            return
        slot.asked = True
        if slot.greeted:
            ref = slot.handle.health.remote(self._driver, self._config.release.id)
        else:
            ref = slot.handle.hello.remote(self._driver, self._supersedes, self._config)
        _when_done(ref, lambda value, error: self._events.put((number, value if value is not None else error)))

    def _hear(self, number: int, answer: Any) -> None:
        slot = self._slots[number]
        slot.asked = False
        slot.heard_at = time.monotonic()
        slot.ready = isinstance(answer, Health) and answer.state is ActorState.READY
        if isinstance(answer, Health):
            slot.pid = answer.pid
            slot.greeted = answer.knows_release  # an actor that came back has forgotten it
            self._notify(SlotChanged(number, answer, ""))
        else:
            slot.greeted = False
            if "ActorDied" in str(answer):
                del self._slots[number]  # ended for good: the next beat creates it again by name
            self._notify(SlotChanged(number, None, str(answer)))


# ---- Ray's own terms


def find_cluster(address: str | None) -> str:
    """host:port of the Ray head: as given, or of the cluster `ray start` brought up on this host.

    Raises:
        ClusterNotFound: there is none here, or more than one.
    """
    if address:
        return address
    from ray._private import services  # Ray has no public way to ask for the address without connecting

    services.find_gcs_addresses.cache_clear()  # or a cluster that comes up later is never seen
    try:
        return str(services.canonicalize_bootstrap_address_or_die("auto"))
    except (ConnectionError, ValueError) as error:
        text = str(error).partition(". ")[0]
        raise ClusterNotFound(text[0].lower() + text[1:]) from error


def connect(address: str, namespace: str) -> Connected:
    """Make this process a driver of the cluster.

    Raises:
        ClusterNotFound, ClusterAuthFailed, ClusterMismatch: in one line that says what to do.
    """
    token = use_token()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:
        raise _connect_error(error, address, token) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray installs a handler of its own
    return Connected(address, ray.__version__, sum(1 for node in ray.nodes() if node["Alive"]), _gpus())


def _connect_error(error: Exception, address: str, token: str) -> StartupError:
    text = " ".join(str(error).split())
    if "Version mismatch" in text:
        cluster, _, here = text.partition("This process")
        return ClusterMismatch(
            f"Ray or Python differ: cluster {_versions(cluster)}, this worker {_versions(here)}. "
            "Use the same versions of both on every node and in the worker"
        )
    unauthenticated = any(word in text.lower() for word in ("auth", "token", "unauthenticated"))
    if isinstance(error, ray.exceptions.AuthenticationError) or unauthenticated or _answers(address):
        used = f"the token from {token} was refused" if token else "no token was found"
        return ClusterAuthFailed(
            f"the Ray cluster at {address} did not let this worker in: {used}. Copy the head's token "
            f"(`ray get-auth-token` there) to {TOKEN_FILE} with mode 0600, or set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        )
    return ClusterNotFound(f"the Ray cluster at {address} does not answer: {text[:200]}")


def _versions(text: str) -> str:
    words = text.replace(":", " ").split()
    found = [f"{key} {words[words.index(key) + 1]}" for key in ("Ray", "Python") if key in words]
    return ", ".join(found) or text[:80]


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
    except OSError:
        return False
    return True


def _gpus() -> int:
    return int(ray.cluster_resources().get("GPU", 0))


def _when_done(ref: Any, callback: Callable[[Any, str], None]) -> None:
    """Call back with (value, "") or (None, what happened), on Ray's I/O thread."""

    def completed(value: Any) -> None:
        if isinstance(value, BaseException):
            callback(None, as_text(value.as_instanceof_cause() if hasattr(value, "as_instanceof_cause") else value))
        else:
            callback(value, "")

    ref._on_completed(completed)  # half the cost of `future()`, which is built on it
