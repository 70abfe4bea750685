"""The measurements of `benchmarks.gpu` that run in its own process, with CuPy; the bridge imports none of it."""

import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy

#: Items in one run, and floats in one item.
BATCHES, WIDTH = (1, 4, 16, 64, 256, 1024, 4096), 1024

#: Streams of the overlapped way: one copies in while one computes and one copies out.
STREAMS = 3

Measured = tuple[dict[str, float], dict[str, list[float]]]


def find_device() -> tuple[str, str]:
    """(name of the GPU, "") or ("", why there is none that can be used)."""
    try:
        runtime = importlib.import_module("cupy").cuda.runtime
        if runtime.getDeviceCount() == 0:
            return "", "no GPU is visible to this process"
        return runtime.getDeviceProperties(0)["name"].decode(), ""
    except ImportError:
        return "", "CuPy is not installed (extra 'cuda12' or 'cuda13')"
    except Exception as error:  # CuPy's runtime error has no base class of its own without a driver
        return "", f"no GPU can be used ({error})"


def batch_curve(size: Mapping[str, float]) -> Measured:
    """Items per second of a dense layer with a reduction, from NumPy array to NumPy array, by items in a run."""
    cupy = importlib.import_module("cupy")
    weights = cupy.random.default_rng(1).standard_normal((WIDTH, WIDTH), dtype=cupy.float32)
    rates = []
    for items in BATCHES:
        host = numpy.ones((items, WIDTH), dtype=numpy.float32)

        def run(host: Any = host) -> None:
            cupy.asnumpy(cupy.maximum(cupy.asarray(host) @ weights, 0).sum(axis=1))

        rates.append(items / seconds(run, 20))
    lists = {"batch_items": [float(items) for items in BATCHES], "batch_items_per_s": rates}
    return {"batch gain": max(rates) / rates[0]}, lists


def bandwidth(size: Mapping[str, float]) -> Measured:
    """GB/s of one large copy each way, from and to pageable and pinned memory."""
    cupy = importlib.import_module("cupy")
    count = int(size["copy_mib"]) * 2**20 // 4
    device = cupy.zeros(count, dtype=cupy.float32)
    hosts = {"pageable": numpy.zeros(count, dtype=numpy.float32), "pinned": pinned(cupy, count)}
    figures = {}
    for kind, host in hosts.items():
        figures[f"to device {kind} GB/s"] = device.nbytes / seconds(lambda host=host: device.set(host), 5) / 1e9
        figures[f"to host {kind} GB/s"] = device.nbytes / seconds(lambda host=host: device.get(out=host), 5) / 1e9
    figures["pinned gain"] = figures["to device pinned GB/s"] / figures["to device pageable GB/s"]
    return figures, {}


def overlap(size: Mapping[str, float]) -> Measured:
    """Seconds for chunks that are copied in, computed on and copied out: on one stream, and on several in turn."""
    cupy = importlib.import_module("cupy")
    count = int(size["chunk_mib"]) * 2**20 // 4
    hosts = [(pinned(cupy, count), pinned(cupy, count)) for _ in range(int(size["chunks"]))]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(STREAMS)]
    devices = [cupy.zeros(count, dtype=cupy.float32) for _ in streams]

    def work(lanes: int) -> None:
        for index, (source, target) in enumerate(hosts):
            stream, device = streams[index % lanes], devices[index % lanes]
            with stream:
                device.set(source, stream=stream)
                for _ in range(8):  # about as long as a copy
                    cupy.sin(device, out=device)
                device.get(stream=stream, out=target, blocking=False)
        for stream in streams:
            stream.synchronize()

    serial_s, overlapped_s = seconds(lambda: work(1), 3), seconds(lambda: work(STREAMS), 3)
    return {"serial s": serial_s, "overlapped s": overlapped_s, "overlap gain": serial_s / overlapped_s}, {}


def seconds(run: Callable[[], None], repeats: int) -> float:
    """The mean over `repeats`, after one run that does not count; the device has finished at both ends."""
    device = importlib.import_module("cupy").cuda.Device()
    run()
    device.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    device.synchronize()
    return (time.perf_counter() - began) / repeats


def pinned(cupy: Any, count: int) -> Any:
    """A float32 array of page-locked host memory."""
    memory = cupy.cuda.alloc_pinned_memory(4 * count)
    return numpy.frombuffer(memory, numpy.float32, count)
