"""`python -m benchmarks.warm`: how much longer than the following ones does the first task after start-up take?

Every lane starts from nothing in every round: Redis, cluster, actors, worker. The first task is sent once the worker
answers a ping; the caller's own connections are made before.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import photos, plot
from benchmarks.approaches import Approach, bridge, prefork
from benchmarks.lane import Lane
from benchmarks.records import Record, over, record_table, summary_of
from benchmarks.run import TEMPORARY, Benchmark, Conclusion, Size, main
from benchmarks.samples import percentile
from benchmarks.session import Session, rotated, say
from benchmarks.targets import at_most

APPROACHES = (
    bridge("benchmarks.apps.bridge_noop", name="bridge-noop", title="bridge, a task that does nothing"),
    bridge("celery_app", name="bridge-photo", title="bridge, a photograph", task=photos.TASK),
    prefork("benchmarks.apps.plain", name="prefork-noop", title="Celery prefork, a task that does nothing"),
)
TITLES = {a.name: a.title for a in APPROACHES}
COLUMNS = {"first_ms": "first ms", "following_ms": "following p50 ms", "ratio": "first/following"}


class Warm(Benchmark):
    """First task against the following ones."""

    name = "warm"
    title = "The first task after start-up, and those that follow"
    approaches = APPROACHES
    sizes = {"rounds": (5, 1, 5), "following": (20, 3, 20)}

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._approaches: Sequence[Approach] = ()

    def start(self, session: Session, approaches: Sequence[Approach], size: Size) -> None:
        """Nothing stays up: each measurement starts its own services."""
        picture = photos.photographs()[0]
        self._approaches = [a._replace(args=(picture,)) if a.task == photos.TASK else a for a in approaches]

    def measure(self, session: Session, size: Size) -> None:
        """Start, call, stop; for each lane and round."""
        by_name = {a.name: a for a in self._approaches}
        for number in range(1, int(size["rounds"]) + 1):
            for name in rotated(list(by_name), number):
                if name not in session.failed:
                    with session.may_fail(name):
                        self._one(number, by_name[name], size, session)

    def conclude(self) -> Conclusion:
        """The ratio per lane."""
        text = record_table(self.records, TITLES, COLUMNS, "one task at a time")
        targets = [
            at_most(f"first against following, {what}", over(self.records, f"bridge-{what}", "ratio"), 2.0)
            for what in ("noop", "photo")
        ]
        return Conclusion(text, targets, summary_of(self.records), [r.model_dump() for r in self.records])

    def draw(self, pyplot: Any, about: Mapping[str, Any]) -> Any:
        """Every task in the order it was sent, relative to the median of the following ones."""
        made, (course,) = plot.figure(pyplot, 1, about, self.title, height=5.5)
        made.set_size_inches(10, 5.5)
        for index, lane in enumerate(TITLES):
            mine = [r for r in self.records if r.lane == lane]
            for record in mine:
                values = [v / record.figures["following_ms"] for v in record.lists["ms"]]
                label = TITLES[lane] if record is mine[0] else None
                x = [place + 0.15 * (index - 1) for place in range(1, len(values) + 1)]
                course.plot(x, values, "o", color=plot.SERIES[index], markersize=4, alpha=0.7, label=label)
        course.set_ylim(bottom=0)
        course.xaxis.get_major_locator().set_params(integer=True)
        course.set_xlabel("tasks in the order they were sent after start-up; a dot for each round")
        plot.limit(course, 2.0, "target for the first: 2 x", vertical=False)
        plot.finish(course, "Time from send to result, as a multiple of the median of tasks 2 and later", "y")
        return made

    def _one(self, number: int, approach: Approach, size: Size, session: Session) -> None:
        with ExitStack() as services:
            folder = services.enter_context(TemporaryDirectory(prefix="bw", dir=TEMPORARY, ignore_cleanup_errors=True))
            fresh = Session(services, Path(folder))
            fresh.start([approach], lambda _: 0)
            if fresh.failed:
                raise RuntimeError("; ".join(fresh.failed.values()))
            session.redis_version = fresh.redis_version
            self.records.append(first_and_following(number, fresh.lanes[approach.name], int(size["following"])))


def first_and_following(number: int, running: Lane, following: int) -> Record:
    """Wait for a worker that is starting, then call it."""
    running.await_answer()
    running.open_connections()
    times_ms = [1000 * running.call() for _ in range(1 + following)]
    middle_ms = percentile(times_ms[1:], 0.5)
    figures = {"first_ms": times_ms[0], "following_ms": middle_ms, "ratio": times_ms[0] / middle_ms}
    say(f"round {number}  {running.approach.name:<14} first {times_ms[0]:.1f} ms, following {middle_ms:.1f} ms")
    lists = {"ms": [round(value, 2) for value in times_ms]}
    return Record(lane=running.approach.name, round=number, figures=figures, lists=lists)


if __name__ == "__main__":
    sys.exit(main(Warm()))
