"""Models and tables that stay on the device between tasks.

A resident is loaded once per process, on first use or at the executor's warm-up, and shared by all tasks of that
process. In any other process (eager mode, a plain worker) it loads there, on NumPy.
"""

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_registry: "list[Resident[Any]]" = []


class Resident(Generic[T]):
    """A value that lives on the device; calling it gives the value, loading it when it is not there yet."""

    def __init__(self, load: Callable[[], T]) -> None:
        self.name = f"{load.__module__}.{load.__qualname__}"
        self.__doc__ = load.__doc__
        self.__wrapped__ = load
        self._load = load
        self._lock = threading.Lock()
        self._value: T | None = None
        self._loaded = False
        _registry.append(self)

    def __call__(self) -> T:
        """The value; concurrent first use loads it once, and a failed load is tried again at the next use."""
        if not self._loaded:
            with self._lock:
                if not self._loaded:
                    self._value = self._load()
                    self._loaded = True
        return self._value  # type: ignore[return-value]

    def drop(self) -> None:
        """Forget the value; the next use loads it again."""
        with self._lock:
            self._value, self._loaded = None, False

    def __repr__(self) -> str:
        return f"<resident {self.name}{'' if self._loaded else ' (not loaded)'}>"


def resident(load: Callable[[], T]) -> Resident[T]:
    """Keep what `load()` returns on the device: ``@resident`` on a function without arguments; tasks call it."""
    return Resident(load)


def load_all() -> list[str]:
    """Load every declared resident of this process; returns their names. Whatever a loader raises passes through."""
    for value in _registry:
        value()
    return [value.name for value in _registry]
