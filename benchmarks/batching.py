"""`python -m benchmarks.batching`: a vectorised body that costs 1 ms + 10 us per item, with `@batched` and without."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import plot
from benchmarks.approaches import bridge
from benchmarks.apps.bodies import ITEM_S, RUN_S
from benchmarks.apps.bridge_work import MAX_SIZE
from benchmarks.lane import Lane, per_task_ms
from benchmarks.records import Record, noise, over, ratio, record_table, summary_of
from benchmarks.report import QUIET_SHARE
from benchmarks.run import Benchmark, Conclusion, Size, main
from benchmarks.session import Session, say
from benchmarks.targets import at_least

APP = "benchmarks.apps.bridge_work"
APPROACHES = (
    bridge(APP, name="bridge-batched", title=f"bridge, @batched({MAX_SIZE})", task="together", args=(1,)),
    bridge(APP, name="bridge-single", title="bridge, one run per task", task="single", args=(1,)),
)
TITLES = {a.name: a.title for a in APPROACHES}
COLUMNS = {
    "throughput": "tasks/s",
    "batch": "mean batch",
    "device_ms": "device ms/task",
    "late_us": "late us/run",
    "cpu_ms": "CPU ms/task",
}


class Run(NamedTuple):
    """One run of the body."""

    began: float
    ended: float
    items: int


class Batching(Benchmark):
    """The same backlog batched and not."""

    name = "batching"
    title = "A body of 1 ms + 10 µs per item: run together or one by one"
    approaches = APPROACHES
    sizes = {"rounds": (5, 2, 5), "tasks": (5000, 300, 5000)}

    def __init__(self) -> None:
        self.records: list[Record] = []

    def warm_up_tasks(self, approach: Any, size: Size) -> int:
        """Several batches."""
        return 4 * MAX_SIZE

    def measure(self, session: Session, size: Size) -> None:
        """One backlog per lane and round."""
        session.rounds(int(size["rounds"]), lambda number, running: self._one(number, running, int(size["tasks"])))

    def conclude(self) -> Conclusion:
        """Batch size and throughput, end to end and in device time."""
        text = record_table(self.records, TITLES, COLUMNS, "backlog of one task name")
        quiet = noise([r.figures["foreign"] for r in self.records], QUIET_SHARE)
        batched, single = "bridge-batched", "bridge-single"
        targets = [
            at_least("mean batch", over(self.records, batched, "batch"), MAX_SIZE / 2, "tasks"),
            at_least(
                "throughput against unbatched, end to end", ratio(self.records, "throughput", batched, single), 10
            ),
            at_least("the same in device time", ratio(self.records, "device_ms", single, batched), 10),
        ]
        return Conclusion(
            f"{text}\n\n{quiet}", targets, summary_of(self.records), [r.model_dump() for r in self.records]
        )

    def draw(self, pyplot: Any, about: Mapping[str, Any]) -> Any:
        """Throughput, device time, batch size over time."""
        made, (through, device, course) = plot.figure(pyplot, 3, about, self.title, height=4.6)
        for axes, figure, head in (
            (through, "throughput", "Tasks per second, end to end\nmore is better"),
            (device, "device_ms", "Device time per task (ms)\nless is better"),
        ):
            measured = [(TITLES[n], over(self.records, n, figure), plot.SERIES[i]) for i, n in enumerate(TITLES)]
            plot.bars(axes, [(label, value, colour) for label, value, colour in measured if value], head)
        batched = [r for r in self.records if r.lane == "bridge-batched"]
        if batched:
            course.plot(batched[-1].lists["began_s"], batched[-1].lists["items"], ".", color=plot.BRIDGE, markersize=4)
        plot.limit(course, MAX_SIZE / 2, f"target for the mean: {MAX_SIZE / 2:g}", vertical=False)
        course.set_ylim(0, MAX_SIZE * 1.08)
        course.set_xlabel("seconds since the first run (last round)")
        plot.finish(course, f"Tasks in each run of the batched body\nat most {MAX_SIZE}", "y")
        return made

    def _one(self, number: int, running: Lane, tasks: int) -> None:
        running.stage([running.usual] * tasks)
        backlog = running.backlog(tasks)
        runs = batches(running.values())
        device_s = sum(run.ended - run.began for run in runs)
        asked_s = sum(RUN_S + run.items * ITEM_S for run in runs)
        figures = {
            "throughput": tasks / backlog.seconds,
            "batch": tasks / len(runs),
            "device_ms": 1000 * device_s / tasks,
            "late_us": 1e6 * (device_s - asked_s) / len(runs),
            "device_busy": device_s / (runs[-1].ended - runs[0].began),
            "cpu_ms": sum(per_task_ms(backlog.cpu_s, tasks).values()),
            "foreign": backlog.foreign_share,
        }
        lists = {
            "began_s": [round(run.began - runs[0].began, 4) for run in runs],
            "items": [float(run.items) for run in runs],
        }
        if running.approach.name == "bridge-single":
            lists = {}  # thousands of ones
        self.records.append(Record(lane=running.approach.name, round=number, figures=figures, lists=lists))
        throughput, batch = figures["throughput"], figures["batch"]
        say(f"round {number}  {running.approach.name:<14} {throughput:7.1f} tasks/s, batch {batch:.1f}")


def batches(values: Iterable[Sequence[float]]) -> list[Run]:
    """The runs behind returned values [items, began, ended, pid], in order."""
    return sorted({Run(value[1], value[2], int(value[0])) for value in values})


if __name__ == "__main__":
    sys.exit(main(Batching()))
