"""`python -m benchmarks.gpu`: what only a GPU can show. Without one it says so and ends with 0.

Cold against warm: a new process until its first sum on the device, against the same sum later. Batch curve: a real
kernel chain (a dense layer, then a reduction) from host array to host array, by items per run. Bandwidth: copies to and
from pageable and pinned memory. Overlap: chunks copied in, computed on, copied out, on one stream and on several. The
bridge's own way: arrays on their way to the device, and what a chain of arrays that stay copies (`gpu_path.py`).
"""

import argparse
import importlib.metadata
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from actors.executor.device import open_device
from benchmarks import gpu_kernels, gpu_path, machine, plot
from benchmarks.approaches import ROOT
from benchmarks.records import Record, over, summary_of
from benchmarks.report import show, table
from benchmarks.run import Benchmark, Conclusion, Size, parse, publish
from benchmarks.samples import Spread
from benchmarks.session import Session, say
from benchmarks.targets import Target, at_least, at_most

#: Seconds until the first sum in a new process, then the median of later ones.
COLD_AND_WARM = """
import time
began = time.perf_counter()
import cupy
def total():
    return float(cupy.arange(1e6).sum())
total()
cold = time.perf_counter() - began
warm = []
for _ in range(101):
    began = time.perf_counter()
    total()
    warm.append(time.perf_counter() - began)
print(cold, sorted(warm)[50])
"""

#: Seconds until the warm-up examples of the photographs' tasks have run, then the first photograph, then a later one.
KERNELS = """
import time
from actors.executor.device import open_device
from celery_app.tasks import images
device = open_device("cuda", "90%")
device.warm_up()
began = time.perf_counter()
images.enhance(images._EXAMPLE)
example = time.perf_counter() - began
times = []
for _ in range(21):
    began = time.perf_counter()
    images.enhance(images._EXAMPLE)
    times.append(time.perf_counter() - began)
print(example, times[0], sorted(times[1:])[10])
"""


#: Figures of `gpu_path.chain` begin with this.
CHAIN = "chain, arrays copied by"

Part = Callable[[Size], tuple[dict[str, float], dict[str, list[float]]]]


