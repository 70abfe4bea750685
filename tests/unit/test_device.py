"""The device where there is no GPU: NumPy, and what of the real CuPy can be asked without one."""

import sys
import types

import numpy
import pytest

from actors.executor import device
from actors.executor.device import CpuDevice, CudaDevice, DeviceUnusable, open_device


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(device, "_current", CpuDevice(""))
    monkeypatch.setenv("CUPY_GPU_MEMORY_LIMIT", "")
    monkeypatch.delenv("CUPY_GPU_MEMORY_LIMIT")


@pytest.fixture
def cupy():
    """The real CuPy, on a machine where it finds no GPU."""
    cupy = pytest.importorskip("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        return cupy
    pytest.skip("there is a GPU here: see tests/gpu")


# ---- NumPy


def test_until_a_device_is_opened_bodies_use_numpy():
    assert device.array_module() is numpy
    import scipy.ndimage

    assert device.scipy_module("ndimage") is scipy.ndimage


def test_cpu_never_looks_for_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    opened = open_device("cpu", "90%")
    info = opened.describe()
    assert (info.kind, info.name, info.memory_bytes, info.note) == ("cpu", "NumPy on CPU", 0, "BRIDGE_DEVICE=cpu")
    assert f"NumPy {numpy.__version__}" in info.libraries
    assert device.array_module() is numpy


def test_a_cpu_device_does_all_an_executor_asks_for():
    opened = CpuDevice("why")
    opened.warm_up()
    opened.synchronize()
    opened.free()
    assert opened.is_healthy()
    opened.synchronize_all()
    assert opened.memory(100) == (0, 0, 0), "unknown"
    assert opened.pooled_bytes() == 0
    assert opened.describe().note == "why"


def test_a_limit_in_bytes_is_the_logical_memory_of_a_cpu_device():
    opened = open_device("cpu", "8GiB")
    assert opened.describe().memory_bytes == 8 << 30
    assert opened.memory(3 << 30) == (3 << 30, 8 << 30, 5 << 30)
    assert opened.memory(9 << 30).free == 0
    assert open_device("cpu", "90%").describe().memory_bytes == 0


def test_a_limit_that_is_none_is_refused():
    with pytest.raises(ValueError):
        open_device("cpu", "much")


def test_streams_of_a_cpu_do_all_at_once():
    first, second = CpuDevice("").streams(2)
    with first, second:
        pass
    first.synchronize()


def test_out_of_memory_on_a_cpu():
    opened = CpuDevice("")
    assert opened.is_out_of_memory(MemoryError())
    with pytest.raises(MemoryError) as caught:
        numpy.empty(1 << 58)
    assert opened.is_out_of_memory(caught.value)
    assert not opened.is_out_of_memory(ValueError())


# ---- the real CuPy without a GPU


def test_a_gpu_that_was_demanded_and_is_not_there_is_an_error_that_says_why(cupy):
    with pytest.raises(DeviceUnusable, match="NVIDIA driver"):
        CudaDevice("90%")
    with pytest.raises(DeviceUnusable, match="NVIDIA driver"):
        open_device("cuda", "90%")


def test_auto_falls_back_and_says_why(cupy):
    info = open_device("auto", "90%").describe()
    assert info.kind == "cpu"
    assert "NVIDIA driver" in info.note
    assert device.array_module() is numpy


def test_a_driver_without_a_gpu_says_so(cupy, monkeypatch):
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(DeviceUnusable, match="CUDA_VISIBLE_DEVICES"):
        CudaDevice("90%")
    assert "CUDA_VISIBLE_DEVICES" in open_device("auto", "90%").describe().note


@pytest.mark.parametrize(
    ("status", "says"), [(46, "exclusive"), (802, "fabricmanager"), (803, "do not match"), (100, "visible")]
)
def test_each_reason_has_its_sentence(cupy, monkeypatch, status, says):
    def refuse():
        raise cupy.cuda.runtime.CUDARuntimeError(status)

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", refuse)
    with pytest.raises(DeviceUnusable, match=says):
        CudaDevice("90%")


def test_a_reason_nobody_foresaw_is_shown_as_cuda_says_it(cupy, monkeypatch):
    def refuse():
        raise cupy.cuda.runtime.CUDARuntimeError(101)

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", refuse)
    with pytest.raises(DeviceUnusable, match="cudaErrorInvalidDevice"):
        CudaDevice("90%")


def test_a_gpu_that_is_there_but_cannot_be_used_is_unusable_too(cupy, monkeypatch):
    """The count says one; to use it fails, as with an exclusive GPU or with full memory."""
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 1)
    with pytest.raises(DeviceUnusable):
        CudaDevice("90%")
    assert open_device("auto", "90%").describe().kind == "cpu"


def test_without_cupy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceUnusable, match="cuda12"):
        open_device("cuda", "90%")
    assert "CuPy is not installed" in open_device("auto", "90%").describe().note


