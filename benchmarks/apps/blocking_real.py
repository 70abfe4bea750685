"""The tasks of `celery_app` the way without a bridge: Celery threads that each block in one Ray call to a warm actor.

A direct call of a marked task runs its body where it is called, on NumPy; here that is inside the actors, which take
turns. `BENCH_ACTORS` says how many. They reserve no GPU, so that the bridge can have all of the cluster's.
"""

import itertools
import os
from typing import Any

import ray
from celery import Celery
from celery.signals import worker_init

app = Celery("blocking_real")
app.config_from_object("celery_app.config")
app.conf.worker_redirect_stdouts = False  # ray.init asks stdout for its fileno(); Celery's stand-in has none (ray#8610)

actors: Any = None


class BlockingReal:
    """Runs bodies of `celery_app`, with its modules loaded."""

    def __init__(self) -> None:
        from celery_app.tasks import arrays, images

        self._bodies = {"enhance": images.enhance, "total": arrays.total}

    def run(self, name: str, payload: Any) -> Any:
        """One body."""
        return self._bodies[name](payload)


@worker_init.connect
def connect(**_: Any) -> None:
    """Join the cluster before Celery installs its signal handlers; Ray would take SIGTERM away from them."""
    global actors
    ray.init(address=os.environ["BENCH_RAY_ADDRESS"], namespace="blocking", log_to_driver=False, logging_level="ERROR")
    started = [ray.remote(num_cpus=0)(BlockingReal).remote() for _ in range(int(os.environ["BENCH_ACTORS"]))]
    ray.get([actor.run.remote("total", [1.0]) for actor in started])
    actors = itertools.cycle(started)


@app.task(shared=False, name="celery_app.tasks.images.enhance")
def enhance(image: str) -> str:
    """The photograph pipeline, on the next actor."""
    return ray.get(next(actors).run.remote("enhance", image))


@app.task(shared=False, name="celery_app.tasks.arrays.total")
def total(data: list[float]) -> float:
    """The sum, on the next actor."""
    return ray.get(next(actors).run.remote("total", data))
