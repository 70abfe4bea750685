"""GPU tasks that differ in nothing but how Celery is told to treat a lost process: early and late, every setting."""

import os
import signal
import time
from pathlib import Path

from bridge import batched
from tests.apps.base import App
from tests.apps.shop import note

app = App("lossy")
#: What a task says of itself -> its options.
SETTINGS = {
    "early": {},
    "late": {"acks_late": True},
    "late_keep": {"acks_late": True, "reject_on_worker_lost": False},
    "late_reject": {"acks_late": True, "reject_on_worker_lost": True},
    "early_retry": {"retry_on_worker_lost": True, "default_retry_delay": 0, "max_retries": 2},
    "late_retry": {"acks_late": True, "retry_on_worker_lost": True, "default_retry_delay": 0, "max_retries": 2},
}


def dies(path):
    """End the process; every run leaves a line."""
    note(path, "run")
    os.kill(os.getpid(), signal.SIGKILL)


def holds(path, gate):
    """Run until the test opens the gate."""
    note(path, f"run {os.getpid()}")
    while not Path(gate).exists():
        time.sleep(0.01)
    return "done"


for _name, _options in SETTINGS.items():
    app.task(dies, name=f"lossy.dies.{_name}", gpu=True, **_options)
    app.task(holds, name=f"lossy.holds.{_name}", gpu=True, **_options)


@app.task(name="lossy.large", gpu=True, acks_late=True)
def large(path, gate):
    """Its value travels on its own, after the reply that names it."""
    holds(path, gate)
    note(path, "end")
    return "x" * 300_000


def some_die(paths: list[str]) -> list[str]:
    """A batch in which whoever says so ends the process."""
    for path in paths:
        note(path, "run")
    if any("deadly" in path for path in paths):
        os.kill(os.getpid(), signal.SIGKILL)
    return ["done"] * len(paths)


app.task(batched(max_size=8, max_wait_s=0.3)(some_die), name="lossy.batch.early", gpu=True)
app.task(batched(max_size=8, max_wait_s=0.3)(some_die), name="lossy.batch.late", gpu=True, acks_late=True)


@app.task(name="lossy.cpu")
def cpu(value):
    return value


@app.task(name="lossy.publishes", gpu=True)
def publishes(value):
    """From the executor, with the broker's URL that it was started with; the other task's id."""
    return cpu.delay(value).id
