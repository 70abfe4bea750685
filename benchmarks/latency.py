"""`python -m benchmarks.latency`: how much longer than on prefork does one task take alone, and where does it spend it?

All lanes are called in turn, call by call, so that noise hits all alike; also a plain Ray call, which takes twice as
long here as it does right after another one. The steps of the bridge's way are marked in its processes; a mark costs
some microseconds, so the sum is a little too long.
"""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plot
from benchmarks.approaches import PLAIN_RAY, Approach, bridge, prefork
from benchmarks.records import Record, across, over, pooled, record_table, summary_of
from benchmarks.report import show, table
from benchmarks.run import Benchmark, Conclusion, Size, main
from benchmarks.samples import percentile
from benchmarks.session import Session, say
from benchmarks.targets import at_most

APPROACHES = (bridge("benchmarks.apps.traced_noop"), prefork("benchmarks.apps.plain"), PLAIN_RAY)
TITLES = {a.name: a.title for a in APPROACHES}
COLUMNS = {"p05_ms": "p05 ms", "p50_ms": "p50 ms", "p95_ms": "p95 ms"}
#: In the order of a task's way.
STEPS = (
    "worker wakes", "worker has it", "driver has it", "call leaves", "Ray has it", "body runs", "driver has the reply",
    "result leaves", "caller has it",
)  # fmt: skip


class Latency(Benchmark):
    """One task at a time, in turn with prefork, step by step."""

    name = "latency"
    title = "One task at a time: how long, and where"
    approaches = APPROACHES
    sizes = {"rounds": (5, 1, 5), "calls": (300, 10, 300)}

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._trace = Path()

    def start(self, session: Session, approaches: Sequence[Approach], size: Size) -> None:
        """The lanes, and a file for the marks."""
        handle, name = tempfile.mkstemp(prefix="bench-trace-")
        os.close(handle)
        self._trace = Path(name)
        os.environ["BENCH_TRACE"] = name
        try:
            super().start(session, approaches, size)
        except BaseException:
            self._trace.unlink()
            raise

    def measure(self, session: Session, size: Size) -> None:
        """Rounds of calls in turn; each call of the bridge gives its steps."""
        try:
            for number in range(1, int(size["rounds"]) + 1):
                times_ms: dict[str, list[float]] = {name: [] for name in session.lanes}
                steps: list[dict[str, float]] = []
                for call in range(int(size["calls"])):
                    for name in list(session.lanes)[:: 1 if call % 2 else -1]:
                        with session.may_fail(name):
                            self._one(session, name, times_ms[name], steps)
                self._keep(number, times_ms, steps)
        finally:
            self._trace.unlink(missing_ok=True)

    def conclude(self) -> Conclusion:
        """All lanes, the way step by step, and what is between the bridge and prefork."""
        rows, before = [], None
        for step in STEPS:
            at = over(self.records, "bridge", step)
            if at is not None:
                rows.append([step, show(at), f"{at.median - (before or 0.0):.2f}"])
                before = at.median
        head = ["a step of the bridge's way", "ms after the caller began to send", "since the step before"]
        text = f"{record_table(self.records, TITLES, COLUMNS, 'one task at a time')}\n\n{table(head, rows)}"
        beyond = across(self.records, lambda mine: mine["bridge"]["p50_ms"] - mine["prefork"]["p50_ms"], TITLES)
        targets = [at_most("p50 in turn, beyond prefork's", beyond, 1.5, "ms")]
        return Conclusion(text, targets, summary_of(self.records), [r.model_dump() for r in self.records])

    def draw(self, pyplot: Any, about: Mapping[str, Any]) -> Any:
        """All distributions, and the steps as bars from the moment of sending."""
        made, (left, right) = plot.figure(pyplot, 2, about, self.title)
        for lane, colour in zip(TITLES, plot.SERIES, strict=False):
            if values := pooled(self.records, lane, "ms"):
                plot.share_below(left, values, colour, TITLES[lane])
        left.set_xlim(
            0, 2 * max((percentile(pooled(self.records, r.lane, "ms"), 0.5) for r in self.records), default=1)
        )
        left.set_xlabel("ms from send to result")
        left.set_ylabel("% of the tasks")
        plot.legend_below(left)
        plot.finish(left, "All calls", "y")
        rows = [(s, v, plot.BRIDGE) for s in STEPS if (v := over(self.records, "bridge", s)) is not None]
        if rows:
            plot.bars(right, rows, "When the bridge's steps are reached, ms after sending began")
        return made

    def _one(self, session: Session, name: str, times_ms: list[float], steps: list[dict[str, float]]) -> None:
        lane = session.lanes[name]
        began, ended, value = lane.call_timed()
        times_ms.append((ended - began) / 1e6)
        if isinstance(value, int):
            steps.append(
                self._read(began) | {"body runs": (value - began) / 1e6, "caller has it": (ended - began) / 1e6}
            )

    def _read(self, began_ns: int) -> dict[str, float]:
        """The first mark of each step since then; ms."""
        found: dict[str, float] = {}
        for line in self._trace.read_text().splitlines():
            at, _, step = line.partition(" ")
            if int(at) > began_ns:
                found.setdefault(step, (int(at) - began_ns) / 1e6)
        os.truncate(self._trace, 0)
        return found

    def _keep(self, number: int, times_ms: Mapping[str, list[float]], steps: Sequence[Mapping[str, float]]) -> None:
        for lane, values in times_ms.items():
            if values:
                figures = {name: percentile(values, int(name[1:3]) / 100) for name in COLUMNS}
                if lane == "bridge":
                    found = {step: [each[step] for each in steps if step in each] for step in STEPS}
                    figures |= {step: percentile(each, 0.5) for step, each in found.items() if each}
                lists = {"ms": [round(value, 2) for value in values]}
                self.records.append(Record(lane=lane, round=number, figures=figures, lists=lists))
                say(f"round {number}  {lane:<8} p50 {figures['p50_ms']:.2f} ms")


if __name__ == "__main__":
    sys.exit(main(Latency()))
