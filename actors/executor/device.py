"""The device under the executor: CuPy on a GPU, NumPy where there is none. The only file that imports CuPy.

`open_device` makes the process's one device; until then `array_module` is NumPy, so bodies run anywhere. Nothing here
is called in the Celery worker, the driver or the actor: they never touch CUDA.
"""

import importlib
import os
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import numpy

from actors.data.arrays import assembled, begun
from actors.data.foreign import is_device_array
from actors.executor.device_api import Copied, Device, DeviceInfo, DeviceUnusable, Memory, Stream
from actors.executor.pinned import SLAB_BYTES, PinnedCopies, is_worth_it
from actors.sizes import read_bytes

#: CUDA statuses after which the process must end (facts 1.6: CUDA's headers say "must be terminated and relaunched").
FATAL_STATUSES = frozenset(
    {4, 201, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911, 999}
)

#: Those of them that tell of broken hardware: memory (ECC), NVLink, an error contained to this process.
FAULTY_STATUSES = frozenset({214, 220, 226})

#: How CuPy's libraries say that memory is short, by exception class (each library's "allocation failed" status).
_OUT_OF_MEMORY = {
    "CUDARuntimeError": (2,),
    "CUDADriverError": (2,),
    "CUBLASError": (1, 3),
    "CUSOLVERError": (2,),
    "CuSparseError": (2,),
    "CuFFTError": (2,),
    "CURANDError": (102,),
}

_REASONS = {
    2: "out of memory while the context was created: another process holds the GPU's memory",
    3: "CUDA could not initialise: was it touched before a fork?",
    35: "no NVIDIA driver, or one too old for this CuPy; CUDA 12 needs driver 525 or newer, CUDA 13 needs 580",
    46: "the GPU is in use by another process in exclusive mode",
    100: "no GPU is visible to this process (CUDA_VISIBLE_DEVICES)",
    802: "the system is not ready: nvidia-fabricmanager must run",
    803: "driver and CUDA libraries do not match",
}


class CpuDevice:
    """NumPy on the CPU, through the same code path as a GPU.

    With `memory_bytes` it stands for a GPU with so much memory, of which only what stays and what bodies declare is
    taken: a logical memory for a logical GPU, so that admission and eviction can be tried without one.
    """

    xp: Any = numpy

    def __init__(self, note: str, memory_bytes: int = 0) -> None:
        self._note = note
        self._memory_bytes = memory_bytes

    def describe(self) -> DeviceInfo:
        """What a person sees: NumPy, and why it is not a GPU."""
        libraries = f"NumPy {numpy.__version__}, Python {platform.python_version()}"
        return DeviceInfo("cpu", "NumPy on CPU", self._memory_bytes, libraries, self._note)

    def warm_up(self) -> None:
        """Touch what the first task would otherwise load."""
        numpy.linalg.norm(numpy.arange(16.0))

    def synchronize(self) -> None:
        """Nothing runs asynchronously here."""

    def synchronize_all(self) -> None:
        """Nothing runs asynchronously here."""

    def streams(self, count: int) -> Sequence[Stream]:
        """Streams on which everything is done at once."""
        return [_CpuStream()] * count

    def is_healthy(self, error: BaseException | None = None) -> bool:
        """A CPU has no context that can break."""
        return True

    def is_faulty(self, error: BaseException) -> bool:
        """A CPU has no hardware of which this is told."""
        return False

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an exception means too little memory."""
        return isinstance(error, MemoryError)

    def free(self) -> None:
        """Nothing is pooled here."""

    def memory(self, held_bytes: int) -> Memory:
        """The logical memory; unknown without one."""
        if not self._memory_bytes:
            return Memory(0, 0, 0)
        return Memory(held_bytes, self._memory_bytes, max(0, self._memory_bytes - held_bytes))

    def pooled_bytes(self) -> int:
        """Nobody counts what NumPy allocates."""
        return 0

    def copied(self) -> Copied:
        """Nothing has to be copied."""
        return Copied(0, 0)

    def to_device(self, array: Any) -> Any:
        """The array itself, or a new one of what is none."""
        return numpy.asarray(array)

    def to_host(self, array: Any) -> Any:
        """The array itself; one that a body has made with CuPy all the same is copied."""
        return array.get() if is_device_array(array) else numpy.asarray(array)

    def receive(self, pieces: Iterable[Any], shape: tuple[int, ...], dtype: str) -> Any:
        """A new NumPy array."""
        return _received(pieces, shape, dtype)


class _CpuStream:
    """Everything is done at once."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass

    def synchronize(self) -> None:
        """Nothing to wait for."""


