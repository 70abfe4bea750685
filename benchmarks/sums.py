"""`python -m benchmarks.sums`: CPU of a long JSON list's consumers, for producers that do not change."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import plot
from benchmarks.approaches import Approach, bridge, prefork
from benchmarks.arrays import numbers
from benchmarks.cpu import Kind
from benchmarks.lane import Lane, per_task_ms
from benchmarks.records import Record, noise, over, ratio, record_table, summary_of
from benchmarks.report import QUIET_SHARE
from benchmarks.run import Benchmark, Conclusion, Size, main
from benchmarks.session import Session, say
from benchmarks.targets import at_most

#: Whose CPU counts: Redis and Ray's own processes serve everybody.
CONSUMERS = (Kind.WORKER, Kind.CHILD, Kind.DRIVER, Kind.ACTOR, Kind.EXECUTOR)
APPROACHES = (
    bridge("benchmarks.apps.sums_bridge", name="bridge-array", title="bridge, Array for the list", task="total"),
    bridge("benchmarks.apps.sums_list", name="bridge-list", title="bridge, list[float]", task="total", cluster=1),
    prefork("benchmarks.apps.sums_plain", task="total", title="Celery prefork, numpy.asarray(list).sum()"),
)
TITLES = {approach.name: approach.title for approach in APPROACHES}
COLUMNS = {"consumers_ms": "CPU ms/task", "throughput": "tasks/s", **{kind.value: kind.value for kind in CONSUMERS}}


class Sums(Benchmark):
    """The same 2**17 numbers for all."""

    name = "sums"
    title = "The sum of 1 MiB of float64 sent as a JSON list: CPU of its consumers"
    gpus = (1, 1)
    approaches = APPROACHES
    sizes = {"rounds": (5, 1, 5), "tasks": (30, 4, 100)}

    def __init__(self) -> None:
        self.records: list[Record] = []

    def start(self, session: Session, approaches: Sequence[Approach], size: Size) -> None:
        """The warm-up needs a payload, too."""
        super().start(session, [a._replace(args=(numbers(),)) for a in approaches], size)

    def measure(self, session: Session, size: Size) -> None:
        """A backlog per lane and round."""
        session.rounds(int(size["rounds"]), lambda number, running: self._one(number, running, int(size["tasks"])))

    def conclude(self) -> Conclusion:
        """CPU by kind of process, and the ratio."""
        text = record_table(self.records, TITLES, COLUMNS, "a backlog")
        cheaper = [ratio(self.records, "consumers_ms", name, "prefork") for name in ("bridge-array", "bridge-list")]
        targets = [
            at_most("consumers' CPU against prefork, Array", cheaper[0], 0.35),
            at_most("consumers' CPU against prefork, list[float]", cheaper[1], 0.6, chosen=True),
        ]
        quiet = noise([r.figures["foreign"] for r in self.records], QUIET_SHARE)
        samples = [r.model_dump() for r in self.records]
        return Conclusion(f"{text}\n\n{quiet}", targets, summary_of(self.records), samples)

    def draw(self, pyplot: Any, about: Mapping[str, Any]) -> Any:
        """CPU per task."""
        made, (cost,) = plot.figure(pyplot, 1, about, self.title, height=4.6)
        measured = [(title, over(self.records, n, "consumers_ms"), plot.colour_of(n)) for n, title in TITLES.items()]
        bars = [(title, value, colour) for title, value, colour in measured if value]
        plot.bars(cost, bars, "CPU of a task's consumers (ms)\nless is better")
        return made

    def _one(self, number: int, running: Lane, tasks: int) -> None:
        running.stage([running.usual] * tasks)
        backlog = running.backlog(tasks)
        by_kind = per_task_ms({kind: backlog.cpu_s.get(kind, 0.0) for kind in CONSUMERS}, tasks)
        cpu_ms = sum(by_kind.values())
        figures = {**by_kind, "consumers_ms": cpu_ms, "throughput": tasks / backlog.seconds}
        name = running.approach.name
        self.records.append(Record(lane=name, round=number, figures={**figures, "foreign": backlog.foreign_share}))
        say(f"round {number}  {name:<14} {cpu_ms:.1f} ms CPU per task")


if __name__ == "__main__":
    sys.exit(main(Sums()))
