"""What is compared: one lane each, with the command that runs its worker."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

#: The repository: where workers run unless an approach says otherwise.
ROOT = Path(__file__).parent.parent


class Approach(NamedTuple):
    """One way from a Celery message to a result."""

    name: str
    title: str
    command: tuple[str, ...]  # after `python -m`; the queue and the worker's name are added
    task: str = "noop"
    args: tuple[object, ...] = ()
    folder: Path = ROOT
    share: float = 1.0  # of the tasks of a round; slow approaches get fewer
    needs_ray: bool = False
    actor_title: str = ""  # of its actors, so that other approaches on the cluster are not charged for them
    is_celery: bool = True  # else the command gets nothing added and reads BENCH_QUEUE and BENCH_ACTORS
    stores_started: bool = False  # a result is there when a task starts, and the message is acknowledged at its end
    cluster: int = 0  # which of the run's clusters it joins


def celery(app: str, pool: str, concurrency: int) -> tuple[str, ...]:
    """The command of a plain Celery worker."""
    return ("celery", "-A", app, "worker", "-P", pool, "-c", str(concurrency))


def prefork(app: str, concurrency: int = 2, **fields: object) -> Approach:
    """The yardstick: the same body as a plain CPU task."""
    made = Approach("prefork", "Celery prefork, CPU task", celery(app, "prefork", concurrency))
    return made._replace(**fields)


def blocking_ray(app: str, threads: int = 4, **fields: object) -> Approach:
    """What people write without a bridge: each thread of a Celery worker blocks in one Ray call to a warm actor."""
    title = "Celery thread + one blocking Ray call"
    command = celery(app, "threads", threads)
    made = Approach("blocking-ray", title, command, needs_ray=True, actor_title="ray::Blocking")
    return made._replace(**fields)


def bridge(app: str, **fields: object) -> Approach:
    """This project."""
    command = ("bridge.worker", "-A", app, "-c", "2")
    made = Approach("bridge", "this bridge", command, needs_ray=True, actor_title="ray::GpuActor")
    return made._replace(**fields)


def from_seed(name: str, title: str, folder: str, pool: str) -> Approach:
    """An approach of the seed as it stands in `examples/`: one number to square, everything else is the way there."""
    return Approach(
        name,
        title,
        celery("tasks", pool, 2),
        task="tasks.gpu_intensive_task",
        args=([1.0],),
        folder=ROOT / "examples" / "from_seed" / folder,
        share=0.01,
    )


#: What a call costs that Ray alone makes.
PLAIN_RAY = Approach(
    "plain-ray",
    "plain Ray calls, no queue, no results",
    ("benchmarks.apps.plain_ray",),
    needs_ray=True,
    actor_title="ray::PlainNoop",
    is_celery=False,
)

#: The approaches of `benchmarks.noop`.
APPROACHES = (
    prefork("benchmarks.apps.plain"),
    Approach("threads", "Celery threads, CPU task", celery("benchmarks.apps.plain", "threads", 2)),
    Approach("solo", "Celery solo, CPU task", celery("benchmarks.apps.plain", "solo", 1)),
    blocking_ray("benchmarks.apps.blocking_noop"),
    Approach(
        "prefork-ray",
        "Celery prefork child + one blocking Ray call",
        celery("benchmarks.apps.prefork_ray", "prefork", 4),
        needs_ray=True,
        actor_title="ray::PreforkNoop",
    ),
    Approach(
        "serve",
        "Ray Serve's Celery task consumer (no hop)",
        ("benchmarks.apps.serve_consumer",),
        needs_ray=True,
        actor_title="ray::Serve",
        is_celery=False,
    ),
    bridge("benchmarks.apps.bridge_noop"),
    PLAIN_RAY,
    from_seed("subprocess", "seed: subprocess per call", "subprocess_per_call", "prefork"),
    from_seed("queue", "seed: process and queue per call", "queue_per_call", "threads"),
)

#: What ratios are taken against.
BASELINES = ("prefork", "blocking-ray")


def chosen(names: str, known: Sequence[Approach] = APPROACHES) -> tuple[Approach, ...]:
    """The approaches of a comma-separated list; all for an empty one.

    Raises:
        ValueError: a name that no approach has.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    by_name = {approach.name: approach for approach in known}
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise ValueError(f"no approach is called {', '.join(unknown)}; there are {', '.join(by_name)}")
    return tuple(by_name[name] for name in wanted) or tuple(known)
