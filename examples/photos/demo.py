"""``python -m examples.photos.demo``: a worker, a plain producer, eight photographs, and a summary of what ran where.

Writes ``out/contact-sheet.png`` and ``out/worker.log``. Takes under two minutes, most of it starting Ray.
"""

import argparse
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from celery import Celery
from celery.exceptions import TimeoutError as NotYet
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from examples.photos import producer, summary
from examples.photos.photographs import PHOTOGRAPHS, write_photographs
from examples.photos.worker import COMMAND, Worker, WorkerDied

#: Seconds until the worker must answer; a cold Ray on two busy cores takes about 20.
START_TIMEOUT_S = 90.0
#: Seconds until a task's result must be there, the first one with its warm-up included.
RESULT_TIMEOUT_S = 60.0
#: Seconds until the worker's figures must include the last task: actors report to it now and then.
FIGURES_TIMEOUT_S = 5.0
#: What Celery raises when Redis is gone, after retries of its own.
CONNECTION_LOST = (OperationalError, ConnectionError, RedisError, RuntimeError)
#: Few retries: Redis here is a child of the worker, and a dead worker should show within seconds.
RETRIES = {"max_retries": 3, "interval_start": 0, "interval_step": 0.5, "interval_max": 1}
BURST = 200
SINGLE_CALLS = 40


