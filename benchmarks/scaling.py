"""`python -m benchmarks.scaling`: 1, 2, 4 and 8 actors with waiting bodies; and two workers that share eight actors.

Every number of actors has a cluster of its own with that many logical GPUs. All are up for the whole run, so that each
round measures all of them. Then the worker of the largest cluster and another one there work off a backlog each at the
same time.
"""

import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import plot
from benchmarks.approaches import Approach, bridge
from benchmarks.lane import Lane, Message, per_task_ms
from benchmarks.records import Record, over, ratio, record_table, summary_of
from benchmarks.run import Benchmark, Conclusion, Size, main
from benchmarks.runs import busy_share, runs_of, shared_window, used_s
from benchmarks.samples import spread
from benchmarks.session import Session, say
from benchmarks.targets import at_least

ACTORS = (1, 2, 4, 8)
APP = "benchmarks.apps.bridge_work"


def _lane(name: str, title: str, cluster: int) -> Approach:
    return bridge(APP, name=name, title=title, cluster=cluster, task="wait", args=(0.0,))


SCALED = tuple(
    _lane(f"bridge-{count}", f"{count} actor{'s' * (count > 1)}", index) for index, count in enumerate(ACTORS)
)
SECOND = _lane("bridge-second", "another worker on the same 8 actors", len(ACTORS) - 1)
COLUMNS = {"throughput": "tasks/s", "ideal": "share of ideal", "busy": "busy share", "cpu_ms": "CPU ms/task"}
MOST = SCALED[-1].name
PAIR = MOST, SECOND.name
TWO = "two workers"


class Scaling(Benchmark):
    """Throughput against actors, and fairness between workers."""

    name = "scaling"
    title = "Do more actors mean more work done, and do two workers share them?"
    gpus = ACTORS
    approaches = (*SCALED, SECOND)
    sizes = {"rounds": (5, 2, 5), "tasks_per_actor": (75, 8, 150), "body_ms": (50.0, 20.0, 50.0)}

    def __init__(self) -> None:
        self.records: list[Record] = []

    def warm_up_tasks(self, approach: Approach, size: Size) -> int:
        """Enough to meet every executor."""
        return 8 * ACTORS[approach.cluster]

    def measure(self, session: Session, size: Size) -> None:
        """The numbers of actors in turn, then both workers together."""
        scaled = {a.name for a in SCALED}

        def one(number: int, running: Lane) -> None:
            if running.approach.name in scaled:
                self._one(number, running, size)

        session.rounds(int(size["rounds"]), one)
        for number in range(1, int(size["rounds"]) + 1):
            if all(name in session.lanes for name in PAIR):
                with session.may_fail(SECOND.name):
                    self._together(number, [session.lanes[name] for name in PAIR], size)

    def conclude(self) -> Conclusion:
        """Throughput and shares."""
        shares = [min(r.figures["share"], 1 - r.figures["share"]) for r in self.records if r.lane == TWO]
        text = record_table(self.records, {a.name: a.title for a in SCALED}, COLUMNS, "waiting bodies")
        targets = [
            at_least("throughput of 8 actors against 1", ratio(self.records, "throughput", MOST, "bridge-1"), 7.5),
            at_least("smaller share of two workers", spread(shares) if shares else None, 0.4, "", True),
        ]
        return Conclusion(text, targets, summary_of(self.records), [r.model_dump() for r in self.records])

    def draw(self, pyplot: Any, about: Mapping[str, Any]) -> Any:
        """Throughput against actors with the ideal line; the workers' shares by round."""
        made, (curve, shares) = plot.figure(pyplot, 2, about, self.title)
        points = [(n, v) for n in ACTORS if (v := over(self.records, f"bridge-{n}", "throughput"))]
        body_s = about["size"]["body_ms"] / 1000
        curve.plot([0, 8], [0, 8 / body_s], "--", color="#2b8a3e", label="ideal: no actor ever waits")
        if points:
            reach = [[v.median - v.low for _, v in points], [v.high - v.median for _, v in points]]
            counts, medians = [n for n, _ in points], [v.median for _, v in points]
            curve.errorbar(
                counts, medians, reach, fmt="o-", color=plot.BRIDGE, capsize=4, label="this bridge", linewidth=2
            )
            for count, value in points:
                curve.annotate(f"{value.median:.0f}", (count, value.median), (6, -14), textcoords="offset points")
        curve.set_xticks(ACTORS)
        curve.set_xlabel("actors")
        plot.legend_below(curve)
        plot.finish(curve, f"Tasks per second, bodies of {1000 * body_s:g} ms\nmore is better", "both")
        pair = [r for r in self.records if r.lane == TWO]
        rounds, first = [r.round for r in pair], [100 * r.figures["share"] for r in pair]
        shares.bar(rounds, first, color=plot.SERIES[0], label="first worker")
        shares.bar(rounds, [100 - value for value in first], bottom=first, color=plot.SERIES[1], label="second worker")
        for low in (40, 60):
            shares.axhline(low, color="black", linestyle="--", linewidth=1)
        shares.set_xticks(rounds)
        shares.set_xlabel("round; dashed: 40 and 60 %, between which the border should lie")
        plot.legend_below(shares)
        plot.finish(shares, "Two workers with work: share of the actors' time (%)\nhalf each is fair", "y")
        return made

    def _one(self, number: int, running: Lane, size: Size) -> None:
        actors, body_s = ACTORS[running.approach.cluster], size["body_ms"] / 1000
        tasks = int(size["tasks_per_actor"]) * actors
        running.stage([Message("wait", (body_s,))] * tasks)
        backlog = running.backlog(tasks)
        throughput = tasks / backlog.seconds
        figures = {
            "throughput": throughput,
            "ideal": throughput * body_s / actors,
            "busy": busy_share(runs_of(running.values()), actors),
            "cpu_ms": sum(per_task_ms(backlog.cpu_s, tasks).values()),
        }
        self.records.append(Record(lane=running.approach.name, round=number, figures=figures))
        say(f"round {number}  {running.approach.name:<14} {throughput:7.1f} tasks/s, {figures['ideal']:.2f} of ideal")

    def _together(self, number: int, pair: list[Lane], size: Size) -> None:
        tasks = int(size["tasks_per_actor"]) * ACTORS[-1]
        for running in pair:
            running.stage([Message("wait", (size["body_ms"] / 1000,))] * tasks)
        for running in pair if number % 2 else reversed(pair):
            running.release()
        for running in pair:
            running.await_results(tasks)
        pair[0].await_acknowledged()
        first, second = (runs_of(running.values()) for running in pair)
        window = shared_window(first, second)
        mine, theirs = used_s(first, *window), used_s(second, *window)
        figures = {"share": mine / (mine + theirs), "both_s": window[1] - window[0]}
        self.records.append(Record(lane=TWO, round=number, figures=figures))
        say(f"round {number}  two workers: the first had {100 * figures['share']:.0f} % over {figures['both_s']:.1f} s")


if __name__ == "__main__":
    sys.exit(main(Scaling()))
