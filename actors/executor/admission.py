"""Whether a body that declares its memory may start now; asked before each body, and pure but for the device.

A GPU is asked once per call, and only for tasks that declare memory: within a call only what stays on the device, which
is residents and results, changes what is free.
Where memory is unknown everything is admitted.
"""

import gc
from collections.abc import Collection

from actors.executor.device_api import Device, Memory
from actors.executor.device_results import DeviceResults
from actors.executor.residents import Residents
from actors.sizes import readable


class Admission:
    """Looks at one device for the bodies of one call after the other."""

    def __init__(self, device: Device, residents: Residents, results: DeviceResults) -> None:
        self._device = device
        self._residents = residents
        self._results = results
        self._memory = Memory(0, 0, 0)
        self._seen: int | None = None  # changes of what stays when the device was asked; None: not in this call

    def forget(self) -> None:
        """A new call, or memory that came free in another way: ask again."""
        self._seen = None

    def admit(self, needed_bytes: int, runs: int, keep: Collection[str]) -> int:
        """How many of `runs` bodies that need so much each may run together; 0 when not even one fits.

        Where the first does not fit, results make room, then residents except those that `keep` names.
        """
        if not needed_bytes:
            return runs
        if self._seen != self._changes():
            self._look()
        if not self._memory.total:
            return runs
        if self._memory.free < needed_bytes:
            gc.collect()  # errors and closures keep arrays in cycles
            self._device.free()
            could_go = self._results.spillable_bytes() + self._residents.evictable_bytes(keep)
            if self._look() + could_go >= needed_bytes:  # or they would go for nothing
                self._results.spill(lambda: self._look() >= needed_bytes)
                self._residents.evict(keep, lambda: self._look() >= needed_bytes)
        return min(runs, self._memory.free // needed_bytes)

    def refusal(self, needed_bytes: int) -> str:
        """Why the last body may not start."""
        free, total = readable(self._memory.free), readable(self._memory.total)
        return f"needs {readable(needed_bytes)}, {free} of {total} are free"

    def _look(self) -> int:
        self._memory = self._device.memory(self._residents.size_bytes() + self._results.device_bytes())
        self._seen = self._changes()
        return self._memory.free

    def _changes(self) -> int:
        return self._residents.changes + self._results.changes
