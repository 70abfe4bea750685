"""`python -m benchmarks.data`: what does an array of 1 and 16 MiB cost, as a list, in base64, by reference, resident?

Calls go one at a time from the array in the producer's memory to the result in its hands, so that encoding and
putting count, and as a backlog. CPU is that of all processes but the producer. Before that many producers put arrays
at once, and the memory of worker and driver is watched.
"""

import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plot
from benchmarks.approaches import ROOT, bridge, prefork
from benchmarks.cpu import Kind, Watch
from benchmarks.data_ways import MIB, Way, floats, ways
from benchmarks.lane import Lane, LaneFailed, Message
from benchmarks.records import Record, noise, over, ratio, record_table, summary_of
from benchmarks.report import QUIET_SHARE
from benchmarks.run import Benchmark, Conclusion, Size, main
from benchmarks.samples import Spread, percentile
from benchmarks.session import Session, rotated, say
from benchmarks.targets import Target, at_least, at_most

APPROACHES = (
    prefork("benchmarks.apps.plain_data", task="total", args=([1.0],)),
    bridge("benchmarks.apps.bridge_data", task="total", args=([1.0],)),
)
WAYS = ways()
COLUMNS = {
    "throughput": "tasks/s",
    "cpu_ms": "CPU ms/task",
    "p50_ms": "p50 ms",
    "alone_cpu_ms": "CPU ms, one at a time",
    "sender_ms": "producer's CPU ms",
    "redis_mib": "MiB through Redis",
}
#: Kinds whose memory many producers must not drive up.
WATCHED = (Kind.WORKER, Kind.DRIVER)
#: Times that an array of the crowd's sum must be found, at most, in seconds.
CROWD_S = 240.0