class DemoFailed(Exception):
    """The demo cannot go on; the text says what did not come."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code: 0 done, 1 failed, 130 interrupted."""
    options = _options(arguments)
    console = Console()
    before = signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        run(console, options.out, options.broker or f"redis://127.0.0.1:{_free_port()}/0", options.worker)
    except (DemoFailed, WorkerDied, OperationalError) as error:
        console.print(f"demo failed: {error}", style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the worker is stopped", style="yellow")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def run(console: Console, out: Path, broker_url: str, command: str) -> None:
    """The story: start a worker, send photographs, vectors and single calls, and tell what ran where."""
    files = write_photographs(out / "photographs")
    app = producer.connect(broker_url)
    app.conf.result_backend_transport_options = {"retry_policy": RETRIES}
    timings = summary.Timings()
    began = time.perf_counter()
    console.print(f"[bold]Starting[/] {command}", highlight=False)
    with Worker(command, broker_url, out / "worker.log", _echo(console)) as worker:
        name = _wait_until_answering(console, app, broker_url, worker)
        timings.answering = time.perf_counter() - began
        with _progress(console) as progress:
            _wait_for(worker, progress, "warming up: first GPU result", producer.send_vectors(app, 1))
            timings.first_result = time.perf_counter() - began
            sheet, timings.photographs = _photographs(app, worker, progress, files, out / "contact-sheet.png")
            burst, timings.burst = _burst(app, worker, progress, name)
            timings.single_calls = _single_calls(app, worker, progress)
        console.print()
        summary.show(console, _stats(app, name), timings, burst)
        console.print(f"[bold green]Look at[/] {sheet['path']}", highlight=False, soft_wrap=True)
        console.print("Stopping the worker ...")
    app.close()


def _photographs(
    app: Celery, worker: Worker, progress: Progress, files: Sequence[Path], target: Path
) -> tuple[dict[str, Any], float]:
    """The chord: returns what the contact sheet's task returned, and seconds."""
    began = time.perf_counter()
    captions = [photograph.caption for photograph in PHOTOGRAPHS]
    sheet = producer.send_photographs(app, files, captions, target)
    _wait_for(worker, progress, "enhancing photographs", sheet.parent.results)
    written: dict[str, Any] = _wait_for(worker, progress, "writing the contact sheet", [sheet])[0]
    return written, time.perf_counter() - began


def _burst(app: Celery, worker: Worker, progress: Progress, name: str) -> tuple[tuple[int, int], float]:
    """Many vectors at once: returns (tasks, runs of the body), runs 0 where the worker does not tell, and seconds."""
    tasks_before, runs_before = summary.count_of(_stats(app, name), producer.NORMALISE)
    began = time.perf_counter()
    _wait_for(worker, progress, "normalising a burst of vectors", producer.send_vectors(app, BURST))
    seconds = time.perf_counter() - began
    deadline = time.monotonic() + FIGURES_TIMEOUT_S
    while True:
        stats = _stats(app, name)
        tasks, runs = summary.count_of(stats, producer.NORMALISE)
        if summary.gpu_of(stats) is None or time.monotonic() > deadline:
            return (BURST, 0), seconds
        if tasks - tasks_before >= BURST:
            return (tasks - tasks_before, runs - runs_before), seconds
        time.sleep(0.2)


def _single_calls(app: Celery, worker: Worker, progress: Progress) -> list[float]:
    """One call after the other, each alone: returns the seconds each took."""
    seconds = []
    line = progress.add_task("calling one at a time", total=SINGLE_CALLS)
    for _ in range(SINGLE_CALLS):
        began = time.perf_counter()
        _result_of(worker, producer.send_vectors(app, 1)[0])
        seconds.append(time.perf_counter() - began)
        progress.advance(line)
    return seconds


def _wait_for(worker: Worker, progress: Progress, what: str, results: Sequence[AsyncResult]) -> list[Any]:
    line = progress.add_task(what, total=len(results))
    values = []
    for result in results:
        values.append(_result_of(worker, result))
        progress.advance(line)
    return values


def _result_of(worker: Worker, result: AsyncResult) -> Any:
    """A task's result; looks at the worker every second, so that its death does not look like slowness."""
    deadline = time.monotonic() + RESULT_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            value = result.get(timeout=1, propagate=False)
        except NotYet:
            worker.check()
            continue
        except CONNECTION_LOST as error:
            worker.check()
            raise DemoFailed(f"Redis is lost: {error}") from error
        if result.failed():
            raise DemoFailed(f"task {result.id} failed: {type(value).__name__}: {value}")
        return value
    raise DemoFailed(f"no result of task {result.id} within {RESULT_TIMEOUT_S:.0f} s")


def _wait_until_answering(console: Console, app: Celery, broker_url: str, worker: Worker) -> str:
    """Wait for Redis, then for the worker's answer to a ping; returns the worker's name."""
    began = time.monotonic()
    broker = urlsplit(broker_url)
    address = (broker.hostname or "127.0.0.1", broker.port or 6379)
    with console.status("") as status:
        while (waited := time.monotonic() - began) < START_TIMEOUT_S:
            worker.check()
            # The port first: a ping without a broker would wait for one without end.
            listening = _listening(address)
            missing = "the worker to answer a ping" if listening else f"Redis at {address[0]}:{address[1]}"
            status.update(f"{waited:.0f} s: waiting for {missing}")
            answers = app.control.ping(timeout=0.5) if listening else []
            if answers:
                return str(next(iter(answers[0])))
            time.sleep(0.2)
    raise DemoFailed(f"after {START_TIMEOUT_S:.0f} s still waiting for {missing}")


def _stats(app: Celery, name: str) -> dict[str, Any]:
    answers = app.control.inspect(destination=[name], timeout=3).stats() or {}
    stats: dict[str, Any] = answers.get(name, {})
    return stats


def _listening(address: tuple[str, int]) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=0.5):
        return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield progress


def _echo(console: Console) -> Callable[[str], None]:
    return lambda line: console.print(f"worker │ {line}", style="dim", markup=False, highlight=False, soft_wrap=True)


def _as_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.photos.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for what is written (default: out)")
    parser.add_argument(
        "--broker", metavar="URL", help="Redis to use (default: one on a free port, started by the worker)"
    )
    parser.add_argument(
        "--worker", metavar="COMMAND", default=COMMAND, help="the worker to start (default: %(default)s)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
