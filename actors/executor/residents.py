"""Models and tables that stay on the device between tasks, within a budget.

A resident is loaded once per process, at the executor's warm-up or on first use, and shared by all tasks of that
process. When all of them together take more than the budget, those used least recently go. In any other process (eager
mode, a plain worker) it loads there, on NumPy. An interrupt never stops this module half-way, but it may stop a loader
(`interrupt.py`).
"""

import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, overload

from actors.executor import device_results
from actors.executor.device import current_device
from actors.sizes import array_bytes, readable

#: Characters of a resident's name in health and logs; what is the same up to here is told as one.
NAME_LENGTH = 200

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

_registry: "list[Resident[..., Any]]" = []


class _Key(NamedTuple):
    """Which value: of which resident, for which arguments."""

    resident: "Resident[..., Any]"
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


class _Held(NamedTuple):
    """A value on the device."""

    name: str
    value: Any
    size_bytes: int


class Residents:
    """What is loaded in this process now, the least recently used first; thread-safe."""

    def __init__(self) -> None:
        self.limit_bytes: int | None = None  # no limit outside of executors
        self.changes = 0  # loads and evictions so far
        self._lock = threading.RLock()  # re-entrant: a value's destructor may use a resident
        self._held: OrderedDict[_Key, _Held] = OrderedDict()
        self._touched: set[str] = set()

    def find(self, key: _Key) -> _Held | None:
        """A value that is there; it counts as used now."""
        with self._lock:
            held = self._held.get(key)
            if held is not None:
                self._held.move_to_end(key)
                self._touched.add(held.name)
            return held

    def add(self, key: _Key, held: _Held) -> None:
        """Keep a value that has just been loaded; others go until the budget holds."""
        with self._lock:
            self._held[key] = held
            self._touched.add(held.name)
            self.changes += 1
        self.evict({held.name}, self._is_within_limit)
        if self.limit_bytes is not None and held.size_bytes > self.limit_bytes:
            logger.warning(
                "resident %s takes %s, more than all residents may have together (%s); it stays, alone",
                held.name, readable(held.size_bytes), readable(self.limit_bytes),
            )  # fmt: skip

    def drop(self, resident: "Resident[..., Any]", key: _Key | None) -> None:
        """Forget one value, or all of a resident; who holds a value keeps it."""
        with self._lock:
            gone = [each for each in self._held if each.resident is resident and key in (None, each)]
            values = [self._held.pop(each) for each in gone]
            self.changes += len(values)
        if values:
            current_device().synchronize_all()

    def evict(self, keep: Collection[str], enough: Callable[[], bool] = lambda: False) -> None:
        """Forget values until `enough`, the least recently used first, none that `keep` names."""
        while not enough() and (key := self._oldest(keep)) is not None:
            current_device().synchronize_all()  # what runs on any stream may still read it
            with self._lock:
                held = self._held.pop(key, None)
                self.changes += 1
            if held is not None:
                logger.info("resident %s goes, to make room: %s", held.name, readable(held.size_bytes))
            del held
            current_device().free()

    def can_evict(self, keep: Collection[str]) -> bool:
        """Whether `evict` would find anything."""
        return self._oldest(keep) is not None

    def evictable_bytes(self, keep: Collection[str]) -> int:
        """What `evict` could free."""
        with self._lock:
            return sum(held.size_bytes for held in self._held.values() if held.name not in keep)

    def sizes(self) -> dict[str, int]:
        """Bytes of each, by name."""
        with self._lock:
            return {held.name: held.size_bytes for held in self._held.values()}

    def size_bytes(self) -> int:
        """Bytes of all together."""
        with self._lock:
            return sum(held.size_bytes for held in self._held.values())

    def touched(self) -> tuple[str, ...]:
        """Names used since the last `forget_touched`, sorted."""
        if not self._touched:  # as with most tasks
            return ()
        with self._lock:
            return tuple(sorted(self._touched))

    def forget_touched(self) -> None:
        """A new body starts."""
        if self._touched:
            with self._lock:
                self._touched.clear()

    def _oldest(self, keep: Collection[str]) -> _Key | None:
        with self._lock:
            return next((key for key, held in self._held.items() if held.name not in keep), None)

    def _is_within_limit(self) -> bool:
        return self.limit_bytes is None or self.size_bytes() <= self.limit_bytes


