"""`python -m benchmarks.waiting`: bodies that keep a GPU busy for 50 ms, on eight actors: is any GPU left waiting?"""

import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import plot
from benchmarks.approaches import blocking_ray, bridge, prefork
from benchmarks.cpu import Kind
from benchmarks.lane import Lane, Message, per_task_ms
from benchmarks.records import Record, noise, over, record_table, summary_of
from benchmarks.report import QUIET_SHARE
from benchmarks.run import Benchmark, Conclusion, Size, main
from benchmarks.runs import busy_share, gaps_ms, in_slices, runs_of
from benchmarks.samples import percentile
from benchmarks.session import Session, say
from benchmarks.targets import at_least, at_most

ACTORS = 8
#: Until all of them are warm, in seconds.
START_S = 120.0

APPROACHES = (
    bridge("benchmarks.apps.bridge_work", task="wait", args=(0.0,)),
    blocking_ray("benchmarks.apps.blocking_work", ACTORS, task="wait", args=(0.0,)),
    prefork("benchmarks.apps.plain_work", ACTORS, task="wait", args=(0.0,), title="Celery prefork, 8 children, no GPU"),
)
TITLES = {a.name: a.title for a in APPROACHES}
COLUMNS = {"busy": "busy share", "finish": "time / ideal", "gap_ms": "gap p50 ms", "cpu_ms": "CPU ms/task"}


class Waiting(Benchmark):
    """A backlog of waiting bodies on eight executors."""

    name = "waiting"
    title = "Bodies that wait for the device, on 8 actors: how busy are the GPUs?"
    gpus = (ACTORS,)
    approaches = APPROACHES
    sizes = {"rounds": (5, 2, 5), "tasks": (1200, 48, 4000), "body_ms": (50.0, 20.0, 50.0)}

    def __init__(self) -> None:
        self.records: list[Record] = []

    def warm_up_tasks(self, approach: Any, size: Size) -> int:
        """Enough to meet every executor."""
        return 8 * ACTORS

    def measure(self, session: Session, size: Size) -> None:
        """One backlog per lane and round, once all executors are there."""
        for name, running in list(session.lanes.items()):
            with session.may_fail(name):
                running.wait(lambda running=running: _are_all_there(running), START_S, f"{ACTORS} executors")  # type: ignore[misc]
        session.rounds(int(size["rounds"]), lambda number, running: self._one(number, running, size))

    def conclude(self) -> Conclusion:
        """Busy share and finishing time."""
        text = record_table(self.records, TITLES, COLUMNS, "8 executors")
        kinds = {f"cpu_ms_{kind.value}": kind.value for kind in Kind if kind is not Kind.SPAWNED}
        text += "\n\n" + record_table(self.records, TITLES, kinds, "CPU ms/task by process")
        quiet = noise([r.figures["foreign"] for r in self.records], QUIET_SHARE)
        targets = [
            at_least("GPU busy share while there is work", over(self.records, "bridge", "busy"), 0.95, ""),
            at_most("finishing time against the ideal", over(self.records, "bridge", "finish"), 1.05),
        ]
        samples = [r.model_dump() for r in self.records]
        return Conclusion(f"{text}\n\n{quiet}", targets, summary_of(self.records), samples)

    def draw(self, pyplot: Any, about: Mapping[str, Any]) -> Any:
        """Busy share per lane, and over the time of one round."""
        made, (shares, course) = plot.figure(pyplot, 2, about, self.title)
        measured = {name: over(self.records, name, "busy") for name in TITLES}
        rows = [(TITLES[n], _percent(v), plot.colour_of(n)) for n, v in measured.items() if v]
        plot.bars(shares, rows, "Share of the executors' time in which a body ran (%)\nmore is better", " %")
        plot.limit(shares, 95, "target: 95 %")
        for index, name in enumerate(n for n, v in measured.items() if v):
            record = next(r for r in self.records if r.lane == name)
            colour = plot.BRIDGE if name == "bridge" else plot.SERIES[index % 5]
            slices = record.lists["slice_s"], record.lists["slice_busy"]
            course.step(*slices, color=colour, label=TITLES[name], linewidth=2)
        course.set_xlabel("seconds since the first body began")
        course.set_ylim(0, 105)
        plot.legend_below(course)
        plot.finish(course, "The same over the time of one round (%)\nright end: the last tasks run out", "y")
        return made

    def _one(self, number: int, running: Lane, size: Size) -> None:
        tasks, body_s = int(size["tasks"]), size["body_ms"] / 1000
        running.stage([Message("wait", (body_s,))] * tasks)
        backlog = running.backlog(tasks)
        runs = runs_of(running.values())
        ideal_s = -(-tasks // ACTORS) * body_s
        cpu_ms = per_task_ms(backlog.cpu_s, tasks)
        slice_s, slice_busy = in_slices(runs, ACTORS)
        figures = {
            "busy": busy_share(runs, ACTORS),
            "finish": backlog.seconds / ideal_s,
            "gap_ms": percentile(gaps_ms(runs) or [0.0], 0.5),
            "body_ms": 1000 * sum(run.ended - run.began for run in runs) / len(runs),
            "cpu_ms": sum(cpu_ms.values()),
            **{f"cpu_ms_{kind}": value for kind, value in cpu_ms.items()},
            "executors": len({run.pid for run in runs}),
            "foreign": backlog.foreign_share,
        }
        lists = {"slice_s": [round(s, 3) for s in slice_s], "slice_busy": [round(b, 1) for b in slice_busy]}
        self.records.append(Record(lane=running.approach.name, round=number, figures=figures, lists=lists))
        busy, finish = figures["busy"], figures["finish"]
        say(f"round {number}  {running.approach.name:<14} busy {busy:.3f}  time {finish:.3f} x ideal")


def _are_all_there(running: Lane) -> bool:
    """Whether so many short bodies meet every executor."""
    tasks = 8 * ACTORS
    running.stage([Message("wait", (0.01,))] * tasks)
    running.backlog(tasks)
    return len({run.pid for run in runs_of(running.values())}) == ACTORS


def _percent(value: Any) -> Any:
    return type(value)(*(100 * part for part in value))


if __name__ == "__main__":
    sys.exit(main(Waiting()))
