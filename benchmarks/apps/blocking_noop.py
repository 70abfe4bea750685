"""Celery threads that each block in one Ray call per task: the way without a bridge, with a warm actor.

The actor reserves no GPU, so that the bridge can have the cluster's only one. A reservation is counted when an actor is
placed; calls do not see it (measured: 602-680 us a call with one, 623-628 us without).
"""

import os
from typing import Any

import ray
from celery import Celery
from celery.signals import worker_init

app = Celery("blocking_noop")
app.conf.worker_redirect_stdouts = False  # ray.init asks stdout for its fileno(); Celery's stand-in has none (ray#8610)

actor: Any = None


class BlockingNoop:
    """Does nothing, warm."""

    def noop(self) -> None:
        """Do nothing."""


@worker_init.connect
def connect(**_: Any) -> None:
    """Join the cluster before Celery installs its signal handlers; Ray would take SIGTERM away from them."""
    global actor
    ray.init(address=os.environ["BENCH_RAY_ADDRESS"], namespace="blocking", log_to_driver=False, logging_level="ERROR")
    actor = ray.remote(num_cpus=0)(BlockingNoop).remote()
    ray.get(actor.noop.remote())


@app.task(shared=False, name="noop")
def noop() -> None:
    """Do nothing, on the actor."""
    ray.get(actor.noop.remote())
