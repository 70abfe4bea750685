"""In the executor: arrays that came by reference are fetched and put on the device, and results go the same way back.

Both happen inside the body's frame: limits and cancellation hold, and what goes wrong is that task's error. Only tasks
whose arguments were found to hold an array when they were unpickled pay anything for this.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy
from pydantic import BaseModel

from actors.arrays import ArrayRef, ArraySpec
from actors.contract import StoreConfig
from actors.device import is_device_array
from actors.device_api import Device
from actors.errors import DataError, PayloadInvalid, problem
from actors.stores import Stores
from actors.unopened import Unopened


class Opener:
    """Between stores and device; one per executor."""

    def __init__(self, app: Any, config: StoreConfig, device: Device) -> None:
        self.stores = Stores(app, config)
        self._device = device

    def opening(self, task: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` with its arguments opened first. It raises PayloadInvalid or DataError where one cannot be."""

        def opened(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.open_all(task.name, task.run, args, kwargs)
            return call(*args, **kwargs)

        return opened

    def opening_items(self, task: Any, run_items: Callable[..., Any]) -> Callable[..., Any]:
        """The same for a vectorised body; an item that cannot be opened gets its error in its place."""

        def opened(items: Sequence[tuple[Any, Any]]) -> list[Any]:
            results: list[Any] = [None] * len(items)
            good: list[tuple[int, Any]] = []
            for number, (args, kwargs) in enumerate(items):
                try:
                    good.append((number, self.open_all(task.name, task.run, args, kwargs)))
                except (DataError, PayloadInvalid) as error:
                    results[number] = error
            if good:
                for (number, _), value in zip(good, run_items([pair for _, pair in good]), strict=True):
                    results[number] = value
            return results

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
            return type(value)([self._opened(name, f"{field}.{n}", each) for n, each in enumerate(value)])
        if isinstance(value, dict):
            return {key: self._opened(name, f"{field}.{key}", each) for key, each in value.items()}
        if isinstance(value, BaseModel):
            for key, each in vars(value).items():  # not by assignment: a model may be frozen
                vars(value)[key] = self._opened(name, f"{field}.{key}", each)
        return value

    def _open(self, unopened: Unopened) -> Any:
        source = unopened.source
        spec = unopened.spec
        if not isinstance(source, ArrayRef) or not isinstance(spec, ArraySpec):
            return unopened.open()
        array = self._device.receive(self.stores.pieces(source), source.shape, source.dtype)
        if spec.finite and array.dtype.kind in "fc" and not bool(self._device.xp.isfinite(array).all()):
            raise ValueError("expected finite numbers, found NaN or an infinity")
        return spec.cast(array)

    # results

    def stored(self, value: Any) -> Any:
        """`value` with a reference in the place of each array and of bytes, also inside lists, tuples and dicts.

        Raises:
            DataRefused, StoreUnavailable: as their docstrings say.
        """
        if is_device_array(value) or isinstance(value, numpy.ndarray):
            return self.stores.put(self._device.to_host(value))
        if isinstance(value, bytes):
            return self.stores.put_bytes(value)
        if isinstance(value, list | tuple):
            return type(value)([self.stored(each) for each in value])
        if isinstance(value, dict):
            return {key: self.stored(each) for key, each in value.items()}
        return value
