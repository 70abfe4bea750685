"""`python -m benchmarks.growth`: does a task cost more time when more are queued, and does memory grow with tasks done?

Time per task is that of the steady state: from the k-th stored result, k being a tenth of the backlog and 500 at most,
to the moment when the last result is stored and no message is left unacknowledged. Small backlogs are repeated within a
round until they are as many tasks as the middle size, so that all rest on a comparable number of tasks.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

import psutil

from benchmarks import plot
from benchmarks.approaches import bridge, prefork
from benchmarks.cpu import Kind, Watch
from benchmarks.lane import Lane
from benchmarks.records import Record, noise, over, pooled, record_table, summary_of
from benchmarks.report import QUIET_SHARE
from benchmarks.run import Benchmark, Conclusion, Size, main
from benchmarks.samples import Spread, spread
from benchmarks.session import Session, say
from benchmarks.targets import at_most

APPROACHES = (
    bridge("benchmarks.apps.bridge_noop"),
    prefork("benchmarks.apps.plain"),
)
TITLES = {a.name: a.title for a in APPROACHES}
#: Results stored before the clock starts, at most.
MOST_SKIPPED = 500
#: Kinds whose memory must not grow.
WATCHED = (Kind.WORKER, Kind.DRIVER, Kind.ACTOR, Kind.EXECUTOR)


class Growth(Benchmark):
    """Time per task against backlog size, memory against tasks done."""

    name = "growth"
    title = "Growth: time per task against tasks queued, memory against tasks done"
    approaches = APPROACHES
    usual = "bridge"  # prefork only where it is asked whether Celery itself grows
    sizes = {
        "rounds": (5, 2, 5),
        "small": (1000, 100, 1000),
        "middle": (5000, 200, 5000),
        "large": (20_000, 400, 100_000),
        "warm_up": (40_000, 100, 40_000),  # the driver has its size after some 35,000 tasks, the worker after 10,000
    }

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._done: dict[str, int] = {}
        self._sizes: list[int] = []

    def warm_up_tasks(self, approach: Any, size: Size) -> int:
        """Until caches and pools have their size."""
        return int(size["warm_up"])

    def measure(self, session: Session, size: Size) -> None:
        """All sizes of a lane, then the next lane."""
        self._sizes = [int(size[name]) for name in ("small", "middle", "large")]
        self._done = dict.fromkeys(session.lanes, int(size["warm_up"]))
        for name, running in list(session.lanes.items()):
            with session.may_fail(name):
                self._remember(0, running, {}, memory_mib(running))
        session.rounds(int(size["rounds"]), self._one)

    def conclude(self) -> Conclusion:
        """Time per task by size, and memory at the end against the first after warm-up."""
        parts = [
            record_table(self.records, TITLES, self._columns("us"), "time per task in the steady state (us)"),
            record_table(self.records, TITLES, self._columns("cpu_us"), "CPU per task, all processes (us)"),
            noise([r.figures["foreign"] for r in self.records if r.figures], QUIET_SHARE),
        ]
        time_growth, cpu_growth = (over(self.records, "bridge", f"{name}_growth") for name in ("us", "cpu_us"))
        targets = [
            at_most("time per task, largest against smallest", time_growth, 1.1),
            at_most("CPU per task, largest against smallest", cpu_growth, 1.1, "x", True),
        ]
        targets += [
            at_most(f"memory of the {kind.value}, end against start", self._grown(kind), 1.05)
            for kind in (Kind.WORKER, Kind.DRIVER)
        ]
        done = pooled(self.records, "bridge", "done")
        if done:
            held = ", ".join(f"{kind.value} {self._first_and_last(kind)}" for kind in WATCHED)
            parts.append(f"Memory (PSS, MiB) of the bridge from {done[0]:.0f} to {done[-1]:.0f} tasks done: {held}")
        samples = [r.model_dump() for r in self.records]
        return Conclusion("\n\n".join(parts), targets, summary_of(self.records), samples)

    def draw(self, pyplot: Any, about: Mapping[str, Any]) -> Any:
        """Two curves that should be flat."""
        made, (times, memory) = plot.figure(pyplot, 2, about, self.title)
        for index, lane in enumerate(TITLES):
            points = [(n, v) for n in self._sizes if (v := over(self.records, lane, f"us_{n}"))]
            if points:
                reach = [[v.median - v.low for _, v in points], [v.high - v.median for _, v in points]]
                x, y = [n for n, _ in points], [v.median for _, v in points]
                times.errorbar(x, y, reach, fmt="o-", color=plot.SERIES[index], capsize=4, label=TITLES[lane])
        times.set_xscale("log")
        times.set_xticks(self._sizes)
        plot.plain_numbers(times.xaxis)
        times.minorticks_off()
        times.set_ylim(bottom=0)
        times.set_xlabel("tasks queued (logarithmic)")
        plot.legend_below(times)
        plot.finish(times, "Time per task (µs)\nflat is good", "y")
        done = pooled(self.records, "bridge", "done")
        for index, kind in enumerate(WATCHED):
            memory.plot(done, pooled(self.records, "bridge", f"mib_{kind.value}"), "o-", color=plot.SERIES[index],
                        label=kind.value, markersize=3)  # fmt: skip
        memory.set_ylim(bottom=0)
        memory.set_xlabel("tasks done since the start")
        plot.legend_below(memory)
        plot.finish(memory, "Memory of the bridge's processes (PSS, MiB)\nflat is good", "y")
        return made

    def _one(self, number: int, running: Lane) -> None:
        figures, memory = {}, []
        foreign = 0.0
        for tasks in self._sizes:
            repeats = max(1, self._sizes[1] // tasks)
            watch, times_us = Watch(running.family), []
            for _ in range(repeats):
                times_us.append(steady_us(running, tasks))
                self._done[running.approach.name] += tasks
            cpu_s, share = watch.end()
            foreign = max(foreign, share)
            memory.append({"done": self._done[running.approach.name], **memory_mib(running)})
            figures[f"us_{tasks}"] = sum(times_us) / repeats
            figures[f"cpu_us_{tasks}"] = 1e6 * sum(cpu_s.values()) / (repeats * tasks)
        for name in ("us", "cpu_us"):
            figures[f"{name}_growth"] = figures[f"{name}_{self._sizes[-1]}"] / figures[f"{name}_{self._sizes[0]}"]
        figures["foreign"] = foreign
        self._remember(number, running, figures, *memory)
        times = ", ".join(f"{n}: {figures[f'us_{n}']:.0f} us, CPU {figures[f'cpu_us_{n}']:.0f}" for n in self._sizes)
        say(f"round {number}  {running.approach.name:<14} {times}  ({figures['us_growth']:.3f} x)")

    def _remember(self, number: int, running: Lane, figures: dict[str, float], *memory: dict[str, float]) -> None:
        rows = [{"done": self._done[running.approach.name], **row} for row in memory]
        lists = {name: [round(row.get(name, 0.0), 2) for row in rows] for name in rows[0]}
        self.records.append(Record(lane=running.approach.name, round=number, figures=figures, lists=lists))

    def _columns(self, name: str) -> dict[str, str]:
        return {f"{name}_{n}": f"{n} queued" for n in self._sizes} | {f"{name}_growth": "largest/smallest"}

    def _grown(self, kind: Kind) -> Spread | None:
        values = pooled(self.records, "bridge", f"mib_{kind.value}")
        return spread([values[-1] / values[0]]) if len(values) > 1 and values[0] else None

    def _first_and_last(self, kind: Kind) -> str:
        values = pooled(self.records, "bridge", f"mib_{kind.value}")
        return f"{values[0]:.0f} -> {values[-1]:.0f}" if values else "-"


def steady_us(running: Lane, tasks: int) -> float:
    """Microseconds per task of one backlog, from the k-th stored result to the last acknowledgement."""
    skipped = min(tasks // 10, MOST_SKIPPED)
    running.stage([running.usual] * tasks)
    running.release()
    running.wait(lambda: running.results.dbsize() >= skipped, 60.0, "the first results")
    began, stored = time.perf_counter(), running.results.dbsize()
    running.await_stored(tasks)
    ended = running.await_acknowledged()
    running.values()  # checks them, off the clock
    return 1e6 * (ended - began) / (tasks - stored)


def memory_mib(running: Lane) -> dict[str, float]:
    """Proportional memory of the lane's processes by kind, in MiB: shared pages are counted once."""
    held: dict[str, float] = {}
    for process, kind in running.family.members():
        if kind in WATCHED:
            try:
                pss = process.memory_full_info().pss
            except psutil.Error:
                continue
            held[f"mib_{kind.value}"] = held.get(f"mib_{kind.value}", 0.0) + pss / 2**20
    return held


if __name__ == "__main__":
    sys.exit(main(Growth()))