#: Of this process.
shared = Residents()


class Resident(Generic[P, T]):
    """A value that lives on the device; calling it gives the value, loading it when it is not there yet."""

    def __init__(self, load: Callable[P, T], preload: bool = True) -> None:
        self.name = f"{load.__module__}.{load.__qualname__}"
        self.__doc__ = load.__doc__
        self.__wrapped__ = load
        self._load = load
        self._signature = inspect.signature(load)
        self._plain = _Key(self)
        self._lock = threading.RLock()  # re-entrant: `model("large")` may load `model("small")`
        required = [each for each in self._signature.parameters.values() if each.default is each.empty]
        self.preload = preload and all(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in required)
        _registry.append(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The value; concurrent first use loads it once, and a failed load is tried again at the next use.

        Raises:
            TypeError: arguments that do not fit the loader, or that cannot be hashed.
        """
        key = self._key(*args, **kwargs)
        held = shared.find(key)
        if held is None:
            with self._lock:
                held = shared.find(key) or self._loaded(key)
        value: T = held.value
        return value

    def drop(self, *args: Any, **kwargs: Any) -> None:
        """Forget the value for these arguments, or all of them; the next use loads it again."""
        with self._lock:
            shared.drop(self, self._key(*args, **kwargs) if args or kwargs else None)

    def __repr__(self) -> str:
        is_loaded = any(key.resident is self for key in list(shared._held))
        return f"<resident {self.name}{'' if is_loaded else ' (not loaded)'}>"

    def _key(self, *args: Any, **kwargs: Any) -> _Key:
        if not self._signature.parameters and not args and not kwargs:
            return self._plain
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()  # `model()` and `model(size="small")` may be the same
        return _Key(self, bound.args, tuple(sorted(bound.kwargs.items())))

    def _loaded(self, key: _Key) -> _Held:
        """Load a value; when memory is short, once more without what else this body has not used."""
        try:
            held = self._measured(key)
        except Exception as error:
            others_can_go = shared.can_evict(shared.touched()) or device_results.shared.spillable_bytes()
            if not current_device().is_out_of_memory(error) or not others_can_go:
                raise
            held = None
        if held is None:  # not in the handler: the error's traceback keeps what was half loaded
            device_results.shared.spill()
            shared.evict(shared.touched())
            held = self._measured(key)
        shared.add(key, held)
        return held

    def _measured(self, key: _Key) -> _Held:
        """Load a value and tell its bytes: what the pool has grown by, and no less than the arrays found in it."""
        device = current_device()
        pooled, others = device.pooled_bytes(), shared.size_bytes()
        value = _enter_loader(self._load, key.args, dict(key.kwargs))
        device.synchronize()  # the next to use it may do so on another stream
        grown = device.pooled_bytes() - pooled - (shared.size_bytes() - others)  # less what others came or went
        return _Held(self._name(key), value, max(grown, array_bytes(value)))

    def _name(self, key: _Key) -> str:
        if not self._signature.parameters:
            return self.name
        given = [*map(repr, key.args), *(f"{name}={value!r}" for name, value in key.kwargs)]
        return f"{self.name}({', '.join(given)})"[:NAME_LENGTH]


@overload
def resident(load: Callable[P, T]) -> Resident[P, T]: ...
@overload
def resident(*, preload: bool = True) -> Callable[[Callable[P, T]], Resident[P, T]]: ...
def resident(load: Any = None, *, preload: bool = True) -> Any:
    """Keep what a loader returns on the device: ``@resident`` above the function; tasks call it.

    A loader that needs arguments, which must be hashable, is loaded once for each set of them, on first use.

    Args:
        load: returns the value.
        preload: load it at warm-up, if it needs no arguments; else on first use.
    """
    return Resident(load, preload) if load is not None else lambda function: Resident(function, preload)


def load_all() -> list[str]:
    """Load what can be loaded before the first task; returns the names. Whatever a loader raises passes through."""
    for value in _registry:
        if value.preload:
            shared.forget_touched()  # the ones before may go for it
            value()
    return [value.name for value in _registry if value.preload]


def _enter_loader(load: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    """The frame below which everything is the user's: an interrupt looks no further up."""
    return load(*args, **kwargs)
