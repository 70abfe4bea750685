"""Tasks that take long lists, and all who may look at them on the way; effects go to files."""

import time
from pathlib import Path
from typing import Any

import numpy
from celery import Task, signals

from bridge import batched
from bridge.data import Array
from tests.apps.base import App

app = App("large")
app.conf.update(task_acks_late=True, broker_connection_retry_on_startup=True, task_default_queue="large")
Vector: Any = Array["float64", "n"]
Matrix: Any = Array["int32", "n", 2]


def note(path, text):
    with open(path, "a") as file:
        file.write(f"{text}\n")


def told(values):
    return f"{type(values).__name__} {len(values)} {sum(values):g}"


@app.task(gpu=True)
def total(values: Vector) -> float:
    return float(values.sum())


@app.task(gpu=True)
def kind(values: Vector) -> str:
    return f"{type(values).__name__} {values.dtype} {values.shape}"


@app.task(gpu=True)
def matrix(rows: Matrix) -> str:
    return f"{type(rows).__name__} {rows.dtype} {rows.shape} {int(rows.sum())}"


@app.task(gpu=True)
def listed(values: list[float], factor: float = 1.0, more: dict[str, list[int]] | None = None) -> float:
    assert type(values) is list and (more is None or type(more) is dict)
    return float(numpy.asarray(values).sum()) * factor


@app.task(gpu=True)
def anything(*args, **kwargs):
    return [type(each).__name__ for each in (*args, *kwargs.values())]


@app.task(gpu=True, bind=True, max_retries=3)
def again(self, values, path):
    note(path, f"{told(values)} {told(self.request.args[0])}")
    if self.request.retries < 1:
        raise self.retry(countdown=0)
    return sum(values)


@app.task(gpu=True, bind=True, autoretry_for=(Exception,), max_retries=3, retry_backoff=False, default_retry_delay=0)
def automatic(self, values: list[float], path: str) -> float:
    note(path, told(values))
    if self.request.retries < 1:
        raise ValueError("once")
    return sum(values)


@app.task(gpu=True)
@batched(max_size=8, max_wait_s=0.5)
def many(values: list[list[float]]) -> list[float]:
    return [float(sum(each)) for each in values]


class Hooked(Task):
    def before_start(self, task_id, args, kwargs):
        note(args[1], f"before {told(args[0])}")

    def on_success(self, retval, task_id, args, kwargs):
        note(args[1], f"success {told(args[0])}")

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        note(args[1], f"failure {told(args[0])}")


@app.task(gpu=True, base=Hooked)
def hooked(values, path):
    if values[0] < 0:
        raise ValueError("negative")
    return sum(values)


@app.task(gpu=True)
def watched(values, path):
    return sum(values)


@app.task(gpu=True)
def named(values, path):
    return sum(values)


@signals.task_prerun.connect(sender=watched)
def look(**kwargs):
    """Takes whatever comes."""
    values, path = kwargs["args"]
    note(path, f"{told(values)} {values[1]:g}")


@signals.task_postrun.connect(sender=named)
def name(args=None, **_):
    """Wants the arguments."""
    note(args[1], told(args[0]))


@app.task(gpu=True)
def fails(values):
    raise ValueError(sum(values))


@app.task
def on_error(request, exc, traceback, path):
    note(path, f"{told(request.args[0])} {exc}")


@app.task(gpu=True)
def holds(values, gate, path):
    note(path, "runs")
    while not Path(gate).exists():
        time.sleep(0.02)
    return sum(values)


@app.task(gpu=True)
def add(first, second):
    return first + second


@app.task(gpu=True)
def summed(values):
    return sum(values)
