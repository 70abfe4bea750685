"""Large data in Ray's object store, for processes that have joined the cluster. One of the few files that import ray.

An object of Ray ends with its last reference and with the process that owns it, and a reference of Ray's can only be
pickled. So a message carries a random id, and one small actor of the namespace, the keeper, keeps Ray's references by
id: for their time to live, up to a limit of bytes, in its memory alone. What must outlive whoever put it the keeper
copies, and so owns it; what is meant for one call of another actor stays its maker's.

Producers come here by `bridge/object_store.py`, GPU actors for their executors by `actors/gateway.py`.
"""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy
import ray
from celery.exceptions import SoftTimeLimitExceeded
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.contract import PROTOCOL, StoreConfig
from actors.data.roots import known_size, name_in
from actors.errors import DataCorrupt, DataError, DataLost, StoreUnavailable
from actors.gateway import patience_s
from actors.sizes import readable

#: Name of the keeper in its namespace.
KEEPER = f"bridge-data-v{PROTOCOL}"
#: A keeper that holds nothing ends when nobody has asked for anything for this long, in seconds.
KEEP_IDLE_S = 60.0
#: References that one keeper holds, at most, however small the data.
MOST_OBJECTS = 100_000
#: A keeper that ends or begins is asked again so many times, after a pause in seconds.
ATTEMPTS, PAUSE_S = 4, 0.2
#: A keeper copies so many objects at once, and so many wait on threads of their own: finding and forgetting goes on.
COPIES, WAITING_COPIES = 4, 64
#: A keeper that has told Ray to end it is gone within this many seconds.
GONE_S = 10.0


class _Kept(NamedTuple):
    ref: Any
    size_bytes: int
    expires_at: float  # as `time.monotonic`


class _NoKeeper(Exception):
    """There is none in the namespace, or none that answers, and what was asked needs no new one."""


