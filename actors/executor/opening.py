"""In the executor: arrays that came by reference are fetched and put on the device, and results go the same way back.

What goes wrong is that task's error. Arguments are fetched inside the body's frame, so that limits and cancellation
hold; results are stored after it, and they hold there, too. Only tasks whose arguments were found to hold an array when
they were unpickled pay anything for this.
"""

import inspect
import math
import pickle
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy
from pydantic import BaseModel

from actors.batching import run_prepared
from actors.contract import Config
from actors.data.arrays import ArrayRef, ArraySpec
from actors.data.blobs import BlobRef
from actors.data.foreign import is_device_array
from actors.data.handles import DeviceArray
from actors.data.lists import KINDS
from actors.data.stores import Stores
from actors.errors import DataError, HandleLost, PayloadInvalid, problem
from actors.executor import device_results
from actors.executor.device_api import Device
from actors.unopened import Unopened

if TYPE_CHECKING:
    from actors.executor.release import LoadedTask


class Opener:
    """Between stores and device; one per executor. What may wait for a store is called through `reach`."""

    def __init__(self, app: Any, config: Config, device: Device, reach: Callable[..., Any]) -> None:
        self.stores = Stores(app, config.stores)
        self._reach = reach
        self._most_inside = config.stores.inline_bytes if app.conf.task_serializer == "json" else math.inf
        self._device = device
        self._actor = config.actor
        self._keep_s = config.keep_s
        self._copy_keep_s = max(config.keep_s, config.stores.keep_s)
        self._kept: list[str] = []  # ids of what stays of the last value
        self._made: list[DeviceArray | ArrayRef | BlobRef] = []  # what stands in it in the place of arrays and bytes

    def opening(self, task: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` with its arguments opened first. It raises PayloadInvalid or DataError where one cannot be."""

        def opened(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.open_all(task.name, task.run, args, kwargs)
            return call(*args, **kwargs)

        return opened

    def opening_items(self, task: Any, run_items: Callable[..., Any]) -> Callable[..., Any]:
        """The same for a vectorised body; an item that cannot be opened gets its error in its place."""

        def opened(items: Sequence[tuple[Any, Any]]) -> list[Any]:
            return run_prepared(
                items, lambda _, pair: self.open_all(task.name, task.run, *pair), run_items, (DataError, PayloadInvalid)
            )

        return opened

    def open_all(self, name: str, body: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Arguments with a device array in the place of each `Unopened`."""
        names = list(inspect.signature(body).parameters)
        fields = [names[number] if number < len(names) else f"argument {number + 1}" for number in range(len(args))]
        opened = type(args)([self._opened(name, field, each) for field, each in zip(fields, args, strict=True)])
        return opened, {field: self._opened(name, field, each) for field, each in kwargs.items()}

    def _opened(self, name: str, field: str, value: Any) -> Any:
        if isinstance(value, Unopened):
            try:
                return self._open(value)
            except DataError:
                raise
            except ValueError as error:
                raise PayloadInvalid(name, [problem(field, str(error), value.source)]) from None
        if isinstance(value, list | tuple):
            make = getattr(value, "_make", type(value))  # a NamedTuple takes its fields one by one
            return make([self._opened(name, f"{field}.{n}", each) for n, each in enumerate(value)])
        if isinstance(value, dict):
            return {key: self._opened(name, f"{field}.{key}", each) for key, each in value.items()}
        if isinstance(value, BaseModel):
            for key, each in vars(value).items():  # not by assignment: a model may be frozen
                vars(value)[key] = self._opened(name, f"{field}.{key}", each)
        return value

    def _open(self, unopened: Unopened) -> Any:
        source = unopened.source
        spec = unopened.spec
        if not isinstance(spec, ArraySpec):
            return unopened.open()
        if isinstance(source, DeviceArray):
            array = self._held(source)
        elif isinstance(source, ArrayRef):
            array = self._fetched(source)
        else:
            return unopened.open()
        if spec.finite and array.dtype.kind in "fc" and not bool(self._device.xp.isfinite(array).all()):
            raise ValueError("expected finite numbers, found NaN or an infinity")
        return spec.cast(array)

    def _fetched(self, ref: ArrayRef) -> Any:
        return self._device.receive(self.stores.pieces(ref), ref.shape, ref.dtype)

    def _held(self, handle: DeviceArray) -> Any:
        """The array that a body has left here, or else its copy."""
        try:
            return handle.on_device()
        except HandleLost:
            if handle.kept is None:
                raise
            return self._fetched(handle.kept)

    # results

    def sendable(self, task: "LoadedTask", value: Any, stays: bool, context: dict[str, Any]) -> Any:
        """A result as its task's mark says: its arrays stay here if they may, or go to the store, or neither."""
        self._kept.clear()
        self._made.clear()
        if task.result == "device" and stays:
            info = context.get("delivery_info") or {}
            route = str(info.get("exchange") or ""), str(info.get("routing_key") or "")
            return self.kept(value, task.keep_copy, route)
        return value if task.result == "value" else self.stored(value)

    def stored(self, value: Any) -> Any:
        """`value` with a reference in the place of each array and of bytes, also inside lists, tuples and dicts.

        Raises:
            DataRefused, StoreUnavailable: as their docstrings say.
        """
        return _with_arrays(value, self._stored, self._stored_bytes)

    def kept(self, value: Any, with_copy: bool, route: tuple[str, str]) -> Any:
        """`value` with a handle in the place of each array, all of which stay on the device; `route` leads back here.

        Raises:
            DataRefused, StoreUnavailable: a copy could not be put; then nothing stays.
        """
        results = device_results.shared

        def keep(array: Any) -> DeviceArray:
            array = self._device.to_device(array)
            self._device.synchronize()  # the next body may be on another stream
            name = results.put(array, self._keep_s)
            self._kept.append(name)
            copy = self._put(array, self._copy_keep_s) if with_copy else None
            handle = DeviceArray(
                id=name, actor=self._actor, executor=results.executor, dtype=array.dtype.str, shape=array.shape,
                size_bytes=array.nbytes, expires_at=time.time() + self._keep_s, kept=copy, route=route,
            )  # fmt: skip
            self._made.append(handle)
            return handle

        return _with_arrays(value, keep, bytes)  # bytes were never on a device

    def undo(self) -> None:
        """The last value cannot be sent: nothing of it stays."""
        device_results.shared.drop(self._kept)
        self._kept.clear()
        self._made.clear()

    def made(self) -> bytes:
        """Handles and references made for the last value, pickled; not those that the body was given."""
        return pickle.dumps(self._made, 5) if self._made else b""

    def in_message(self, value: Any) -> Any:
        """How pickle is to reduce what a body wants sent: a large array to a reference, any other to one of NumPy's.

        The driver, which sends it, must not wait for a store.

        Raises:
            DataRefused, StoreUnavailable: as their docstrings say.
        """
        is_ours = is_device_array(value)
        if not is_ours and (type(value) is not numpy.ndarray or value.nbytes <= self._most_inside):
            return NotImplemented
        if value.dtype.kind not in KINDS:
            return NotImplemented
        if value.nbytes > self._most_inside:
            return ArrayRef.model_validate, (self._put(value).model_dump(),)
        return numpy.asarray, (self._device.to_host(value),)

    def _put(self, array: Any, keep_s: float | None = None) -> ArrayRef:
        ref: ArrayRef = self._reach(self.stores.put, self._device.to_host(array), keep_s)
        return ref

    def _stored(self, array: Any) -> ArrayRef:
        ref = self._put(array)
        self._made.append(ref)
        return ref

    def _stored_bytes(self, data: bytes) -> BlobRef:
        ref: BlobRef = self._reach(self.stores.put_bytes, data)
        self._made.append(ref)
        return ref


def _with_arrays(value: Any, convert: Callable[[Any], Any], of_bytes: Callable[[bytes], Any]) -> Any:
    """`value` with something else in the place of each array and of bytes, also inside lists, tuples and dicts.

    A number stays one: ``x.sum()`` is an array without dimensions in CuPy, and none in NumPy. So do arrays of text and
    dates, which become lists as with any other task.
    """
    if is_device_array(value) or isinstance(value, numpy.ndarray):
        return convert(value) if getattr(value, "ndim", 0) and value.dtype.kind in KINDS else value
    if isinstance(value, bytes):
        return of_bytes(value)
    if isinstance(value, tuple):  # a NamedTuple becomes a plain one, as in `outcomes.plain`
        return tuple(_with_arrays(each, convert, of_bytes) for each in value)
    if isinstance(value, list):
        return type(value)([_with_arrays(each, convert, of_bytes) for each in value])
    if isinstance(value, dict):
        return {key: _with_arrays(each, convert, of_bytes) for key, each in value.items()}
    return value


_current: Opener | None = None


def use(opener: Opener) -> None:
    """Make it the one of this process."""
    global _current
    _current = opener


def current() -> Opener:
    """The one of this executor."""
    if _current is None:
        raise RuntimeError("only an executor opens arrays on a device")
    return _current
