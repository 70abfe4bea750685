"""Celery threads that each block in one Ray call per task, to warm actors in turn: the way without a bridge.

`BENCH_ACTORS` says how many actors. They reserve no GPU, so that the bridge can have all of the cluster's.
"""

import itertools
import os
from typing import Any

import ray
from celery import Celery
from celery.signals import worker_init

from benchmarks.apps import bodies

app = Celery("blocking_work")
app.conf.worker_redirect_stdouts = False  # ray.init asks stdout for its fileno(); Celery's stand-in has none (ray#8610)

actors: Any = None


class BlockingWork:
    """Runs bodies, warm."""

    def wait(self, seconds: float, sent: float) -> list[float]:
        """Keep this actor busy."""
        return bodies.wait(seconds, sent)


@worker_init.connect
def connect(**_: Any) -> None:
    """Join the cluster before Celery installs its signal handlers; Ray would take SIGTERM away from them."""
    global actors
    ray.init(address=os.environ["BENCH_RAY_ADDRESS"], namespace="blocking", log_to_driver=False, logging_level="ERROR")
    started = [ray.remote(num_cpus=0)(BlockingWork).remote() for _ in range(int(os.environ["BENCH_ACTORS"]))]
    ray.get([actor.wait.remote(0.0, 0.0) for actor in started])
    actors = itertools.cycle(started)


@app.task(shared=False, name="wait")
def wait(seconds: float, sent: float = 0.0) -> list[float]:
    """Keep the next actor busy."""
    return ray.get(next(actors).wait.remote(seconds, sent))