@ray.remote(concurrency_groups={"copies": WAITING_COPIES})
class Keeper:
    """Keeps references to objects by id."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._coming: set[str] = set()  # ids of what is being copied, while it is wanted
        self._withdrawn: set[str] = set()  # ids of what has not even come yet, and is not wanted any more
        self._copying = threading.Semaphore(COPIES)
        self._size_bytes = 0  # with what is being copied
        self._asked_at = time.monotonic()
        self._lock = threading.Lock()
        threading.Thread(target=self._tend, name="keeper", daemon=True).start()

    @ray.method(concurrency_group="copies")
    def keep(self, name: str, box: list[Any], size_bytes: int, keep_s: float, limit_bytes: int, is_brief: bool) -> str:
        """Keep the reference in `box` for so long, or a copy of its object; "", or why not.

        Args:
            name: its id.
            box: Ray hands over a reference in a list as it is, and opens one that is an argument itself.
            size_bytes: of the object.
            keep_s: seconds.
            limit_bytes: of all that is kept, at most.
            is_brief: it is good enough that the object ends with the process that put it.
        """
        with self._lock:
            self._asked_at = time.monotonic()
            if name in self._withdrawn:
                self._withdrawn.remove(name)
                return "it was withdrawn"
            if name in self._kept:  # Ray's client asks again where it does not know whether it was heard
                return ""
            count = len(self._kept) + len(self._coming)
            if self._size_bytes + size_bytes > limit_bytes or count >= MOST_OBJECTS:
                held = f"{count} of {readable(self._size_bytes)} together are kept"
                return f"{held}, and BRIDGE_DATA_RAY_BYTES allows {readable(limit_bytes)}"
            self._size_bytes += size_bytes
            self._coming.add(name)
        ref = None
        try:
            ref = box[0] if is_brief else self._copied(name, box[0])
        finally:
            with self._lock:
                if ref is not None and name in self._coming:
                    self._kept[name] = _Kept(ref, size_bytes, time.monotonic() + keep_s)
                else:
                    self._size_bytes -= size_bytes
                self._coming.discard(name)
        return ""

    def _copied(self, name: str, ref: Any) -> Any:
        """A reference to a copy that this process owns; None if it is not wanted any more."""
        with self._copying:
            return ray.put(ray.get(ref)) if name in self._coming else None

    def find(self, name: str) -> list[Any]:
        """The reference, in a list; an empty one when it is not kept."""
        with self._lock:
            self._asked_at = time.monotonic()
            kept = self._kept.get(name)
            return [kept.ref] if kept is not None and kept.expires_at > self._asked_at else []

    def forget(self, names: list[str]) -> None:
        """Let go of some; whoever reads one goes on."""
        with self._lock:
            self._coming.difference_update(names)
            gone = [self._kept.pop(name) for name in names if name in self._kept]
            self._size_bytes -= sum(kept.size_bytes for kept in gone)

    def withdraw(self, name: str) -> None:
        """Let go of what may be kept, on its way into a copy, or about to come."""
        with self._lock:
            if name not in self._kept and name not in self._coming:
                self._withdrawn.add(name)
        self.forget([name])

    def holdings(self) -> tuple[int, int]:
        """How many are kept, and their bytes."""
        with self._lock:
            return len(self._kept), self._size_bytes

    def _tend(self) -> None:
        while True:
            time.sleep(0.5)
            now = time.monotonic()
            with self._lock:
                over = [name for name, kept in self._kept.items() if kept.expires_at <= now]
            self.forget(over)
            with self._lock:
                is_empty = not self._kept and not self._coming
                if is_empty and now - self._asked_at > KEEP_IDLE_S:  # the next who puts something makes another one
                    with suppress(Exception):  # Ray does not answer: it is told again
                        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
                        time.sleep(GONE_S)  # with the lock: who puts now is to be told, and not to lose what it put


class RayStore:
    """Data in Ray's object store, found by the keeper of a namespace; for a process that has joined the cluster."""

    def __init__(self, namespace: str, config: StoreConfig) -> None:
        self._namespace, self._config = namespace, config
        self._known: tuple[Any, Any] = (None, None)  # the job in which the keeper was found, and the keeper

    def write(self, data: Any, keep_s: float, is_brief: bool = False) -> str:
        """As `Store.write`; `is_brief` data end with this process."""
        name = uuid.uuid4().hex
        size_bytes = memoryview(data).nbytes
        with _answers(f"{readable(size_bytes)} for Ray's object store"):
            box = [ray.put(numpy.frombuffer(data, numpy.uint8) if size_bytes else numpy.empty(0, numpy.uint8))]
            args = name, box, size_bytes, keep_s, self._config.ray_bytes, is_brief
            try:
                refusal = self._ask("keep", *args, patience_s=patience_s(self._config.timeout_s, size_bytes))
            except BaseException:  # too late, or an interrupt: what nobody knows of is not to be kept
                self._withdraw(name)
                raise
        if refusal:
            raise StoreUnavailable(f"Ray's object store takes no {readable(size_bytes)} more: {refusal}")
        return f"ray:{name}"

    def read(self, url: str, size_bytes: int | None, most_bytes: int) -> Iterator[Any]:
        """As `Store.read`; one piece."""
        yield self.lend(url, size_bytes)

    def lend(self, url: str, size_bytes: int | None) -> "numpy.ndarray[Any, Any]":
        """The bytes as they lie in the object store, read-only; they stay there as long as somebody has the array.

        Raises:
            DataLost, DataCorrupt, DataRefused, StoreUnavailable: as their docstrings say.
        """
        name, size_bytes = name_in(url), known_size(url, size_bytes)
        with _answers(url):
            box = self._ask("find", name, creates=False)
            if not box:
                raise _lost(url)
            array = ray.get(box[0], timeout=patience_s(self._config.timeout_s, size_bytes))
        if not isinstance(array, numpy.ndarray) or array.dtype != numpy.uint8 or array.nbytes != size_bytes:
            raise DataCorrupt(f"{url} is not of the {size_bytes} bytes that its reference says")
        return array

    def delete(self, url: str, size_bytes: int | None) -> None:
        """As `Store.delete`."""
        name = name_in(url)
        with _answers(url), suppress(_NoKeeper):
            self._ask("forget", [name], creates=False)

    def holdings(self) -> tuple[int, int]:
        """How many are kept in the namespace, and their bytes."""
        with _answers("what is kept"), suppress(_NoKeeper):
            found: tuple[int, int] = self._ask("holdings", creates=False)
            return found
        return 0, 0

    def _ask(self, method: str, *args: Any, creates: bool = True, patience_s: float | None = None) -> Any:
        """What the keeper answers; where there is none it is created, or that is _NoKeeper."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_S)
            try:
                keeper = self._keeper(creates)
                return ray.get(getattr(keeper, method).remote(*args), timeout=patience_s or self._config.timeout_s)
            except ray.exceptions.RayActorError:
                self._known = (None, None)
        if not creates:
            raise _NoKeeper
        raise StoreUnavailable(f"Ray's object store: the actor {KEEPER} ends again and again")

    def _withdraw(self, name: str) -> None:
        """Have it forgotten, also while it is copied; nobody waits for that, and if it fails it expires."""
        with suppress(Exception):
            self._known[1].withdraw.remote(name)

    def _keeper(self, creates: bool) -> Any:
        context = ray.get_runtime_context()
        job = context.get_job_id()
        if self._known[0] != job:
            self._known = job, self._created(context.get_node_id()) if creates else self._found()
        return self._known[1]

    def _found(self) -> Any:
        try:
            return ray.get_actor(KEEPER, self._namespace)
        except ValueError:
            raise _NoKeeper from None

    def _created(self, node: str) -> Any:
        """On the node of who needs it first: the bridge is installed there, as it need not be on any other."""
        keeper: Any = Keeper
        return keeper.options(
            name=KEEPER, namespace=self._namespace, lifetime="detached", get_if_exists=True, num_cpus=0,
            max_restarts=0, max_concurrency=8, enable_task_events=False,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote()  # fmt: skip


def _lost(url: str) -> DataLost:
    return DataLost(
        f"{url} is not in Ray's object store: it has expired, was deleted, or went with its node, with the actor that "
        f"keeps such data ({KEEPER}) or, an array on its way between actors, with its actor"
    )


@contextmanager
def _answers(what: str) -> Iterator[None]:
    """Ray's errors as ours."""
    try:
        yield
    except (DataError, SoftTimeLimitExceeded):
        raise
    except ray.exceptions.GetTimeoutError as error:
        raise StoreUnavailable(f"{what}: Ray has not answered in time") from error
    except (_NoKeeper, ray.exceptions.ObjectLostError) as error:
        raise _lost(what) from error
    except (ray.exceptions.OutOfDiskError, ray.exceptions.ObjectStoreFullError) as error:
        raise StoreUnavailable(f"{what}: Ray's memory is full, and its disk") from error
    except Exception as error:
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error  # its own text is a traceback
        text = " ".join(str(cause).split())
        raise StoreUnavailable(f"{what}: {type(cause).__name__}: {text}"[:300]) from error
