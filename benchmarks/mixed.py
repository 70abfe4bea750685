"""`python -m benchmarks.mixed`: bodies of 50 us among bodies of 2 s: do short ones wait although an actor is free?

There are two actors and at most one long body at a time, so an actor is always free. In each round first a backlog of
short bodies with a long one somewhere in its first half is released at once; then a long one is sent, and while it runs
short ones follow at even distances.
"""

import random
import sys
import time
from collections.abc import Mapping
from typing import Any

from benchmarks import plot
from benchmarks.approaches import blocking_ray, bridge, prefork
from benchmarks.lane import Lane, Message
from benchmarks.records import Record, over, pooled, record_table, summary_of
from benchmarks.run import Benchmark, Conclusion, Size, main
from benchmarks.samples import percentile
from benchmarks.session import Session, say
from benchmarks.targets import at_most

ACTORS = 2
SHORT_S = 50e-6

APPROACHES = (
    bridge("benchmarks.apps.bridge_work", task="wait", args=(0.0,)),
    blocking_ray("benchmarks.apps.blocking_work", 4, task="wait", args=(0.0,)),
    prefork("benchmarks.apps.plain_work", task="wait", args=(0.0,), title="Celery prefork, 2 children, no GPU"),
)
TITLES = {a.name: a.title for a in APPROACHES}
COLUMNS = {
    "backlog_p50_ms": "backlog p50 ms",
    "backlog_last_s": "backlog last s",
    "stream_p50_ms": "stream p50 ms",
    "stream_p99_ms": "stream p99 ms",
    "stream_last_s": "stream last s",
}


class Mixed(Benchmark):
    """Short bodies that meet long ones."""

    name = "mixed"
    title = "Short bodies among long ones, on 2 actors of which one is always free"
    gpus = (ACTORS,)
    approaches = APPROACHES
    sizes = {"rounds": (5, 2, 5), "shorts": (200, 20, 200), "long_s": (2.0, 0.6, 2.0)}

    def __init__(self) -> None:
        self.records: list[Record] = []

    def warm_up_tasks(self, approach: Any, size: Size) -> int:
        """Enough to meet every executor, and for estimates of run times."""
        return 50

    def measure(self, session: Session, size: Size) -> None:
        """A backlog and a stream per lane and round."""
        session.rounds(int(size["rounds"]), lambda number, running: self._one(number, running, size))

    def conclude(self) -> Conclusion:
        """How long short ones took from being sent to their end."""
        text = record_table(self.records, TITLES, COLUMNS, "send to end, short bodies")
        targets = [
            at_most(f"last short body of a {name}", over(self.records, "bridge", f"{name}_last_s"), 1.0, "s", True)
            for name in ("backlog", "stream")
        ]
        return Conclusion(text, targets, summary_of(self.records), [r.model_dump() for r in self.records])

    def draw(self, pyplot: Any, about: Mapping[str, Any]) -> Any:
        """Distributions of both."""
        made, panels = plot.figure(pyplot, 2, about, self.title)
        heads = "A backlog released at once", "One after the other while a long one runs"
        for axes, name, head in zip(panels, ("backlog", "stream"), heads, strict=True):
            for index, lane in enumerate(TITLES):
                values = [v / 1000 for v in pooled(self.records, lane, f"{name}_ms")]
                if values:
                    colour = plot.BRIDGE if lane == "bridge" else plot.SERIES[index]
                    plot.share_below(axes, values, colour, TITLES[lane])
            axes.set_xscale("log")
            plot.plain_numbers(axes.xaxis)
            axes.set_xlabel("seconds from being sent to the body's end (logarithmic)")
            plot.limit(axes, 1.0, "target: all within 1 s")
            plot.finish(axes, f"{head}: short bodies that have ended (%)\nfurther left is better", "both")
        return made

    def _one(self, number: int, running: Lane, size: Size) -> None:
        shorts, long_s = int(size["shorts"]), size["long_s"]
        backlog, stream = _backlog_ms(running, shorts, long_s, number), _stream_ms(running, shorts, long_s)
        figures = {}
        for name, values in (("backlog", backlog), ("stream", stream)):
            figures[f"{name}_p50_ms"] = percentile(values, 0.5)
            figures[f"{name}_p99_ms"] = percentile(values, 0.99)
            figures[f"{name}_last_s"] = max(values) / 1000
        lists = {"backlog_ms": _rounded(backlog), "stream_ms": _rounded(stream)}
        self.records.append(Record(lane=running.approach.name, round=number, figures=figures, lists=lists))
        lasts = f"backlog {figures['backlog_last_s']:.2f} s, stream {figures['stream_last_s']:.2f} s"
        say(f"round {number}  {running.approach.name:<14} last short one: {lasts}")


def _backlog_ms(running: Lane, shorts: int, long_s: float, seed: int) -> list[float]:
    """Milliseconds from the release to the end of each short body."""
    messages = [Message("wait", (SHORT_S,))] * shorts
    messages.insert(random.Random(seed).randrange(shorts // 2), Message("wait", (long_s,)))
    running.stage(messages)
    released = time.monotonic()
    running.release()
    running.await_results(shorts + 1)
    running.await_acknowledged()
    return [1000 * (ended - released) for _, began, ended, _ in running.values() if ended - began < long_s / 2]


def _stream_ms(running: Lane, shorts: int, long_s: float) -> list[float]:
    """Milliseconds from sending to the end of each short body; all are sent while a long one runs."""
    running.results.flushdb()
    running.send(Message("wait", (long_s, time.monotonic())))
    for _ in range(shorts):
        running.send(Message("wait", (SHORT_S, time.monotonic())))
        time.sleep(0.8 * long_s / shorts)
    running.await_results(shorts + 1)
    running.await_acknowledged()
    return [1000 * (ended - sent) for sent, began, ended, _ in running.values() if ended - began < long_s / 2]


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 2) for value in sorted(values)]


if __name__ == "__main__":
    sys.exit(main(Mixed()))
