"""Celery prefork children that each block in one Ray call per task, all on one warm actor.

A child joins the cluster after it was forked, because a process forked from one that has joined hangs in `ray.get`.
The actor reserves no GPU, as in `blocking_noop`.
"""

import os
from typing import Any

import ray
from celery import Celery
from celery.signals import worker_process_init

app = Celery("prefork_ray")
app.conf.worker_redirect_stdouts = False  # ray.init asks stdout for its fileno(); Celery's stand-in has none (ray#8610)
app.conf.worker_proc_alive_timeout = 60.0  # joining takes seconds, and four do it at once

actor: Any = None


class PreforkNoop:
    """Does nothing, warm."""

    def noop(self) -> None:
        """Do nothing."""


@worker_process_init.connect
def connect(**_: Any) -> None:
    """Join the cluster; the first child creates the actor, the others find it."""
    global actor
    ray.init(address=os.environ["BENCH_RAY_ADDRESS"], namespace="prefork", log_to_driver=False, logging_level="ERROR")
    actor = ray.remote(num_cpus=0)(PreforkNoop).options(name="noop", lifetime="detached", get_if_exists=True).remote()
    ray.get(actor.noop.remote())


@app.task(shared=False, name="noop")
def noop() -> None:
    """Do nothing, on the actor."""
    ray.get(actor.noop.remote())
