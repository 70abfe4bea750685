"""The form in which an array travels that stays on a device.

A handle is no secret and opens nothing by itself: only the executor that holds the array, which belongs to one app,
knows its id. Any other process gets it by a task that runs there (`actors/executor/errands.py`).
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy
from pydantic import ConfigDict, Field

from actors.data.arrays import ArrayRef, Described, register_form
from actors.data.foreign import is_device_array
from actors.errors import DataCorrupt, HandleLost
from actors.executor import device_results
from actors.executor.device import to_host

_Name = Annotated[str, Field(min_length=1, max_length=64, pattern="^[0-9a-f]+$")]


class DeviceArray(Described):
    """An array that stays on the device of the actor whose task returned it.

    GPU tasks that take it get that array, on that actor without a copy. Elsewhere `get` fetches it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, serialize_by_alias=True)

    kind: Literal["device"] = "device"
    id: _Name
    actor: int  # for the driver, which sends there what takes the array
    executor: _Name  # the process that holds it
    kept: ArrayRef | None = Field(default=None, alias="copy")  # for when that has ended
    route: tuple[str, str] = ("", "")  # exchange and routing key by which its worker gets tasks

    def get(self) -> "numpy.ndarray[Any, Any]":
        """The array, in the host's memory: from the executor that holds it, or the copy when that has it no more.

        Raises:
            HandleLost: the array is gone, and there is no copy.
            DataError: the copy cannot be read.
            celery.exceptions.TimeoutError: no worker has answered in time.
        """
        if self.executor != device_results.shared.executor:
            if fetcher is None:
                raise RuntimeError("import bridge.data to get arrays from a device")
            return fetcher(self)
        try:
            return numpy.asarray(to_host(self.on_device()))
        except HandleLost:
            if self.kept is None:
                raise
            return self.kept.get()

    def on_device(self) -> Any:
        """In the executor that holds it, the array itself.

        Raises:
            HandleLost: it is not here any more, or never was.
            DataCorrupt: it is another one than the handle says.
        """
        array = device_results.shared.get(self.id, self.executor)
        if (array.dtype.str, tuple(array.shape)) != (self.dtype, self.shape):
            raise DataCorrupt("the array is not of the dtype and shape that its handle says")
        return array


register_form("device", DeviceArray)

#: How another process gets the array of a handle; `bridge/data.py` sets it.
fetcher: "Callable[[DeviceArray], numpy.ndarray[Any, Any]] | None" = None


def is_array(value: Any) -> bool:
    """Whether a value in a result is an array that may stay; scalars may not."""
    return isinstance(value, numpy.ndarray) or (is_device_array(value) and hasattr(value, "shape"))
