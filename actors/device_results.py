"""Arrays that bodies have returned and that stay on the device, for the tasks that take them: `Gpu(result="device")`.

Each has a random id, which its handle names (`actors/handles.py`). What has not been used for longest moves to the
host's memory when there are more bytes than the device's budget has, and back when it is used; beyond the host's budget
it is dropped. After its time to live it goes in any case. An interrupt never stops this module half-way
(`actors/interrupt.py`).
"""

import logging
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from actors.contract import Holdings
from actors.device import current_device
from actors.device_api import Device
from actors.errors import HandleLost
from actors.sizes import array_bytes, readable

#: Reasons kept of results that are gone, at most; older ones are lost for an unknown reason.
MOST_REASONS = 4096
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
    on_device: bool


class DeviceResults:
    """Results of this process, the least recently used first; thread-safe, for a body may have threads of its own."""

    def __init__(self) -> None:
        self.executor = secrets.token_hex(8)  # names this process in handles; another one has none of its results
        self.device_limit_bytes: int | None = None
        self.host_limit_bytes: int | None = None
        self.changes = 0  # so many times something has come, gone or moved
        self._lock = threading.RLock()  # re-entrant: a value's destructor may run in the middle
        self._held: OrderedDict[str, _Kept] = OrderedDict()
        self._touched: set[str] = set()
        self._why_gone: OrderedDict[str, str] = OrderedDict()

    def put(self, array: Any, keep_s: float) -> str:
        """Hold an array of this process's device for so many seconds; its id. Others move or go until budgets hold.

        A view that keeps much more alive than it shows, such as one row of a batch, is held as a copy.
        """
        if array_bytes(array) > 2 * max(int(array.nbytes), _POOL_BYTES):
            array = array.copy()
        name = secrets.token_hex(16)
        with self._lock:
            self._held[name] = _Kept(array, _taken(array), time.monotonic() + keep_s, on_device=True)
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
            kept = self._held.get(name)
            if kept is None:
                raise lost(self._why_gone.get(name, "nobody knows it here any more"))
            self._held.move_to_end(name)
            self._touched.add(name)
            if kept.on_device:
                return kept.array
            array = current_device().to_device(kept.array)
            self._held[name] = _Kept(array, _taken(array), kept.expires_at, on_device=True)
            self.changes += 1
        self._keep_budgets({name})
        return array

    def drop(self, names: Collection[str], why: str = DELETED) -> None:
        """Forget some; who has an array in hand keeps it."""
        with self._lock:
            gone = [(name, self._held.pop(name)) for name in names if name in self._held]
            self.changes += len(gone)
            for name, _ in gone:
                self._why_gone[name] = why
            while len(self._why_gone) > MOST_REASONS:
                self._why_gone.popitem(last=False)
        if any(kept.on_device for _, kept in gone):
            current_device().synchronize_all()  # what runs on any stream may still read it

    def tidy(self) -> None:
        """Between bodies: what has outlived its time goes, and budgets hold again."""
        if self._held:
            self.expire()
            self._keep_budgets()

    def expire(self) -> None:
        """Forget what has outlived its time."""
        now = time.monotonic()
        with self._lock:
            over = [name for name, kept in self._held.items() if kept.expires_at <= now]
        if over:
            self.drop(over, EXPIRED)

    def expires_in_s(self) -> float | None:
        """Seconds until `expire` has something to do; None while nothing is held."""
        with self._lock:
            soonest = min((kept.expires_at for kept in self._held.values()), default=math.inf)
        return None if soonest == math.inf else max(0.0, soonest - time.monotonic())

    def spill(self, enough: Callable[[], bool] = lambda: False) -> None:
        """Memory is short: results move to the host until `enough`, none that running bodies have used."""
        while not enough() and self._spill_oldest(self._touched):
            pass
        self._keep_budgets()

    def spillable_bytes(self) -> int:
        """What `spill` could free on the device."""
        with self._lock:
            unused = (kept for name, kept in self._held.items() if kept.on_device and name not in self._touched)
            return sum(kept.size_bytes for kept in unused)

    def holdings(self) -> Holdings:
        """What is held now."""
        with self._lock:
            on_device = sum(kept.size_bytes for kept in self._held.values() if kept.on_device)
            on_host = sum(kept.size_bytes for kept in self._held.values() if not kept.on_device)
            return Holdings(len(self._held), on_device, on_host)

    def device_bytes(self) -> int:
        """What results take on the device."""
        return self.holdings().device_bytes if self._held else 0

    def forget_touched(self) -> None:
        """A new run of bodies starts."""
        if self._touched:
            with self._lock:
                self._touched.clear()

    def _keep_budgets(self, keep: Collection[str] = ()) -> None:
        """The least recently used go: from the device while there is too much, then from the host."""
        while _exceeds(self.holdings().device_bytes, self.device_limit_bytes) and self._spill_oldest(keep):
            pass
        while _exceeds(self.holdings().host_bytes, self.host_limit_bytes) and (name := self._oldest(on_device=False)):
            self.drop([name], DROPPED)

    def _spill_oldest(self, keep: Collection[str]) -> bool:
        name = self._oldest(on_device=True, keep=keep)
        if name is None:
            return False
        device = current_device()
        device.synchronize_all()  # what runs on any stream may still write or read it
        with self._lock:  # it may go meanwhile, for its time is over
            kept = self._held.get(name)
            array = None if kept is None else self._on_host(device, kept.array)
            if kept is not None and array is not None:
                self._held[name] = kept._replace(array=array, size_bytes=array_bytes(array), on_device=False)
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

    def _oldest(self, on_device: bool, keep: Collection[str] = ()) -> str | None:
        with self._lock:
            found = (name for name, kept in self._held.items() if kept.on_device is on_device and name not in keep)
            return next(found, None)


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
