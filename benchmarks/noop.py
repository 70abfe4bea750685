"""`python -m benchmarks.noop`: what a task that does nothing costs on each way from Celery to a GPU and back.

All approaches run in one go on one Redis and one Ray cluster, started here and ended here. Every round measures every
approach, so that noise hits all alike. An approach that fails is reported with its log; the others go on.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import redis

from benchmarks import machine, plot
from benchmarks.approaches import APPROACHES, BASELINES, Approach, chosen
from benchmarks.lane import Addresses, Lane, lane
from benchmarks.report import as_json, failures, report
from benchmarks.samples import Sample, summarise
from benchmarks.services import Cluster, StartFailed, ray_cluster, redis_server
from bridge.errors import StandaloneFailed

RESULTS = Path(__file__).parent / "results"

#: Short, because Ray puts UNIX sockets below it and their paths may have 107 characters.
TEMPORARY = "/tmp"

#: Tasks in a backlog and calls one at a time that even the slowest approach gets.
FEWEST_TASKS, FEWEST_CALLS = 4, 5


class Size(NamedTuple):
    """How much is measured."""

    rounds: int
    tasks: int
    calls: int
    idle_s: float


class Run:
    """One run of the benchmark: its lanes, what they gave and what failed."""

    def __init__(self, size: Size, services: ExitStack, folder: Path) -> None:
        self.size = size
        self.samples: list[Sample] = []
        self.idle: dict[str, dict[str, float]] = {}
        self.failed: dict[str, str] = {}
        self._services, self._folder = services, folder
        self._lanes: dict[str, tuple[Lane, ExitStack]] = {}

    def start(self, approaches: Sequence[Approach]) -> str:
        """Start Redis, Ray and the workers, and warm them up; the version of Redis."""
        server, url = self._services.enter_context(redis_server(self._folder))
        cluster = self._start_ray() if any(a.needs_ray for a in approaches) else None
        for database, approach in enumerate(approaches, start=1):
            addresses = Addresses(server, url, database, cluster)
            with self._may_fail(approach.name):
                self._start_lane(approach, addresses)
        with redis.Redis.from_url(url) as client:
            return str(client.info()["redis_version"])

    def measure(self) -> None:
        """All rounds. Each begins with another approach, so that none is always measured after the same one."""
        for name, (running, _) in list(self._lanes.items()):
            with self._may_fail(name):
                self.idle[name] = running.idle_ms_per_s(self.size.idle_s)
        for number in range(1, self.size.rounds + 1):
            for name in rotated(list(self._lanes), number):
                with self._may_fail(name):
                    self._measure_one(number, self._lanes[name][0])

    def _measure_one(self, number: int, running: Lane) -> None:
        share = running.approach.share
        tasks = max(FEWEST_TASKS, round(self.size.tasks * share))
        sample = running.measure(number, tasks, max(FEWEST_CALLS, round(self.size.calls * share)))
        self.samples.append(sample)
        cpu = sum(sample.cpu_ms.values())
        say(f"round {number}  {sample.approach:<14} {sample.throughput:8.1f} tasks/s  {cpu:8.2f} ms CPU per task")

    def _start_ray(self) -> Cluster | None:
        say("starting Ray")
        try:
            return self._services.enter_context(ray_cluster(self._folder))
        except StartFailed as error:
            self.failed["ray"] = str(error)
            return None

    def _start_lane(self, approach: Approach, addresses: Addresses) -> None:
        say(f"starting {approach.name}")
        own = self._services.enter_context(ExitStack())
        running = own.enter_context(lane(approach, addresses, self._folder))
        self._lanes[approach.name] = running, own
        running.warm_up(max(FEWEST_TASKS, round(self.size.tasks * approach.share / 4)))

    @contextmanager
    def _may_fail(self, name: str) -> Iterator[None]:
        """What goes wrong inside costs one approach: it is stopped and reported."""
        try:
            yield
        except Exception as error:
            self.failed[name] = f"{type(error).__name__}: {error}"
            say(f"{name} failed, the others go on")
            if name in self._lanes:
                self._lanes.pop(name)[1].close()


def rotated(names: list[str], by: int) -> list[str]:
    """The names, beginning with another one for each round."""
    by %= max(1, len(names))
    return names[by:] + names[:by]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if an approach failed."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    began = datetime.now(UTC)
    with ExitStack() as services:
        folder = tempfile.TemporaryDirectory(prefix="bn", dir=TEMPORARY, ignore_cleanup_errors=True)
        run = Run(options.size, services, Path(services.enter_context(folder)))
        try:
            facts = machine.facts(run.start(options.approaches))
        except (StartFailed, StandaloneFailed) as error:
            say(f"FAILED redis: {error}")
            return 1
        run.measure()
    publish(run, facts, began, options)
    return 1 if run.failed else 0


def publish(run: Run, facts: dict[str, Any], began: datetime, options: argparse.Namespace) -> None:
    """Print the tables, write the JSON and the picture."""
    titles = {approach.name: approach.title for approach in APPROACHES}
    summaries = summarise(run.samples, titles, BASELINES)
    print("\n" + report(summaries, run.samples, run.idle) + "\n")
    print(failures(run.failed), file=sys.stderr)
    if not summaries:
        return
    about = {
        "benchmark": "noop",
        "began": began.isoformat(timespec="seconds"),
        "machine": facts,
        "size": run.size._asdict(),
        "commands": {a.name: " ".join(("python -m", *a.command)) for a in options.approaches},
        "failed": sorted(run.failed),
        "idle_cpu_ms_per_s": run.idle,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(as_json(about, summaries, run.samples))
    drawn = plot.draw(summaries, about, RESULTS / f"{options.name}.png")
    print(f"written: benchmarks/results/{options.name}.json" + (f", {options.name}.png" if drawn else ""))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; adds `size` and `approaches`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noop", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, help="default 5")
    parser.add_argument("--tasks", type=int, help="tasks in a backlog; default 2000, slow approaches get 1 %% of it")
    parser.add_argument("--calls", type=int, help="tasks sent one at a time for the latency; default 200")
    parser.add_argument("--quick", action="store_true", help="smoke run: 2 rounds of 200 tasks and 20 calls")
    parser.add_argument("--only", default="", help="comma-separated: " + ",".join(a.name for a in APPROACHES))
    parser.add_argument("--name", help="of the result files; default noop, or noop-quick")
    options = parser.parse_args(arguments)
    try:
        options.approaches = chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    usual = Size(2, 200, 20, 1.0) if options.quick else Size(5, 2000, 200, 5.0)
    options.size = Size(
        options.rounds or usual.rounds, options.tasks or usual.tasks, options.calls or usual.calls, usual.idle_s
    )
    options.name = options.name or ("noop-quick" if options.quick else "noop")
    return options


def say(text: str) -> None:
    """Progress, apart from the report."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
