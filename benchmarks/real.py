"""What `photos` and `arrays` share: a task of `celery_app` on the bridge, as a CPU task, and with blocking calls."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import plot
from benchmarks.approaches import Approach, blocking_ray, bridge, prefork
from benchmarks.lane import Lane, Message, per_task_ms
from benchmarks.records import Record, noise, over, pooled, ratio, record_table, summary_of
from benchmarks.report import QUIET_SHARE
from benchmarks.run import Benchmark, Conclusion, Size
from benchmarks.samples import percentile
from benchmarks.session import Session, say
from benchmarks.targets import at_least, at_most

#: As many actors as prefork children, because on NumPy each keeps one core busy.
ACTORS = 2


def approaches(task: str) -> tuple[Approach, ...]:
    """The three ways for one task of `celery_app`."""
    fields = {"task": task, "stores_started": True}
    return (
        bridge("celery_app", **fields),
        prefork("benchmarks.apps.plain_real", title="Celery prefork, the same code on NumPy", **fields),
        blocking_ray("benchmarks.apps.blocking_real", **fields),
    )


class RealWork(Benchmark):
    """One task with real payloads: a backlog, then calls one at a time."""

    gpus = (ACTORS,)
    task = ""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.titles = {a.name: a.title for a in self.approaches}

    def payloads(self) -> Sequence[object]:
        """What is sent, in turn."""
        raise NotImplementedError

    def start(self, session: Session, approaches: Sequence[Approach], size: Size) -> None:
        """The warm-up needs a payload, too."""
        first = self.payloads()[0]
        super().start(session, [a._replace(args=(first,)) for a in approaches], size)

    def measure(self, session: Session, size: Size) -> None:
        """A backlog and single calls per lane and round."""
        session.rounds(int(size["rounds"]), lambda number, running: self._one(number, running, size))

    def conclude(self) -> Conclusion:
        """Throughput, latency, CPU."""
        columns = {
            "throughput": "tasks/s",
            "p50_ms": "p50 ms",
            "p95_ms": "p95 ms",
            "cpu_ms": "CPU ms/task",
            "sender_ms": "sender's CPU ms",
        }
        text = record_table(self.records, self.titles, columns, self.task.removeprefix("celery_app.tasks."))
        against = "prefork", "blocking-ray"
        faster = [ratio(self.records, "throughput", "bridge", base) for base in against]
        cheaper = ratio(self.records, "cpu_ms", "bridge", against[1])
        targets = [
            at_least("throughput against prefork", faster[0], 0.9, "x", True),
            at_least("throughput against a blocking Ray call", faster[1], 1.0, "x", True),
            at_most("CPU per task against a blocking Ray call", cheaper, 1.0, "x", True),
        ]
        quiet = noise([r.figures["foreign"] for r in self.records], QUIET_SHARE)
        return Conclusion(
            f"{text}\n\n{quiet}", targets, summary_of(self.records), [r.model_dump() for r in self.records]
        )

    def draw(self, pyplot: Any, about: Mapping[str, Any]) -> Any:
        """Throughput, CPU, latency."""
        made, (through, cost, latency) = plot.figure(pyplot, 3, about, self.title, height=4.6)
        for axes, figure, head in (
            (through, "throughput", "Tasks per second from a backlog\nmore is better"),
            (cost, "cpu_ms", "CPU per task, all processes (ms)\nless is better"),
        ):
            measured = [(title, over(self.records, n, figure), plot.colour_of(n)) for n, title in self.titles.items()]
            plot.bars(axes, [(title, value, colour) for title, value, colour in measured if value], head)
        for index, (lane, title) in enumerate(self.titles.items()):
            if values := pooled(self.records, lane, "latency_ms"):
                plot.share_below(latency, values, plot.SERIES[index], title)
        latency.set_xlim(left=0)
        latency.set_xlabel("milliseconds from send to result")
        plot.legend_below(latency)
        plot.finish(latency, "One task at a time: calls answered (%)\nfurther left is better", "both")
        return made

    def _one(self, number: int, running: Lane, size: Size) -> None:
        payloads, tasks = self.payloads(), int(size["tasks"])
        messages = [Message(self.task, (payloads[i % len(payloads)],)) for i in range(tasks)]
        sender_s = running.stage(messages)
        backlog = running.backlog(tasks)
        latencies_ms = [1000 * running.call(messages[i % tasks]) for i in range(int(size["calls"]))]
        figures = {
            "throughput": tasks / backlog.seconds,
            "p50_ms": percentile(latencies_ms, 0.5),
            "p95_ms": percentile(latencies_ms, 0.95),
            "cpu_ms": sum(per_task_ms(backlog.cpu_s, tasks).values()),
            "sender_ms": 1000 * sender_s / tasks,
            "foreign": backlog.foreign_share,
        }
        lists = {"latency_ms": [round(value, 2) for value in latencies_ms]}
        self.records.append(Record(lane=running.approach.name, round=number, figures=figures, lists=lists))
        throughput, cpu_ms = figures["throughput"], figures["cpu_ms"]
        say(f"round {number}  {running.approach.name:<14} {throughput:7.2f} tasks/s, {cpu_ms:.1f} ms CPU per task")
