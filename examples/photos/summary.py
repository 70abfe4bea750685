"""What ran where and how fast, from the worker's own answer to ``inspect stats``."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


@dataclass
class Timings:
    """What the producer saw, in seconds."""

    answering: float = 0.0
    first_result: float = 0.0
    photographs: float = 0.0
    burst: float = 0.0
    single_calls: list[float] = field(default_factory=list)


@dataclass
class Work:
    """Tasks of one name on one device: how many, in how many runs of the body (0: not told), and seconds per task."""

    where: str
    device: str
    task: str
    tasks: int
    runs: int = 0
    mean_s: float | None = None


def work_done(stats: dict[str, Any]) -> list[Work]:
    """One `Work` per actor and task, then the tasks that ran in the worker's own processes."""
    on_actors = list(_on_actors(stats))
    elsewhere = dict(stats.get("total", {}))
    for work in on_actors:
        elsewhere.pop(work.task, None)
    return on_actors + [Work("worker", "CPU", task, count) for task, count in sorted(elsewhere.items())]


def gpu_of(stats: dict[str, Any]) -> dict[str, Any] | None:
    """The bridge's part of the pool's stats, or None for a worker without the bridge."""
    gpu = stats.get("pool", {}).get("gpu")
    return gpu if isinstance(gpu, dict) else None


def count_of(stats: dict[str, Any], task: str) -> tuple[int, int]:
    """(tasks, runs) of a task name on all actors together."""
    found = [work for work in _on_actors(stats) if work.task == task]
    return sum(work.tasks for work in found), sum(work.runs for work in found)


def show(console: Console, stats: dict[str, Any], timings: Timings, burst: tuple[int, int]) -> None:
    """Print two tables and, where there was no GPU, why. `burst` is (tasks, runs) of the burst of vectors."""
    console.print(_where_table(work_done(stats)))
    console.print(_speed_table(timings, burst, _warm_up_s(stats)))
    gpu = gpu_of(stats)
    if gpu is None:
        console.print("[yellow]This worker says nothing of GPU actors: tasks ran in its own processes, on NumPy.")
        return
    for actor in gpu.get("actors", []):
        device = actor.get("device") or {}
        if device.get("kind") == "cpu":
            reason = device.get("note") or "not asked for"
            console.print(f"[yellow]Actor {actor.get('slot')} has no GPU ({reason}). The same code ran on NumPy.")


def _on_actors(stats: dict[str, Any]) -> Iterator[Work]:
    for actor in (gpu_of(stats) or {}).get("actors", []):
        device = (actor.get("device") or {}).get("name") or "unknown"
        where = f"actor {actor.get('slot')} on {actor.get('node')}"
        for task, done in sorted((actor.get("by_task") or {}).items()):
            yield Work(where, device, task, done.get("tasks", 0), done.get("runs", 0), done.get("mean_s"))


def _warm_up_s(stats: dict[str, Any]) -> float | None:
    seconds = [actor.get("warm_s") for actor in (gpu_of(stats) or {}).get("actors", [])]
    return max((value for value in seconds if value is not None), default=None)


def _where_table(done: Sequence[Work]) -> Table:
    table = _table("What ran where")
    for name in ("where", "device"):
        table.add_column(name, overflow="fold")
    table.add_column("task", no_wrap=True)
    for name in ("tasks", "runs", "per run", "per task"):
        table.add_column(name, justify="right", no_wrap=True)
    for work in done:
        table.add_row(
            work.where,
            work.device,
            work.task.removeprefix("celery_app.tasks."),
            str(work.tasks),
            str(work.runs or ""),
            f"{work.tasks / work.runs:.1f}" if work.runs else "",
            "" if work.mean_s is None else f"{work.mean_s * 1000:.2f} ms",
        )
    return table


def _speed_table(timings: Timings, burst: tuple[int, int], warm_up_s: float | None) -> Table:
    table = _table("How fast, as the producer saw it")
    table.add_column("what")
    table.add_column("measured", justify="right")
    table.add_row("cold start: worker answers", f"{timings.answering:.1f} s")
    table.add_row("cold start: first GPU result", f"{timings.first_result:.1f} s")
    if warm_up_s is not None:
        table.add_row("of it, warming the executor", f"{warm_up_s:.1f} s")
    table.add_row("photographs and their contact sheet", f"{timings.photographs:.1f} s")
    tasks, runs = burst
    per_run = f", {runs} runs of {tasks / runs:.1f} tasks" if runs else ""
    table.add_row(f"burst of {tasks} vectors", f"{timings.burst:.2f} s{per_run}")
    if len(timings.single_calls) > 1:
        parts = statistics.quantiles(timings.single_calls, n=20, method="inclusive")
        table.add_row("warm latency of one call, p50", f"{parts[9] * 1000:.1f} ms")
        table.add_row("warm latency of one call, p95", f"{parts[18] * 1000:.1f} ms")
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
