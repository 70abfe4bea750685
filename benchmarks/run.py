"""What every benchmark shares: its command line, its services, and what is printed and written at the end."""

import argparse
import importlib.util
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine
from benchmarks.approaches import Approach, chosen
from benchmarks.report import as_json, failures
from benchmarks.services import StartFailed
from benchmarks.session import FEWEST_TASKS, Session, say
from benchmarks.targets import Target, target_table
from bridge.errors import StandaloneFailed

RESULTS = Path(__file__).parent / "results"

#: Short, because Ray puts UNIX sockets below it and their paths may have 107 characters.
TEMPORARY = "/tmp"

Size = Mapping[str, float]


class Conclusion(NamedTuple):
    """What a benchmark makes of its measurements."""

    text: str
    targets: Sequence[Target]
    summary: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    extra: Mapping[str, Any] = {}


class Benchmark:
    """One benchmark; a subclass says what it measures and draws.

    `sizes` maps each number that says how much is measured to its usual, quick and full value; each is an option.
    """

    name = ""
    title = ""
    gpus: Sequence[int] = (1,)
    approaches: Sequence[Approach] = ()
    usual = ""  # as --only, without it: all, or the ones named here
    sizes: Mapping[str, tuple[float, float, float]] = {}

    def warm_up_tasks(self, approach: Approach, size: Size) -> int:
        """How many tasks a lane gets before it is measured."""
        return FEWEST_TASKS

    def start(self, session: Session, approaches: Sequence[Approach], size: Size) -> None:
        """Bring up what is measured."""
        session.start(approaches, lambda approach: self.warm_up_tasks(approach, size))

    def measure(self, session: Session, size: Size) -> None:
        """All rounds; keeps what they gave."""
        raise NotImplementedError

    def conclude(self) -> Conclusion:
        """Tables, targets and what goes into the JSON."""
        raise NotImplementedError

    def draw(self, pyplot: Any, about: Mapping[str, Any]) -> Any:
        """The picture: a matplotlib figure."""
        raise NotImplementedError


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if something failed. A missed target is no failure."""
    options = parse(benchmark, arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    began = datetime.now(UTC)
    with ExitStack() as services:
        folder = tempfile.TemporaryDirectory(prefix="bn", dir=TEMPORARY, ignore_cleanup_errors=True)
        session = Session(services, Path(services.enter_context(folder)), benchmark.gpus)
        try:
            benchmark.start(session, options.approaches, options.size)
        except (StartFailed, StandaloneFailed) as error:
            say(f"FAILED redis: {error}")
            return 1
        facts = machine.facts(session.redis_version)
        benchmark.measure(session, options.size)
        facts["redis"] = session.redis_version  # known later where each measurement starts its own
    conclusion = benchmark.conclude()
    about = {
        "benchmark": benchmark.name,
        "began": began.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - began).total_seconds(), 1),
        "machine": facts,
        "size": dict(options.size),
        "commands": {a.name: " ".join(("python -m", *a.command)) for a in options.approaches},
        "failed": sorted(session.failed),
        "targets": [target.as_dict() for target in conclusion.targets],
        **conclusion.extra,
    }
    print(failures(session.failed), file=sys.stderr)
    publish(benchmark, conclusion, about, options.name)
    return 1 if session.failed or not conclusion.samples else 0


def publish(benchmark: Benchmark, conclusion: Conclusion, about: Mapping[str, Any], name: str) -> None:
    """Print the tables and targets; write the JSON and the picture."""
    print("\n" + "\n\n".join(part for part in (conclusion.text, target_table(conclusion.targets)) if part) + "\n")
    if not conclusion.samples:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(as_json(about, conclusion.summary, conclusion.samples))
    drawn = draw(benchmark, about, RESULTS / f"{name}.png")
    print(f"written: benchmarks/results/{name}.json" + (f", {name}.png" if drawn else ""))


def draw(benchmark: Benchmark, about: Mapping[str, Any], path: Path) -> bool:
    """Write the picture; False, with a line that says so, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = benchmark.draw(pyplot, about)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def parse(benchmark: Benchmark, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; adds `size` and `approaches`."""
    question = (sys.modules[type(benchmark).__module__].__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{benchmark.name}", description=question)
    for name, (usual, quick, full) in benchmark.sizes.items():
        more = f", with --full {full:g}" if full != usual else ""
        parser.add_argument(_option(name), type=type(usual), help=f"default {usual:g}, with --quick {quick:g}{more}")
    parser.add_argument("--quick", action="store_true", help="smoke run: far too little to judge by")
    parser.add_argument("--full", action="store_true", help="the largest sizes, where there are larger ones")
    names = ",".join(a.name for a in benchmark.approaches)
    parser.add_argument("--only", default="", help=f"comma-separated, of {names}; default {benchmark.usual or 'all'}")
    parser.add_argument("--name", help=f"of the result files; default {benchmark.name}, or {benchmark.name}-quick")
    options = parser.parse_args(arguments)
    try:
        options.approaches = chosen(options.only or benchmark.usual, benchmark.approaches)
    except ValueError as error:
        parser.error(str(error))
    column = 1 if options.quick else 2 if options.full else 0
    given = vars(options)
    options.size = {
        name: values[column] if given[name] is None else given[name] for name, values in benchmark.sizes.items()
    }
    options.name = options.name or (f"{benchmark.name}-quick" if options.quick else benchmark.name)
    return options


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
