"""Arrays that bodies have returned and that stay on the device, for the tasks that take them: `Gpu(result="device")`.

Each has a random id, which its handle names (`actors/data/handles.py`). What has not been used for longest moves to the
host's memory when there are more bytes than the device's budget has, and back when it is used; beyond the host's budget
it is dropped. After its time to live it goes in any case. An interrupt never stops this module half-way
(`interrupt.py`).
"""

import heapq
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from actors.contract import Holdings
from actors.errors import HandleLost
from actors.executor.device import current_device
from actors.executor.device_api import Device
from actors.sizes import array_bytes, readable

#: Reasons kept of results that are gone, at most; older ones are lost for an unknown reason.
MOST_REASONS = 4096
#: Results on the device, and in the host's memory, at most, however small: each costs some hundred bytes to look after.
MOST_ARRAYS = 100_000
#: CuPy's pool gives memory out in multiples of this, in bytes.
_POOL_BYTES = 512

EXPIRED = "its time to live is over (BRIDGE_DEVICE_RESULT_S)"
DROPPED = "it was dropped to make room (BRIDGE_DEVICE_RESULTS_LIMIT, BRIDGE_HOST_RESULTS_LIMIT)"
DELETED = "it was deleted"

logger = logging.getLogger(__name__)


class _Kept(NamedTuple):
    """A result that is held."""

    array: Any
    size_bytes: int  # of the buffer it keeps alive
    expires_at: float  # as `time.monotonic`


class _Place:
    """Results in one kind of memory, the least recently used first."""

    def __init__(self) -> None:
        self.held: OrderedDict[str, _Kept] = OrderedDict()
        self.size_bytes = 0

    def add(self, name: str, kept: _Kept) -> None:
        self.held[name] = kept
        self.size_bytes += kept.size_bytes

    def take(self, name: str) -> _Kept | None:
        kept = self.held.pop(name, None)
        self.size_bytes -= kept.size_bytes if kept else 0
        return kept

    def oldest(self, keep: Collection[str] = ()) -> str | None:
        return next((name for name in self.held if name not in keep), None)


