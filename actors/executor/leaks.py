"""Device memory that bodies leave behind: what the pool holds beyond residents and results that stay, task by task.

Arrays in a global or in a cache that grows end with their process only: past a limit the executor asks to be replaced.
"""

import gc
from collections import Counter

from actors.executor.device_api import Device
from actors.executor.device_results import DeviceResults
from actors.executor.residents import Residents


class Leaks:
    """Of one executor, from the moment it is warm; `limit_bytes` is what bodies may leave behind together."""

    def __init__(self, device: Device, residents: Residents, results: DeviceResults, limit_bytes: int) -> None:
        self._device = device
        self._residents = residents
        self._results = results
        self._limit_bytes = limit_bytes
        self._first = self._last = self._held()
        self._by_name: Counter[str] = Counter()

    def note(self, name: str) -> None:
        """A run of this task has ended, and its outcome is made."""
        now = self._held()
        if now != self._last:
            self._by_name[name] += now - self._last
            self._last = now

    def complaint(self) -> str:
        """What is wrong, once there is too much; "" before."""
        if not self._limit_bytes or self._last - self._first <= self._limit_bytes:
            return ""
        gc.collect()  # arrays in cycles are garbage, not a leak
        left = self._held() - self._first
        if left <= self._limit_bytes:
            return ""
        name, most = self._by_name.most_common(1)[0]
        return f"its bodies have left {left} bytes behind on the device, {name} {most} of them (BRIDGE_LEFT_LIMIT)"

    def _held(self) -> int:
        return self._device.pooled_bytes() - self._residents.size_bytes() - self._results.device_bytes()
