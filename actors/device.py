"""The device under the executor: CuPy on a GPU, NumPy where there is none. The only file that imports CuPy.

`open_device` makes the process's one device; until then `array_module` is NumPy, so bodies run anywhere. Nothing here
is called in the Celery worker, the driver or the actor: they never touch CUDA.
"""

import importlib
import os
import platform
from typing import Any, NamedTuple, Protocol

import numpy

#: CUDA statuses after which the process must end (facts 1.6: CUDA's headers say "must be terminated and relaunched").
FATAL_STATUSES = frozenset(
    {4, 201, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911, 999}
)

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


class DeviceInfo(NamedTuple):
    """What a person and the scheduler need to know about a device; memory in bytes, 0 where unknown."""

    kind: str  # "cuda" or "cpu"
    name: str
    memory_bytes: int
    libraries: str
    note: str  # why it is not a GPU, else ""


class DeviceUnusable(Exception):
    """CUDA was demanded and cannot be had; the text says why and what to do."""


class Device(Protocol):
    """What the executor needs of a device. All calls come from the executor's main thread."""

    xp: Any

    def describe(self) -> DeviceInfo:
        """Model, memory and versions."""
        ...

    def warm_up(self) -> None:
        """Pay every first-call cost now."""
        ...

    def synchronize(self) -> None:
        """Wait for the work of this thread."""
        ...

    def is_healthy(self, error: BaseException | None = None) -> bool:
        """Whether the context still works, after `error` came out of a body."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an exception means too little memory."""
        ...

    def free(self) -> None:
        """Give unused pooled memory back."""
        ...

    def memory(self) -> tuple[int, int]:
        """(used, total) bytes."""
        ...


class CpuDevice:
    """NumPy on the CPU, through the same code path as a GPU."""

    xp: Any = numpy

    def __init__(self, note: str) -> None:
        self._note = note

    def describe(self) -> DeviceInfo:
        """What a person sees: NumPy, and why it is not a GPU."""
        libraries = f"NumPy {numpy.__version__}, Python {platform.python_version()}"
        return DeviceInfo("cpu", "NumPy on CPU", 0, libraries, self._note)

    def warm_up(self) -> None:
        """Touch what the first task would otherwise load."""
        numpy.linalg.norm(numpy.arange(16.0))

    def synchronize(self) -> None:
        """Nothing runs asynchronously here."""

    def is_healthy(self, error: BaseException | None = None) -> bool:
        """A CPU has no context that can break."""
        return True

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an exception means too little memory."""
        return isinstance(error, MemoryError)

    def free(self) -> None:
        """Nothing is pooled here."""

    def memory(self) -> tuple[int, int]:
        """(used, total) bytes; a CPU device has no memory of its own."""
        return 0, 0


class CudaDevice:
    """One GPU through CuPy: context, memory pool with a limit, streams and probes."""

    def __init__(self, memory_limit: str) -> None:
        os.environ.setdefault("CUPY_GPU_MEMORY_LIMIT", memory_limit)  # CuPy reads it when its pool is made
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

    def describe(self) -> DeviceInfo:
        """GPU model, its memory, and the versions that matter in a bug report."""
        properties = self._runtime.getDeviceProperties(0)
        driver, cuda = self._runtime.driverGetVersion(), self._runtime.runtimeGetVersion()
        libraries = f"CuPy {self._cupy.__version__}, CUDA {_version(cuda)}, driver supports CUDA {_version(driver)}"
        return DeviceInfo("cuda", properties["name"].decode(), properties["totalGlobalMem"], libraries, "")

    def warm_up(self) -> None:
        """Create the context, compile an elementwise and a reduction kernel, and copy both ways once.

        Raises:
            DeviceUnusable: CuPy cannot compile or run a kernel here.
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

    def synchronize(self) -> None:
        """Wait for all work of this thread's stream; CUDA's late errors surface here."""
        self._cupy.cuda.get_current_stream().synchronize()

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

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an exception means too little memory; libraries say it in classes of their own."""
        if isinstance(error, MemoryError):
            return True
        return _status(error) in _OUT_OF_MEMORY.get(type(error).__name__, ())

    def free(self) -> None:
        """Give unused pool memory back to the device; the caller has dropped its references."""
        self._cupy.get_default_memory_pool().free_all_blocks()
        self._cupy.get_default_pinned_memory_pool().free_all_blocks()
        self._cupy.fft.config.get_plan_cache().clear()

    def memory(self) -> tuple[int, int]:
        """(used, total) bytes of the device, all processes together."""
        free, total = self._runtime.memGetInfo()
        return total - free, total


_current: Device = CpuDevice("")


def open_device(wanted: str, memory_limit: str) -> Device:
    """Make this process's device: ``wanted`` is auto, cuda or cpu.

    Raises:
        DeviceUnusable: ``cuda`` was demanded and cannot be had.
    """
    global _current
    if wanted == "cpu":
        _current = CpuDevice("BRIDGE_DEVICE=cpu")
        return _current
    try:
        _current = CudaDevice(memory_limit)
    except (DeviceUnusable, ImportError) as error:
        reason = "CuPy is not installed here (extra 'cuda12' or 'cuda13')" if isinstance(error, ImportError) else error
        if wanted == "cuda":
            raise DeviceUnusable(str(reason)) from error
        _current = CpuDevice(str(reason))
    return _current


def array_module() -> Any:
    """CuPy inside an executor on a GPU, NumPy everywhere else: ``xp = array_module()`` at the top of a body."""
    return _current.xp


def scipy_module(name: str) -> Any:
    """A SciPy submodule for the current device: ``scipy_module("ndimage")`` is cupyx.scipy.ndimage on a GPU."""
    package = "scipy" if _current.xp is numpy else "cupyx.scipy"
    return importlib.import_module(f"{package}.{name}")


def is_device_array(value: Any) -> bool:
    """Whether a value is a CuPy array or scalar, told without importing CuPy."""
    return type(value).__module__.partition(".")[0] == "cupy"


def _status(error: BaseException | None) -> int | None:
    return getattr(error, "status", None)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
