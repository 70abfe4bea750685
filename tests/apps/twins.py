"""Each task twice, as a CPU task and as a GPU task, so that a test can compare what the world sees of them."""

import time
from pathlib import Path

from tests.apps.base import App

app = App("twins")
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_default_queue="twins",
    task_track_started=True,
    task_send_sent_event=True,
)


def nap(seconds, label=""):
    time.sleep(seconds)
    return [seconds, label]


def waits(path):
    while not Path(path).exists():
        time.sleep(0.01)
    return "opened"


def fails(reason):
    raise ValueError(reason)


def retries(self, until):
    if self.request.retries < until:
        raise self.retry(countdown=0, exc=ValueError("not yet"))
    return self.request.retries


def postpones(self):
    raise self.retry(countdown=0, exc=ValueError("later"), queue="twins.later")  # which nobody consumes


def reports(self):
    self.send_event("task-progress", done=1)


for kind, options in {"cpu": {}, "gpu": {"gpu": True}}.items():
    for body in (nap, waits, fails):
        app.task(name=f"twins.{kind}.{body.__name__}", **options)(body)
    for body in (retries, postpones, reports):
        app.task(name=f"twins.{kind}.{body.__name__}", bind=True, **options)(body)