def test_the_memory_limit_is_set_before_cupy_reads_it(cupy, monkeypatch):
    import os

    open_device("auto", "77%")
    assert os.environ["CUPY_GPU_MEMORY_LIMIT"] == "77%"
    monkeypatch.setenv("CUPY_GPU_MEMORY_LIMIT", "1073741824")
    open_device("auto", "77%")
    assert os.environ["CUPY_GPU_MEMORY_LIMIT"] == "1073741824", "the user's own comes first"
    monkeypatch.delenv("CUPY_GPU_MEMORY_LIMIT")
    open_device("auto", "8GiB")
    assert os.environ["CUPY_GPU_MEMORY_LIMIT"] == str(8 << 30), "CuPy reads no units"


# ---- which errors mean what


def cuda():
    """A CudaDevice for what needs no GPU."""
    return object.__new__(CudaDevice)


def test_cupys_own_out_of_memory_is_recognised(cupy):
    error = cupy.cuda.memory.OutOfMemoryError(1 << 40, 1 << 30, 0)
    assert isinstance(error, MemoryError)
    assert cuda().is_out_of_memory(error)


def test_a_runtime_allocation_that_fails_is_recognised(cupy):
    """Pinned memory, streams and arrays are allocated by the runtime, which says status 2."""
    error = cupy.cuda.runtime.CUDARuntimeError
    assert cuda().is_out_of_memory(error(2))
    assert not any(cuda().is_out_of_memory(error(status)) for status in (1, 3, 35, 700))


def library_error(name, status):
    """Of a CUDA library that is not installed here, as `device.py` tells it: by class name and status."""
    error = type(name, (RuntimeError,), {})("failed")
    error.status = status
    return error


@pytest.mark.parametrize(
    ("name", "status", "means"),
    [
        ("CUBLASError", 1, True),  # NOT_INITIALIZED: no memory for its workspace
        ("CUBLASError", 3, True),
        ("CUBLASError", 13, False),
        ("CuFFTError", 2, True),
        ("CuFFTError", 5, False),
        ("CUSOLVERError", 2, True),
        ("CuSparseError", 2, True),
        ("CURANDError", 102, True),
        ("CUDADriverError", 2, True),
        ("CUDADriverError", 700, False),
        ("SomethingElse", 2, False),
    ],
)
def test_libraries_say_out_of_memory_in_classes_of_their_own(name, status, means):
    assert cuda().is_out_of_memory(library_error(name, status)) is means


def test_an_ordinary_error_is_no_out_of_memory():
    assert not cuda().is_out_of_memory(ValueError("2"))
    assert cuda().is_out_of_memory(MemoryError())


# ---- health, with a runtime the test holds


def healthy(query=0, error=None):
    def synchronize():
        if error is not None:
            raise error

    opened = cuda()
    opened._runtime = types.SimpleNamespace(streamQuery=lambda pointer: query, deviceSynchronize=synchronize)
    stream = types.SimpleNamespace(ptr=7)
    opened._cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(get_current_stream=lambda: stream))
    return opened.is_healthy()


def test_a_context_is_healthy_also_while_it_works():
    assert healthy(0)
    assert healthy(600)


@pytest.mark.parametrize("status", [700, 719, 999])
def test_a_broken_context_is_seen_without_raising(status):
    assert not healthy(status)


def test_a_late_error_is_seen_by_waiting_for_it():
    assert not healthy(600, RuntimeError("cudaErrorIllegalAddress"))


# ---- memory, with a pool the test holds


@pytest.mark.parametrize(
    ("limit", "used", "pooled", "free"),
    [
        (0, 30, 10, 60),  # no limit: free on the device (50), and unused in the pool (10)
        (90, 30, 10, 60),  # a limit that does not bind
        (80, 30, 10, 50),
        (80, 90, 10, 0),  # a limit lowered since
    ],
)
def test_a_body_can_have_what_is_free_on_the_device_and_in_the_pool_below_its_limit(limit, used, pooled, free):
    opened = cuda()
    opened._runtime = types.SimpleNamespace(memGetInfo=lambda: (50, 100))
    opened._pool = types.SimpleNamespace(get_limit=lambda: limit, used_bytes=lambda: used, free_bytes=lambda: pooled)
    assert opened.memory(12345) == (50, 100, free)
    assert opened.pooled_bytes() == used


def test_the_real_pool_answers_these_questions(cupy):
    pool = cupy.get_default_memory_pool()
    assert all(callable(getattr(pool, name)) for name in ("get_limit", "used_bytes", "free_bytes", "free_all_blocks"))


def test_streams_are_made_once_and_do_not_wait_for_the_default_one():
    made = []
    opened = cuda()
    opened._streams = []

    def stream(non_blocking):
        made.append(non_blocking)
        return types.SimpleNamespace(synchronize=lambda: None, number=len(made))

    opened._cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(Stream=stream))
    two, three = opened.streams(2), opened.streams(3)
    assert made == [True] * 3 and list(three[:2]) == list(two)
    two[0].synchronize()


def test_cupys_arrays_are_told_by_their_class(cupy):
    array = object.__new__(type("ndarray", (), {"__module__": "cupy"}))
    assert device.is_device_array(array)
    assert cupy.ndarray.__module__.partition(".")[0] == "cupy"
    assert not device.is_device_array(numpy.zeros(1))
    assert not device.is_device_array(object.__new__(type("Fake", (), {"__module__": "cupyx_tools"})))


def test_cuda_versions_are_written_as_people_write_them():
    assert [device._version(number) for number in (12090, 13000, 11080)] == ["12.9", "13.0", "11.8"]
