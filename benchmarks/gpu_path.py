"""The measurements of `benchmarks.gpu` on the bridge's own way to the device: how fast, and what a chain copies.

Copies: what a task's argument takes, from a NumPy array and from the pieces that a store gives, beside the plain copy
of one pinned buffer of that size on this card. Chain: tasks whose results stay, in a real executor of an actor without
Ray; bytes are counted by the bridge's device and, where PyTorch is installed, by CUPTI, which sees every copy of the
process. A last step that goes to the host and back shows that both would have seen it.
"""

import itertools
import pickle
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from celery import Celery

from actors.actor.entries import Limits
from actors.actor.shell import ActorShell
from actors.contract import Busy, Call, Config, Pending, Release, StoreConfig, Succeeded, TaskCall
from actors.data.arrays import ArraySpec
from actors.data.stores import Stores
from actors.executor import pinned as pinned_copies
from actors.unopened import Unopened
from benchmarks.approaches import ROOT
from benchmarks.gpu_kernels import pinned
from benchmarks.services import StartFailed, redis_server
from benchmarks.session import say
from bridge.errors import StandaloneFailed

#: Of arrays for which issue 6 promises a share of the pinned bandwidth, in MiB.
SIZES_MIB = (64, 256)
#: Pieces as stores give them, in bytes.
PIECE_BYTES = 1 << 20
#: Tried by `tuning`.
TUNING_THREADS, TUNING_SLABS_MIB = (1, 2, 4, 6, 8, 12), (1, 2, 4, 8)
#: A task that takes longer, in seconds, hangs.
LIMIT_S = 60.0
#: Steps of the chain after the first, each from device to device.
STEPS = 4

APP = """
import json
from pathlib import Path
from celery import Celery
from actors.executor.device import current_device, to_device, to_host
from bridge import Gpu, array_module
from bridge.data import Array

app = Celery("chainapp", broker="memory://", set_as_current=False)
profiles = []

@app.task(name="c.made", gpu=Gpu(result="device"))
def made(count): return array_module().full(count, 1.0, dtype="float32")

@app.task(name="c.step", gpu=Gpu(result="device"))
def step(values: Array): return values * 2

@app.task(name="c.strays", gpu=Gpu(result="device"))
def strays(values: Array): return to_device(to_host(values))

@app.task(name="c.mean", gpu=True)
def mean(values: Array): return float(values.mean())

@app.task(name="c.copied", gpu=True)
def copied(): return list(current_device().copied())

@app.task(name="c.watch", gpu=True)
def watch():
    from torch.profiler import ProfilerActivity, profile
    profiles.append(profile(activities=[ProfilerActivity.CUDA]))
    profiles[0].start()

@app.task(name="c.watched", gpu=True)
def watched(path):
    "Bytes of all copies to and from the device since `watch`."
    profile = profiles.pop()
    profile.stop()
    profile.export_chrome_trace(path)
    events = json.loads(Path(path).read_text())["traceEvents"]
    copies = [each for each in events if each.get("cat") == "gpu_memcpy"]
    return [sum(each["args"]["bytes"] for each in copies if way in each["name"]) for way in ("HtoD", "DtoH")]
"""
TASKS = ("made", "step", "strays", "mean", "copied", "watch", "watched")

Measured = tuple[dict[str, float], dict[str, list[float]]]


def copies(size: Mapping[str, float], device: Any) -> Measured:
    """GB/s of arrays of each size on their way to the device, and what share of a pinned copy's that is.

    Args:
        size: unused; the sizes are those of the promise.
        device: a `CudaDevice`.
    """
    figures: dict[str, float] = {}
    for mib in SIZES_MIB:
        host = numpy.ones(mib << 18, numpy.float32)
        view = memoryview(host).cast("B")
        target, source = device.xp.empty(host.shape, host.dtype), pinned(device.xp, host.size)
        source[:] = 1

        def pieces(view: memoryview = view) -> Iterator[memoryview]:
            return (view[start : start + PIECE_BYTES] for start in range(0, view.nbytes, PIECE_BYTES))

        ways = {
            "pinned copy": lambda target=target, source=source: target.set(source),
            "to_device": lambda host=host: device.to_device(host),
            "in pieces": lambda host=host, pieces=pieces: device.receive(pieces(), host.shape, host.dtype.str),
        }
        for way, run in ways.items():
            figures[f"{way} {mib} MiB GB/s"] = host.nbytes / median_s(run, device) / 1e9
        for way in ("to_device", "in pieces"):
            share = figures[f"{way} {mib} MiB GB/s"] / figures[f"pinned copy {mib} MiB GB/s"]
            figures[f"{way} {mib} MiB to pinned copy"] = share
        back = median_s(lambda target=target: device.to_host(target), device)
        figures[f"to_host {mib} MiB GB/s"] = host.nbytes / back / 1e9
    return figures, {}


def tuning(size: Mapping[str, float], device: Any) -> Measured:
    """GB/s to the device by threads, for buffers of several sizes: what to change where the promise is missed."""
    lists: dict[str, list[float]] = {"tuning threads": [float(each) for each in TUNING_THREADS]}
    before = pinned_copies.SLAB_BYTES, pinned_copies.SLABS
    try:
        for mib, slab_mib in itertools.product(SIZES_MIB, TUNING_SLABS_MIB):
            pinned_copies.SLAB_BYTES, pinned_copies.SLABS = slab_mib << 20, 128 // slab_mib
            host, rates = numpy.ones(mib << 18, numpy.float32), []
            for threads in TUNING_THREADS:
                ring = pinned_copies.PinnedCopies(device.xp, threads)
                rates.append(host.nbytes / median_s(lambda ring=ring, host=host: ring.to_device(host), device) / 1e9)
            lists[f"tuning {mib} MiB, buffers of {slab_mib} MiB GB/s"] = rates
    finally:
        pinned_copies.SLAB_BYTES, pinned_copies.SLABS = before
    for name, rates in lists.items():
        say(f"{name}: {', '.join(f'{rate:.3g}' for rate in rates)}")
    return {}, lists