class CudaDevice:
    """One GPU through CuPy: context, memory pool with a limit, streams and probes."""

    _copied = Copied(0, 0)

    def __init__(self, memory_limit: str) -> None:
        limit = memory_limit if memory_limit.endswith("%") else str(read_bytes(memory_limit))
        os.environ.setdefault("CUPY_GPU_MEMORY_LIMIT", limit)  # CuPy reads it when its pool is made
        self._cupy = self.xp = importlib.import_module("cupy")
        self._runtime = self._cupy.cuda.runtime
        try:
            count = self._runtime.getDeviceCount()
            if count == 0:
                raise DeviceUnusable(_REASONS[100])
            self._cupy.cuda.Device(0).use()
            self._runtime.free(0)  # creates the context here, where what can go wrong has a sentence
        except self._runtime.CUDARuntimeError as error:
            raise DeviceUnusable(_REASONS.get(error.status, str(error))) from error
        self._pool = self._cupy.get_default_memory_pool()
        self._streams: list[Stream] = []
        self._copies = PinnedCopies(self._cupy)

    def describe(self) -> DeviceInfo:
        """GPU model, its memory, and the versions that matter in a bug report."""
        properties = self._runtime.getDeviceProperties(0)
        driver, cuda = self._runtime.driverGetVersion(), self._runtime.runtimeGetVersion()
        libraries = f"CuPy {self._cupy.__version__}, CUDA {_version(cuda)}, driver supports CUDA {_version(driver)}"
        return DeviceInfo("cuda", properties["name"].decode(), properties["totalGlobalMem"], libraries, "")

    def warm_up(self) -> None:
        """Create the context, compile an elementwise and a reduction kernel, and copy both ways once.

        Raises:
            DeviceUnusable: CuPy cannot compile or run a kernel here, or what is computed or copied is wrong.
        """
        try:
            values = self._cupy.arange(1024, dtype=self._cupy.float64)
            total = float((values * 2 + 1).sum())
            self.synchronize()
        except Exception as error:
            raise DeviceUnusable(
                f"a first kernel failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; "
                "install CuPy with its CUDA libraries (extra 'cuda12' or 'cuda13')"
            ) from error
        if total != 1024 * 1023 + 1024:
            raise DeviceUnusable(f"a first kernel computed {total}: this GPU cannot be trusted")
        self._check_copies()

    def _check_copies(self) -> None:
        """Large arrays go through buffers and threads of ours: they come back as they were, or nothing starts here."""
        there = numpy.arange(4 * SLAB_BYTES // 8, dtype=numpy.float64)
        try:
            back = self._copies.to_host(self._copies.to_device(there))
        except Exception as error:
            raise DeviceUnusable(f"a first copy to the GPU and back failed: {type(error).__name__}: {error}") from error
        if not numpy.array_equal(there, back):
            raise DeviceUnusable("what was copied to this GPU and back has changed: it cannot be trusted")

    def synchronize(self) -> None:
        """Wait for all work of this thread's stream; CUDA's late errors surface here."""
        self._cupy.cuda.get_current_stream().synchronize()

    def synchronize_all(self) -> None:
        """Wait for the work of every stream; CUDA's late errors surface here."""
        self._runtime.deviceSynchronize()

    def streams(self, count: int) -> Sequence[Stream]:
        """Streams that do not wait for the default one; made once, because CuPy keeps freed memory per stream."""
        while len(self._streams) < count:
            self._streams.append(_CudaStream(self._cupy.cuda.Stream(non_blocking=True)))
        return self._streams[:count]

    def is_healthy(self, error: BaseException | None = None) -> bool:
        """Probe the context without raising: a broken one stays broken until the process ends."""
        if type(error).__name__ in ("CUDARuntimeError", "CUDADriverError") and _status(error) in FATAL_STATUSES:
            return False
        pointer = self._cupy.cuda.get_current_stream().ptr
        if self._runtime.streamQuery(pointer) not in (0, 600):  # 600: work is still running
            return False
        try:
            self._runtime.deviceSynchronize()
        except Exception:
            return False
        return True

    def is_faulty(self, error: BaseException) -> bool:
        """Whether an error says that the hardware is at fault."""
        return type(error).__name__ in ("CUDARuntimeError", "CUDADriverError") and _status(error) in FAULTY_STATUSES

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an exception means too little memory; libraries say it in classes of their own."""
        return _means_too_little_memory(error)

    def free(self) -> None:
        """Give unused pool memory back to the device; the caller has dropped its references."""
        self._pool.free_all_blocks()
        self._cupy.get_default_pinned_memory_pool().free_all_blocks()
        self._cupy.fft.config.get_plan_cache().clear()

    def memory(self, held_bytes: int) -> Memory:
        """Of the device, all processes together; what stays is in the pool and counted with it."""
        free, total = self._runtime.memGetInfo()
        room, limit = free + self._pool.free_bytes(), self._pool.get_limit()
        if limit:
            room = min(room, limit - self._pool.used_bytes())
        return Memory(total - free, total, max(0, room))

    def pooled_bytes(self) -> int:
        """What arrays of this process take in CuPy's pool."""
        return int(self._pool.used_bytes())

    def copied(self) -> Copied:
        """By this process; what a body copies with CuPy's own functions is not in it."""
        return self._copied

    def to_device(self, array: Any) -> Any:
        """A CuPy array with the same contents; large ones through pinned memory, without waiting for the copy."""
        if is_device_array(array):
            return array
        array = numpy.asarray(array)
        self._count(to_device=array.nbytes)
        if is_worth_it(array):
            return self._copies.to_device(numpy.ascontiguousarray(array))
        return self._cupy.asarray(array)

    def to_host(self, array: Any) -> Any:
        """A NumPy array with the same contents; large ones through pinned memory."""
        if not is_device_array(array):
            return numpy.asarray(array)
        self._count(to_host=getattr(array, "nbytes", 0))
        if isinstance(array, self._cupy.ndarray) and is_worth_it(array):
            return self._copies.to_host(self._cupy.ascontiguousarray(array))
        return array.get()

    def receive(self, pieces: Iterable[Any], shape: tuple[int, ...], dtype: str) -> Any:
        """A new CuPy array; of a large one each piece is on its way to the device while the next one comes in."""
        pieces = begun(pieces)
        target = self._cupy.empty(shape, numpy.dtype(dtype).newbyteorder("="))
        self._count(to_device=target.nbytes)
        if numpy.dtype(dtype).isnative and is_worth_it(target):
            start = 0
            for piece in pieces:
                start = self._copies.fill(target, start, piece)
            return target
        return self._cupy.asarray(_received(pieces, shape, dtype))

    def _count(self, to_device: int = 0, to_host: int = 0) -> None:
        self._copied = Copied(self._copied.to_device + to_device, self._copied.to_host + to_host)


def _received(pieces: Iterable[Any], shape: tuple[int, ...], dtype: str) -> "numpy.ndarray[Any, Any]":
    target = assembled(pieces, shape, dtype)
    return target if target.dtype.isnative else target.astype(target.dtype.newbyteorder("="))


class _CudaStream:
    """CuPy's stream, with a Python frame around its waiting, so that a soft limit can end it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __enter__(self) -> Any:
        return self._stream.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._stream.__exit__(*error)

    def synchronize(self) -> None:
        """Wait for its work."""
        self._stream.synchronize()


_current: Device = CpuDevice("")


def open_device(wanted: str, memory_limit: str) -> Device:
    """Make this process's device: ``wanted`` is auto, cuda or cpu; a limit in bytes is a CPU device's logical memory.

    Raises:
        DeviceUnusable: ``cuda`` was demanded and cannot be had.
        ValueError: `memory_limit` is neither bytes nor a share.
    """
    global _current
    logical_bytes = 0 if memory_limit.endswith("%") else read_bytes(memory_limit)
    if wanted == "cpu":
        _current = CpuDevice("BRIDGE_DEVICE=cpu", logical_bytes)
        return _current
    try:
        _current = CudaDevice(memory_limit)
    except (DeviceUnusable, ImportError) as error:
        reason = "CuPy is not installed here (extra 'cuda12' or 'cuda13')" if isinstance(error, ImportError) else error
        if wanted == "cuda":
            raise DeviceUnusable(str(reason)) from error
        _current = CpuDevice(str(reason), logical_bytes)
    return _current


def current_device() -> Device:
    """This process's device: NumPy until `open_device`."""
    return _current


def array_module() -> Any:
    """CuPy inside an executor on a GPU, NumPy everywhere else: ``xp = array_module()`` at the top of a body."""
    return _current.xp


def scipy_module(name: str) -> Any:
    """A SciPy submodule for the current device: ``scipy_module("ndimage")`` is cupyx.scipy.ndimage on a GPU."""
    package = "scipy" if _current.xp is numpy else "cupyx.scipy"
    return importlib.import_module(f"{package}.{name}")


def to_device(array: Any) -> Any:
    """The contents of an array, or of nested lists, as an array of `array_module()`; on NumPy no copy is made.

    From 1 MiB on the copy goes through pinned memory and on while the host continues, in order with what the body
    launches next: with ``Gpu(streams=n)`` it overlaps with other bodies' kernels. `array` may be changed afterwards.
    """
    return _current.to_device(array)


def to_host(array: Any) -> Any:
    """The contents of a device array as a NumPy array, complete when this returns; on NumPy no copy is made.

    It waits for the kernels before it. A body with ``Gpu(streams=n)`` better returns its device arrays as they are:
    the executor copies them in the same way, after all bodies of the group are launched.
    """
    return _current.to_host(array)


def is_short_of_memory(error: BaseException) -> bool:
    """Whether an error that ended an executor's start, or one that caused it, means too little memory."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and all(cause is not each for each in seen):
        if _means_too_little_memory(cause):
            return True
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return False


def _means_too_little_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or _status(error) in _OUT_OF_MEMORY.get(type(error).__name__, ())


def _status(error: BaseException | None) -> int | None:
    return getattr(error, "status", None)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
