"""`python -m benchmarks.noop`: what a task that does nothing costs on each way from Celery to a GPU and back.

All approaches run in one go on one Redis and one Ray cluster, started here and ended here. Every round measures every
approach, so that noise hits all alike. An approach that fails is reported with its log; the others go on.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import plot_noop
from benchmarks.approaches import APPROACHES, BASELINES, Approach
from benchmarks.lane import Lane, per_task_ms
from benchmarks.report import report
from benchmarks.run import Benchmark, Conclusion, Size, main
from benchmarks.samples import Sample, Spread, percentile, spread, summarise, total
from benchmarks.session import FEWEST_TASKS, Session, say
from benchmarks.targets import Target, at_least, at_most

#: Calls one at a time that even the slowest approach gets.
FEWEST_CALLS = 5

TITLES = {approach.name: approach.title for approach in APPROACHES}


class Noop(Benchmark):
    """A task that does nothing, on every way."""

    name = "noop"
    title = "A task that does nothing: what the way there and back costs"
    approaches = APPROACHES
    sizes = {
        "rounds": (5, 2, 5),
        "tasks": (2000, 100, 2000),  # in a backlog
        "calls": (200, 10, 200),  # one at a time
        "idle_s": (5.0, 0.5, 5.0),
    }

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.idle: dict[str, dict[str, float]] = {}

    def warm_up_tasks(self, approach: Approach, size: Size) -> int:
        """A quarter of a round."""
        return max(FEWEST_TASKS, round(size["tasks"] * approach.share / 4))

    def measure(self, session: Session, size: Size) -> None:
        """CPU of all lanes while nothing is sent, then the rounds."""
        for name, running in list(session.lanes.items()):
            with session.may_fail(name):
                self.idle[name] = running.idle_ms_per_s(size["idle_s"])
        session.rounds(int(size["rounds"]), lambda number, running: self._one(number, running, size))

    def conclude(self) -> Conclusion:
        """Tables, targets, summaries."""
        summaries = summarise(self.samples, TITLES, BASELINES)
        return Conclusion(
            report(summaries, self.samples, self.idle),
            targets(self.samples),
            [s.model_dump() for s in summaries],
            [s.model_dump() for s in self.samples],
            {"idle_cpu_ms_per_s": self.idle},
        )

    def draw(self, pyplot: Any, about: Mapping[str, Any]) -> Any:
        """Cost, parts, throughput, latency."""
        latencies = {s: pooled_latencies(self.samples, s) for s in TITLES}
        return plot_noop.draw(pyplot, summarise(self.samples, TITLES, BASELINES), latencies, about)

    def _one(self, number: int, running: Lane, size: Size) -> None:
        share = running.approach.share
        tasks = max(FEWEST_TASKS, round(size["tasks"] * share))
        calls = max(FEWEST_CALLS, round(size["calls"] * share))
        producer_s = running.stage([running.usual] * tasks)
        backlog = running.backlog(tasks)
        latencies_s, alone_s = running.one_by_one(calls)
        sample = Sample(
            approach=running.approach.name,
            round=number,
            tasks=tasks,
            seconds=backlog.seconds,
            cpu_ms=per_task_ms(backlog.cpu_s, tasks),
            latencies_ms=[round(1000 * latency, 3) for latency in latencies_s],
            alone_cpu_ms=per_task_ms(alone_s, calls),
            producer_cpu_ms=1000 * producer_s / tasks,
            foreign_share=backlog.foreign_share,
        )
        self.samples.append(sample)
        cpu = total(sample.cpu_ms)
        say(f"round {number}  {sample.approach:<14} {sample.throughput:8.1f} tasks/s  {cpu:8.2f} ms CPU per task")


def targets(samples: Sequence[Sample]) -> list[Target]:
    """What issue 4 asks of the bridge; ratios within each round."""

    def cpu(base: str) -> Spread | None:
        return paired(samples, base, lambda mine, other: total(mine.cpu_ms) / total(other.cpu_ms))

    def throughput(base: str) -> Spread | None:
        return paired(samples, base, lambda mine, other: mine.throughput / other.throughput)

    def p50_ms(sample: Sample) -> float:
        return percentile(sample.latencies_ms, 0.5)

    slower_ms = paired(samples, "prefork", lambda mine, other: p50_ms(mine) - p50_ms(other))
    return [
        at_most("CPU per task against prefork", cpu("prefork"), 0.9),
        at_least("throughput against prefork", throughput("prefork"), 1.15),
        at_most("CPU per task against a blocking Ray call", cpu("blocking-ray"), 0.42),
        at_least("throughput against a blocking Ray call", throughput("blocking-ray"), 2.5),
        at_most("p50 one at a time, beyond prefork's", slower_ms, 1.5, "ms"),
    ]


def paired(samples: Sequence[Sample], base: str, value: Callable[[Sample, Sample], float]) -> Spread | None:
    """A value made of the bridge and a baseline in the same round; None where none has both."""
    mine = {s.round: s for s in samples if s.approach == "bridge"}
    values = [value(mine[s.round], s) for s in samples if s.approach == base and s.round in mine]
    return spread(values) if values else None


def pooled_latencies(samples: Sequence[Sample], approach: str) -> list[float]:
    """All single calls of an approach, in milliseconds."""
    return [latency for s in samples if s.approach == approach for latency in s.latencies_ms]


if __name__ == "__main__":
    sys.exit(main(Noop()))
