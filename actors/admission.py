"""Whether a body that declares its memory may start now; asked before each body, and pure but for the device.

A GPU is asked once per call, and only for tasks that declare memory: within a call only residents change what is free.
Where memory is unknown everything is admitted.
"""

import gc
from collections.abc import Collection

from actors.device_api import Device, Memory
from actors.residents import Residents
from actors.sizes import readable


class Admission:
    """Looks at one device for the bodies of one call after the other."""

    def __init__(self, device: Device, residents: Residents) -> None:
        self._device = device
        self._residents = residents
        self._memory = Memory(0, 0, 0)
        self._seen: int | None = None  # changes of the residents when the device was asked; None: not in this call

    def forget(self) -> None:
        """A new call, or memory that came free in another way: ask again."""
        self._seen = None

    def admit(self, needed_bytes: int, runs: int, keep: Collection[str]) -> int:
        """How many of `runs` bodies that need so much each may run together; 0 when not even one fits.

        Where the first does not fit, residents make room, except those that `keep` names.
        """
        if not needed_bytes:
            return runs
        if self._seen != self._residents.changes:
            self._look()
        if not self._memory.total:
            return runs
        if self._memory.free < needed_bytes:
            gc.collect()  # errors and closures keep arrays in cycles
            self._device.free()
            if self._look() + self._residents.evictable_bytes(keep) >= needed_bytes:  # or they would go for nothing
                self._residents.evict(keep, lambda: self._look() >= needed_bytes)
        return min(runs, self._memory.free // needed_bytes)

    def refusal(self, needed_bytes: int) -> str:
        """Why the last body may not start."""
        free, total = readable(self._memory.free), readable(self._memory.total)
        return f"needs {readable(needed_bytes)}, {free} of {total} are free"

    def _look(self) -> int:
        self._memory = self._device.memory(self._residents.size_bytes())
        self._seen = self._residents.changes
        return self._memory.free
