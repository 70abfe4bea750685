"""What is compared: one row of the table each, with the command that runs its worker."""

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


def celery(app: str, pool: str, concurrency: int) -> tuple[str, ...]:
    """The command of a plain Celery worker."""
    return ("celery", "-A", app, "worker", "-P", pool, "-c", str(concurrency))


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


APPROACHES = (
    Approach("prefork", "Celery prefork, CPU task", celery("benchmarks.apps.plain", "prefork", 2)),
    Approach("threads", "Celery threads, CPU task", celery("benchmarks.apps.plain", "threads", 2)),
    Approach(
        "blocking-ray",
        "Celery thread + one blocking Ray call",
        celery("benchmarks.apps.blocking_ray", "threads", 4),
        needs_ray=True,
        actor_title="ray::BlockingNoop",
    ),
    Approach(
        "bridge",
        "this bridge",
        ("bridge.worker", "-A", "benchmarks.apps.bridge_noop", "-c", "2"),
        needs_ray=True,
    ),
    from_seed("subprocess", "seed: subprocess per call", "subprocess_per_call", "prefork"),
    from_seed("queue", "seed: process and queue per call", "queue_per_call", "threads"),
)

#: What ratios are taken against.
BASELINES = ("prefork", "blocking-ray")


def chosen(names: str) -> tuple[Approach, ...]:
    """The approaches of a comma-separated list; all for an empty one.

    Raises:
        ValueError: a name that no approach has.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {approach.name: approach for approach in APPROACHES}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"no approach is called {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(known[name] for name in wanted) or APPROACHES