class DeviceResults:
    """Results of this process; thread-safe, for a body may have threads of its own."""

    def __init__(self) -> None:
        self.executor = secrets.token_hex(8)  # names this process in handles; another one has none of its results
        self.device_limit_bytes: int | None = None
        self.host_limit_bytes: int | None = None
        self.changes = 0  # so many times something has come, gone or moved
        self._lock = threading.RLock()  # re-entrant: a value's destructor may run in the middle
        self._device, self._host = _Place(), _Place()
        self._ends: list[tuple[float, str]] = []  # a heap of when each expires; also of those that are gone by now
        self._touched: set[str] = set()
        self._why_gone: OrderedDict[str, str] = OrderedDict()

    def put(self, array: Any, keep_s: float) -> str:
        """Hold an array of this process's device for so many seconds; its id. Others move or go until budgets hold.

        A view that keeps much more alive than it shows, such as one row of a batch, is held as a copy.
        """
        if array_bytes(array) > 2 * max(int(array.nbytes), _POOL_BYTES):
            array = array.copy()
            current_device().synchronize()  # or a body on another stream could read what is not written yet
        name, kept = secrets.token_hex(16), _Kept(array, _taken(array), time.monotonic() + keep_s)
        with self._lock:
            self._device.add(name, kept)
            heapq.heappush(self._ends, (kept.expires_at, name))
            if len(self._ends) > 4 * MOST_ARRAYS:
                held = [*self._device.held.items(), *self._host.held.items()]
                self._ends = sorted((each.expires_at, which) for which, each in held)
            self.changes += 1
        self._keep_budgets()
        return name

    def get(self, name: str, executor: str) -> Any:
        """The array, on the device: the very same one, unless it had moved to the host. It counts as used now.

        Args:
            name: its id.
            executor: the process that is said to hold it.

        Raises:
            HandleLost: it is not held any more, or not by this process; the text says why and what to do.
        """
        if executor != self.executor:
            raise lost("the process that held it (its executor) has ended, or belongs to another app")
        self.expire()
        with self._lock:
            kept = self._device.held.get(name)
            if kept is not None:
                self._device.held.move_to_end(name)
                self._touched.add(name)
                return kept.array
            kept = self._host.held.get(name)
            if kept is None:
                raise lost(self._why_gone.get(name, "nobody knows it here any more"))
            array = current_device().to_device(kept.array)
            current_device().synchronize()  # the copy goes on, and the next to ask may be on another stream
            self._host.take(name)
            self._device.add(name, _Kept(array, _taken(array), kept.expires_at))
            self._touched.add(name)
            self.changes += 1
        self._keep_budgets({name})
        return array

    def drop(self, names: Collection[str], why: str = DELETED) -> None:
        """Forget some; who has an array in hand keeps it."""
        with self._lock:
            on_device = {name: kept for name in names if (kept := self._device.take(name)) is not None}
            on_host = {name: kept for name in names if (kept := self._host.take(name)) is not None}
            self.changes += len(on_device) + len(on_host)
            self._why_gone |= dict.fromkeys([*on_device, *on_host], why)
            while len(self._why_gone) > MOST_REASONS:
                self._why_gone.popitem(last=False)
        if on_device:
            current_device().synchronize_all()  # what runs on any stream may still read it

    def tidy(self) -> None:
        """Between bodies: what has outlived its time goes, and budgets hold again."""
        if self._ends:
            self.expire()
            self._keep_budgets()

    def expire(self) -> None:
        """Forget what has outlived its time."""
        now, over = time.monotonic(), []
        with self._lock:
            while self._ends and self._ends[0][0] <= now:
                over.append(heapq.heappop(self._ends)[1])
        if over:
            self.drop(over, EXPIRED)

    def expires_in_s(self) -> float | None:
        """Seconds until `expire` has something to do; None while nothing is held."""
        with self._lock:
            return max(0.0, self._ends[0][0] - time.monotonic()) if self._ends else None

    def spill(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Memory is short: results move to the host until `enough`, none that running bodies have used."""
        while not enough() and self._spill_oldest(self._touched):
            pass
        self._keep_budgets()

    def spillable_bytes(self) -> int:
        """What `spill` could free on the device."""
        with self._lock:
            used = (kept for name in self._touched if (kept := self._device.held.get(name)) is not None)
            return self._device.size_bytes - sum(kept.size_bytes for kept in used)

    def holdings(self) -> Holdings:
        """What is held now."""
        with self._lock:
            arrays = len(self._device.held) + len(self._host.held)
            return Holdings(arrays, self._device.size_bytes, self._host.size_bytes)

    def device_bytes(self) -> int:
        """What results take on the device."""
        return self._device.size_bytes

    def forget_touched(self) -> None:
        """A new run of bodies starts."""
        if self._touched:
            with self._lock:
                self._touched.clear()

    def _keep_budgets(self, keep: Collection[str] = ()) -> None:
        """The least recently used go: from the device while there is too much, then from the host."""
        while _exceeds(self._device.size_bytes, self.device_limit_bytes) and self._spill_oldest(keep):
            pass
        while self._is_host_full() and (name := self._host.oldest()) is not None:
            self.drop([name], DROPPED)
        while len(self._device.held) > MOST_ARRAYS and (name := self._device.oldest(keep)) is not None:
            self.drop([name], DROPPED)

    def _is_host_full(self) -> bool:
        return _exceeds(self._host.size_bytes, self.host_limit_bytes) or len(self._host.held) > MOST_ARRAYS

    def _spill_oldest(self, keep: Collection[str]) -> bool:
        with self._lock:
            name = self._device.oldest(keep)
        if name is None:
            return False
        device = current_device()
        device.synchronize_all()  # what runs on any stream may still write or read it
        with self._lock:  # it may go meanwhile, for its time is over
            kept = self._device.held.get(name)
            array = None if kept is None else self._on_host(device, kept.array)
            if kept is not None and array is not None:
                self._device.take(name)
                self._host.add(name, _Kept(array, array_bytes(array), kept.expires_at))
                self.changes += 1
                logger.info("a result of %s moves to the host's memory, to make room", readable(kept.size_bytes))
        if array is None:
            self.drop([name], DROPPED)
        del kept
        device.free()
        return True

    def _on_host(self, device: Device, array: Any) -> Any:
        """A copy in the host's memory; None if that is short, too."""
        try:
            return device.to_host(array)
        except Exception as error:
            if not device.is_out_of_memory(error):
                raise
            return None


def lost(why: str) -> HandleLost:
    """The error for a handle whose array is gone."""
    return HandleLost(
        f"the array stayed on a GPU and is gone: {why}. Send the task again that made it, or keep a copy: "
        'Gpu(result="device", keep_copy=True)'
    )


def _taken(array: Any) -> int:
    """Bytes of the buffer it keeps alive, as CuPy's pool counts them."""
    return -(-array_bytes(array) // _POOL_BYTES) * _POOL_BYTES


def _exceeds(size_bytes: int, limit_bytes: int | None) -> bool:
    return limit_bytes is not None and size_bytes > limit_bytes


#: Of this process.
shared = DeviceResults()
