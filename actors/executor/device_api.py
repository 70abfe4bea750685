"""What the executor needs of a device, whichever it is; `device.py` has the two that there are."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol


class DeviceInfo(NamedTuple):
    """What a person and the scheduler need to know about a device; memory in bytes, 0 where unknown."""

    kind: str  # "cuda" or "cpu"
    name: str
    memory_bytes: int
    libraries: str
    note: str  # why it is not a GPU, else ""


class Memory(NamedTuple):
    """A device's memory in bytes; all 0 where it is unknown."""

    used: int  # by all processes
    total: int
    free: int  # what a body could have now: free on the device and in the pool, and below the pool's limit


class Copied(NamedTuple):
    """Bytes of arrays that went between the host and the device so far, by the three methods that copy."""

    to_device: int
    to_host: int


class Stream(Protocol):
    """Work launched within ``with stream:`` is in order, and beside that of other streams."""

    def __enter__(self) -> Any:
        """Make it current."""
        ...

    def __exit__(self, *error: Any) -> None:
        """Make the one before it current again."""
        ...

    def synchronize(self) -> None:
        """Wait for its work; CUDA's late errors surface here."""
        ...


class DeviceUnusable(Exception):
    """CUDA was demanded and cannot be had; the text says why and what to do."""


class Device(Protocol):
    """What the executor needs of a device. All calls come from the executor's main thread."""

    xp: Any

    def describe(self) -> DeviceInfo:
        """Model, memory and versions."""
        ...

    def warm_up(self) -> None:
        """Pay every first-call cost now; kernels with known answers test the device. DeviceUnusable if it fails."""
        ...

    def synchronize(self) -> None:
        """Wait for the work of this thread."""
        ...

    def synchronize_all(self) -> None:
        """Wait for the work of every stream."""
        ...

    def streams(self, count: int) -> Sequence[Stream]:
        """The first `count` of the streams that bodies may share."""
        ...

    def is_healthy(self, error: BaseException | None = None) -> bool:
        """Whether the context still works, after `error` came out of a body."""
        ...

    def is_faulty(self, error: BaseException) -> bool:
        """Whether an error that broke the context says that the hardware is at fault, not a kernel."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an exception means too little memory."""
        ...

    def free(self) -> None:
        """Give unused pooled memory back."""
        ...

    def memory(self, held_bytes: int) -> Memory:
        """Its memory, of which residents and results take `held_bytes`; asking a GPU takes time: not for every task."""
        ...

    def pooled_bytes(self) -> int:
        """What this process has allocated on the device, 0 where nobody counts."""
        ...

    def copied(self) -> Copied:
        """What the methods below have copied; 0 where the device's memory is the host's."""
        ...

    def to_device(self, array: Any) -> Any:
        """An array of `xp` with the same contents."""
        ...

    def to_host(self, array: Any) -> Any:
        """A NumPy array with the same contents, complete when this returns."""
        ...

    def receive(self, pieces: Iterable[Any], shape: tuple[int, ...], dtype: str) -> Any:
        """A new array of `xp` from its bytes, which come in pieces; in native byte order.

        Raises:
            ValueError: more bytes than the array has. Fewer are not noticed: who sends them counts.
        """
        ...