class Data(Benchmark):
    """Arrays in messages and beside them."""

    name = "data"
    title = "Arrays of 1 and 16 MiB: in the message, beside it, on the device"
    approaches = APPROACHES
    sizes = {
        "rounds": (5, 1, 5), "small": (20, 2, 20), "large": (3, 0, 10),
        "producers": (64, 4, 64), "crowd_mib": (16, 1, 16),
    }  # fmt: skip

    def __init__(self) -> None:
        self.records: list[Record] = []

    def measure(self, session: Session, size: Size) -> None:
        """The crowds, while worker and driver have met nothing large; then all ways, compared ones side by side."""
        rounds = int(size["rounds"])
        if running := session.lanes.get("bridge"):
            with session.may_fail("bridge"):
                for number in range(1, rounds + 1):
                    self._remember("crowd", number, crowd(running, int(size["producers"]), int(size["crowd_mib"])))
        for number in range(1, rounds + 1):
            for way in rotated(list(WAYS), number):
                if running := session.lanes.get(way.worker):
                    with session.may_fail(way.worker):
                        self._one(number, running, way, size)

    def conclude(self) -> Conclusion:
        """Each way's latency and CPU, then what targets make of them."""
        titles = {lane_of(way): f"{way.title}, {way.mib} MiB" for way in WAYS}
        parts = [record_table(self.records, titles, COLUMNS, "an array and what it costs")]
        between = {"message_bytes": "message", "result_bytes": "result", "form_bytes": "the array in it"}
        chains = {lane_of(way): titles[lane_of(way)] for way in WAYS if "chain" in way.name}
        parts.append(record_table(self.records, chains, between, "bytes between two steps"))
        crowd = {f"{kind.value}_mib": f"{kind.value} MiB above idle" for kind in WATCHED}
        parts.append(record_table(self.records, {"crowd": "many producers at once"}, crowd | {"s": "seconds"}, "peak"))
        parts.append(noise([r.figures["foreign"] for r in self.records if "foreign" in r.figures], QUIET_SHARE))
        return Conclusion(
            "\n\n".join(parts), self._targets(), summary_of(self.records), [r.model_dump() for r in self.records]
        )

    def draw(self, pyplot: Any, about: Mapping[str, Any]) -> Any:
        """Latency and CPU by way, small arrays above large ones."""
        made, panels = plot.figure(pyplot, 4, about, self.title, height=4.8)
        for axes, (mib, figure) in zip(
            panels, ((1, "p50_ms"), (1, "cpu_ms"), (16, "p50_ms"), (16, "cpu_ms")), strict=True
        ):
            found = [(way, over(self.records, lane_of(way), figure)) for way in WAYS if way.mib == mib]
            rows = [(way.title, value, plot.colour_of(way.name)) for way, value in found if value]
            if not rows:  # a smoke run leaves out the large ones
                axes.set_visible(False)
                continue
            what = "p50, one at a time (ms)" if figure == "p50_ms" else "CPU per task, all processes (ms)"
            plot.bars(axes, rows, f"{mib} MiB: {what}\nless is better")
        return made

    def _targets(self) -> Sequence[Target]:
        def gain(figure: str, base: str, mine: str) -> Spread | None:
            return ratio(self.records, figure, base, mine)

        found = []
        for mib in (1, 16):
            for figure, what in (("p50_ms", "p50"), ("cpu_ms", "CPU")):
                value = gain(figure, f"prefork-base64-{mib}", f"bridge-ref-{mib}")
                found.append(at_least(f"{what} of base64 on prefork to by reference, {mib} MiB", value, 5))
        value = gain("cpu_ms", "bridge-list-1", "prefork-list-1")
        found.append(at_most("CPU of a JSON list to prefork's, 1 MiB", value, 0.35))
        for mib, chosen in ((1, False), (16, True)):
            value = gain("p50_ms", f"prefork-chain-base64-{mib}", f"bridge-chain-device-{mib}")
            what = f"p50 of a chain by base64 on prefork to resident, {mib} MiB"
            found.append(at_least(what, value, 10, "x", chosen))
        form = over(self.records, "bridge-chain-device-1", "form_bytes")
        found.append(at_most("the array between two resident steps", form, 1000, "bytes", True))
        for kind in WATCHED:
            value = over(self.records, "crowd", f"{kind.value}_mib")
            found.append(at_most(f"peak memory of the {kind.value} above idle, many producers", value, 100, "MiB"))
        return found

    def _one(self, number: int, running: Lane, way: Way, size: Size) -> None:
        os.environ["BRIDGE_DATA_URL"] = running.addresses.data  # where `data.put` puts
        tasks = int(size["small" if way.mib == 1 else "large"]) / len(way.tasks)
        if tasks:
            self._remember(lane_of(way), number, measured(running, way, math.ceil(tasks)))
        running.results.flushdb()
        running.data.flushdb()

    def _remember(self, lane: str, number: int, figures: dict[str, float]) -> None:
        self.records.append(Record(lane=lane, round=number, figures=figures))
        say(f"round {number}  {lane:<26} " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def lane_of(way: Way) -> str:
    """Under which name a way's figures are kept."""
    return f"{way.name}-{way.mib}"


def measured(running: Lane, way: Way, tasks: int) -> dict[str, float]:
    """One way: calls one after the other, the first not counted; and of single tasks a backlog of twice as many."""
    figures = alone(running, way, tasks)
    running.results.flushdb()
    if len(way.tasks) == 1:
        return figures | together(running, way, 2 * tasks)
    sizes = way.between(running)
    return figures | {"message_bytes": sizes.message, "result_bytes": sizes.result, "form_bytes": sizes.form}


def alone(running: Lane, way: Way, calls: int) -> dict[str, float]:
    """Calls one after the other."""
    way.call(running)
    running.await_acknowledged()
    watch, sender_s, bytes_before = Watch(running.family), time.process_time(), through_redis(running)
    latencies_ms = []
    for _ in range(calls):
        began = time.perf_counter()
        way.call(running)
        latencies_ms.append(1000 * (time.perf_counter() - began))
    sender_s = time.process_time() - sender_s
    running.await_acknowledged()
    cpu_s, foreign = watch.end()
    figures = {f"alone_{kind.value}_ms": 1000 * value / calls for kind, value in cpu_s.items()}
    return figures | {
        "p50_ms": percentile(latencies_ms, 0.5),
        "alone_cpu_ms": 1000 * sum(cpu_s.values()) / calls,
        "sender_ms": 1000 * sender_s / calls,
        "redis_mib": (through_redis(running) - bytes_before) / calls / MIB,
        "foreign": foreign,
    }


def together(running: Lane, way: Way, tasks: int) -> dict[str, float]:
    """A backlog; arrays have been put when its clock starts."""
    running.stage([Message(way.tasks[0], (way.encode(floats(way.mib)),)) for _ in range(tasks)])
    backlog = running.backlog(tasks)
    for value in running.values():
        way.check(value)
    figures = {f"{kind.value}_ms": 1000 * value / tasks for kind, value in backlog.cpu_s.items()}
    return figures | {
        "throughput": tasks / backlog.seconds,
        "cpu_ms": 1000 * sum(backlog.cpu_s.values()) / tasks,
        "foreign_together": backlog.foreign_share,
    }


def through_redis(running: Lane) -> int:
    """Bytes that Redis has received and sent so far."""
    stats = running.broker.info("stats")
    return int(stats["total_net_input_bytes"] + stats["total_net_output_bytes"])


def crowd(running: Lane, producers: int, mib: int) -> dict[str, float]:
    """Many producers at once; by how much worker and driver grew, at their highest."""
    watched = [(process.pid, kind) for process, kind in running.family.members() if kind in WATCHED]
    idle = {pid: reset_peak_mib(pid) for pid, _ in watched}
    command = [
        sys.executable, "-m", "benchmarks.apps.data_producers", running.approach.name, str(producers), str(mib * MIB)
    ]  # fmt: skip
    places = running.addresses
    address = {
        "CELERY_BROKER_URL": places.broker, "CELERY_RESULT_BACKEND": places.results, "BRIDGE_DATA_URL": places.data
    }  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=os.environ | address, capture_output=True, text=True, timeout=CROWD_S)
    if done.returncode:
        raise LaneFailed(f"{done.returncode} of {producers} producers failed: {done.stderr[-2000:]}")
    running.await_acknowledged()
    running.results.flushdb()
    running.data.flushdb()
    figures = {"s": float(done.stdout)}
    for pid, kind in watched:
        name = f"{kind.value}_mib"
        figures[name] = max(figures.get(name, 0.0), peak_mib(pid) - idle[pid])
    return figures


def reset_peak_mib(pid: int) -> float:
    """Have the kernel forget a process's peak; what it holds now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return peak_mib(pid)


def peak_mib(pid: int) -> float:
    """The most memory that a process has held at once."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


if __name__ == "__main__":
    sys.exit(main(Data()))