class GpuOnly(Benchmark):
    """Measured in this process and its children; there is no queue."""

    name = "gpu"
    title = "What only a GPU can show"
    sizes = {"rounds": (5, 2, 5), "copy_mib": (256, 32, 256), "chunks": (16, 6, 16), "chunk_mib": (32, 8, 32)}

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.failed: set[str] = set()

    def measure(self, session: Session | None, size: Size) -> None:
        """All parts in every round, tuning and chain in the first alone; a part that fails is left out of it."""
        device = open_device("cuda", "90%")
        parts: dict[str, Part] = {
            "cold and warm": cold_and_warm,
            "kernels": kernels,
            "batches": gpu_kernels.batch_curve,
            "bandwidth": gpu_kernels.bandwidth,
            "overlap": gpu_kernels.overlap,
            "copies": lambda size: gpu_path.copies(size, device),
            "from Redis": lambda size: gpu_path.from_redis(size, device),
            "tuning": lambda size: gpu_path.tuning(size, device),
            "chain": gpu_path.chain,
        }
        for number in range(1, int(size["rounds"]) + 1):
            record = Record(lane="gpu", round=number)
            for name, part in parts.items():
                try:
                    figures, lists = part(size)
                except Exception as error:
                    self.failed.add(name)
                    say(f"FAILED {name}:\n{traceback.format_exc()}{getattr(error, 'stderr', None) or ''}")
                    continue
                record.figures.update(figures)
                record.lists.update(lists)
            parts.pop("tuning", None)
            parts.pop("chain", None)
            self.records.append(record)
            say(f"round {number}  " + ", ".join(f"{name} {value:.4g}" for name, value in record.figures.items()))

    def conclude(self) -> Conclusion:
        """What a warm process, batches, pinned memory and streams bring."""
        names = self.records[0].figures if self.records else {}
        text = table(["this GPU", "median (extremes)"], [[name, show(self._over(name))] for name in names])
        targets = [
            at_least("warm process against a cold one", self._over("cold / warm"), 100, "x", True),
            at_most("first photograph after warm-up to a later one", self._over("first / later"), 2, "x", True),
            at_least("items/s in the best batch against single", self._over("batch gain"), 10, "x", True),
            at_least("pinned against pageable, to the device", self._over("pinned gain"), 1.0, "x", True),
            at_least("streams against one after the other", self._over("overlap gain"), 1.2, "x", True),
            *(self._reached(mib) for mib in gpu_path.SIZES_MIB),
            at_most("copied between the steps of a resident chain", self._over(f"{CHAIN} the bridge"), 0, "arrays"),
            at_most("the same, as CUPTI counts", self._over(f"{CHAIN} CUPTI"), 0.001, "arrays"),
        ]
        return Conclusion(text, targets, summary_of(self.records), [r.model_dump() for r in self.records])

    def draw(self, pyplot: Any, about: Mapping[str, Any]) -> Any:
        """Four panels."""
        made, (cold, curve, copies, streams) = plot.figure(pyplot, 4, about, f"{self.title}: {about['device']}", 4.8)
        self._bars(
            cold, {"new process": "cold s", "warm process": "warm s"}, "First sum on the device (s)\nless is better"
        )
        whole = [record.lists for record in self.records if "batch_items" in record.lists]
        medians = [statistics.median(c) for c in zip(*(lists["batch_items_per_s"] for lists in whole), strict=True)]
        if whole:
            curve.loglog(whole[0]["batch_items"], medians, "o-", color=plot.BRIDGE)
        curve.set_xlabel("items in one run (logarithmic)")
        plot.finish(curve, "Items per second by batch size (logarithmic)\nfrom host to host, 1024 floats each", "both")
        kinds = [f"{way} {kind}" for way in ("to device", "to host") for kind in ("pageable", "pinned")]
        self._bars(copies, {kind: f"{kind} GB/s" for kind in kinds}, "Copies (GB/s)\nmore is better")
        ways = {"one stream": "serial s", "several streams": "overlapped s"}
        self._bars(streams, ways, "Copy in, compute, copy out, all chunks (s)\nless is better")
        return made

    def _over(self, figure: str) -> Spread | None:
        return over(self.records, "gpu", figure)

    def _reached(self, mib: int) -> Target:
        measured = self._over(f"to_device {mib} MiB to pinned copy")
        return at_least(f"{mib} MiB to the device against one pinned copy", measured, 0.8)

    def _bars(self, axes: Any, figures: Mapping[str, str], title: str) -> None:
        measured = [(label, self._over(figure), plot.SERIES[i]) for i, (label, figure) in enumerate(figures.items())]
        found = [(label, value, colour) for label, value, colour in measured if value]
        if found:  # not where that part has failed
            plot.bars(axes, found, title)


def cold_and_warm(size: Size) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Seconds in a process of its own."""
    done = subprocess.run([sys.executable, "-c", COLD_AND_WARM], capture_output=True, text=True, cwd=ROOT, check=True)
    cold_s, warm_s = map(float, done.stdout.split()[-2:])
    return {"cold s": cold_s, "warm s": warm_s, "cold / warm": cold_s / warm_s}, {}


def kernels(size: Size) -> tuple[dict[str, float], dict[str, list[float]]]:
    """A real task's first run in a new process: with no compiled kernels on disk, with them there, and after that."""
    with tempfile.TemporaryDirectory() as folder:
        command, environment = [sys.executable, "-c", KERNELS], {**os.environ, "CUPY_CACHE_DIR": folder}
        figures: dict[str, float] = {}
        for name in ("compiling", "from disk"):
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
            example_s, first_s, later_s = map(float, done.stdout.split()[-3:])
            figures[f"enhance {name} s"] = example_s
        figures |= {"enhance after warm-up s": first_s, "enhance later s": later_s, "first / later": first_s / later_s}
        return figures, {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a part failed, 0 with a sentence where there is no GPU."""
    benchmark = GpuOnly()
    options: argparse.Namespace = parse(benchmark, arguments)
    device, reason = gpu_kernels.find_device()
    if not device:
        print(f"benchmarks.gpu measures nothing here: {reason}")
        return 0
    began = datetime.now(UTC)
    benchmark.measure(None, options.size)
    conclusion = benchmark.conclude()
    facts = machine.facts(importlib.metadata.version("redis"))
    about = {
        "benchmark": "gpu",
        "began": began.isoformat(timespec="seconds"),
        "device": device,
        "machine": facts,
        "size": dict(options.size),
        "failed": sorted(benchmark.failed),
        "targets": [target.as_dict() for target in conclusion.targets],
    }
    publish(benchmark, conclusion, about, options.name)
    return 1 if benchmark.failed else 0


if __name__ == "__main__":
    sys.exit(main())