def from_redis(size: Mapping[str, float], device: Any) -> Measured:
    """GB/s of an array of 64 MiB by reference, from a Redis on this host to the device; nothing where there is none."""
    host = numpy.ones(64 << 18, numpy.float32)
    try:
        with tempfile.TemporaryDirectory(dir="/tmp") as folder, redis_server(Path(folder)) as (_, url):
            stores = Stores(Celery(set_as_current=False), StoreConfig(f"{url}/0"))
            ref = stores.put(host)
            took_s = median_s(lambda: device.receive(stores.pieces(ref), ref.shape, ref.dtype), device)
    except (OSError, StartFailed, StandaloneFailed):
        return {}, {}
    return {"from Redis 64 MiB GB/s": host.nbytes / took_s / 1e9}, {}


def median_s(run: Any, device: Any) -> float:
    """The median of nine, in seconds, until the device has it; two before that do not count."""
    times = []
    for _ in range(11):
        began = time.perf_counter()
        run()
        device.synchronize()
        times.append(time.perf_counter() - began)
    return sorted(times[2:])[4]


class Counted(NamedTuple):
    """Bytes of copies to and from the device, while a chain ran and while a step went by the host."""

    chain: int
    stray: int


def chain(size: Mapping[str, float], device: str = "cuda") -> Measured:
    """How many arrays' bytes a resident chain copies between its steps, by each counter that has seen the stray step.

    Args:
        size: "copy_mib" is that of the array.
        device: "cuda", or "cpu" to try the way alone: no counter sees anything there.
    """
    count = int(size["copy_mib"]) << 18
    with executor(device) as run:
        ours = _counted(run, count, lambda: sum(run("copied")))
        theirs = _by_cupti(run, count)
    figures = {}
    for name, counted in {"the bridge": ours, "CUPTI": theirs}.items():
        if counted and counted.stray >= 2 * count * 4:
            figures[f"chain, arrays copied by {name}"] = counted.chain / (count * 4)
            figures[f"stray step, arrays copied by {name}"] = counted.stray / (count * 4)
    return figures, {}


def _counted(run: Any, count: int, total: Any) -> Counted:
    """`total` says how many bytes were copied so far."""
    run("copied")  # what a first run copies is not the chain's
    before, values = total(), _chain(run, count)
    between = total()
    values = run("strays", values)
    after = total()
    if run("mean", values) != 2.0**STEPS:
        raise RuntimeError("the chain computed something else")
    return Counted(between - before, after - between)


def _chain(run: Any, count: int) -> Any:
    values = run("made", count)
    for _ in range(STEPS):
        values = run("step", values)
    return values


def _by_cupti(run: Any, count: int) -> Counted | None:
    """The same by PyTorch's profiler; None where it is not installed or does not work here."""
    with tempfile.TemporaryDirectory() as folder:

        def watched(work: Any) -> Any:
            run("watch")
            values = work()
            return values, sum(run("watched", str(Path(folder, uuid.uuid4().hex + ".json"))))

        try:
            watched(lambda: None)
            values, between = watched(lambda: _chain(run, count))
            return Counted(between, watched(lambda: run("strays", values))[1])
        except RuntimeError:
            return None


@contextmanager
def executor(device: str) -> Iterator[Any]:
    """A warm executor; what it gives runs a task by name and returns its value."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "chainapp.py").write_text(APP)
        names = tuple(f"c.{name}" for name in TASKS)
        release = Release("chain", "chainapp:app", "", (folder, str(ROOT)), folder, (), names, ())
        shell = ActorShell(0, Limits(65_536, 4096, 0.02, 600.0, 600.0, 5.0), on_abandoned=lambda: None)
        try:
            health = shell.hello("benchmark", "", Config(release, device, "90%", 30, 65_536, "50%"))
            deadline = time.monotonic() + 120
            while health.state != "ready":
                if time.monotonic() > deadline:
                    raise RuntimeError(f"no executor: {health}")
                time.sleep(0.05)
                health = shell.health("benchmark", "chain")
            yield lambda name, *arguments: _value(shell, name, arguments)
        finally:
            shell.close()
            shell._thread.join(30)


def _value(shell: ActorShell, name: str, arguments: tuple[Any, ...]) -> Any:
    """Of one task, as a driver sends it.

    Raises:
        RuntimeError: it did not succeed; the text says why.
    """
    token = uuid.uuid4().hex
    opened = tuple(Unopened(ArraySpec(), each) if hasattr(each, "executor") else each for each in arguments)
    context = {"id": token, "delivery_info": {"exchange": "", "routing_key": "gpu"}}
    task = TaskCall(token, f"c.{name}", pickle.dumps((opened, {}, context), 5), None, LIMIT_S, stays=True)
    call = Call(token, "benchmark", "chain", (task,), 0.0)
    reply = shell.run(call)
    while not isinstance(reply, Busy):
        for answer in reply.answers:
            if isinstance(answer, Succeeded):
                return pickle.loads(answer.value)
            if not isinstance(answer, Pending):
                raise RuntimeError(f"{name}: {answer}")
        reply = shell.collect(call, 1.0)
    raise RuntimeError(f"{name}: {reply}")
