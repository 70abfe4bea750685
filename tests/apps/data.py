"""Tasks on arrays: what they take, by list, envelope and reference, and what they return."""

import os
import time
from typing import Annotated, Any

import numpy
from pydantic import BaseModel

from bridge import Gpu, array_module, batched
from bridge.data import Array, ArraySpec
from tests.apps.base import App

QUEUE = "data"
app = App("data")
app.conf.update(broker_connection_retry_on_startup=True, task_acks_late=True, task_default_queue=QUEUE)

Floats = Array["float64"]
Square = Array["float64", "n", "n"]
Few = Array["int64", slice(1, 3)]
Narrow = Array["float32", "*"]
Finite = Annotated[Any, ArraySpec("float64", None, True)]


@app.task(gpu=True)
def total(values: Floats) -> float:
    return float(values.sum())


@app.task(gpu=True)
def seen(values: Array, name: str = "") -> list:
    """How the array arrives."""
    xp = array_module()
    return [type(values).__module__, values.dtype.str, list(values.shape), float(xp.asarray(values).sum()), os.getpid()]


@app.task(gpu=True)
def square(values: Square, few: Few = (1,)) -> float:
    return float(values.sum())


class Signal(BaseModel):
    samples: Narrow
    rate_hz: float


@app.task(gpu=True)
def duration(signal: Signal) -> list:
    return [signal.samples.dtype.str, signal.samples.shape[0] / signal.rate_hz]


@app.task(gpu=True)
def finite(values: Finite) -> float:
    return float(values.sum())


@app.task(gpu=True)
@batched(max_size=8, max_wait_s=0.05)
def totals(values: list[Floats]) -> list[float]:
    return [float(each.sum()) for each in values]


@app.task(gpu=Gpu(result="ref"))
def doubled(values: Floats) -> object:
    return values * 2


@app.task(gpu=Gpu(result="ref"))
def parts(values: Floats) -> dict:
    return {"low": values[:2], "mean": float(values.mean()), "all": [values]}


@app.task
def on_cpu(values) -> list:
    return [type(values).__name__, float(numpy.asarray(values).sum())]


@app.task
def later(before, values) -> float:
    return float(values.sum())


@app.task(gpu=True, bind=True, max_retries=1)
def again(self, values: Floats, countdown: float = 0.0) -> float:
    if not self.request.retries:
        raise self.retry(countdown=countdown)
    return float(values.sum())


@app.task(gpu=True)
def fails(values: Floats) -> None:
    raise ValueError("as asked")


@app.task(gpu=True, autoretry_for=(Exception,), max_retries=3, default_retry_delay=0)
def retries_all(values: Floats) -> float:
    return float(values.sum())


@app.task(gpu=True, soft_time_limit=0.5)
def slow(values: Floats, seconds: float = 0.0) -> float:
    time.sleep(seconds)
    return float(values.sum())


@app.task(gpu=True)
def stays(values: Floats, seconds: float) -> None:
    time.sleep(seconds)


@app.task(gpu=True, bind=True, max_retries=1)
def doubles_again(self, values: object) -> float:
    if isinstance(values, int):
        raise self.retry(args=(numpy.full(values, 2.0),), countdown=0)
    return float(numpy.asarray(values).sum())


@app.task
def halved_on_cpu(values) -> object:
    """Takes an array and answers with one, as tasks do that know nothing of the bridge."""
    return values / 2


@app.task
def sums_on_cpu(arrays) -> list:
    return [[type(each).__name__, float(each.sum())] for each in arrays]


@app.task(gpu=True)
def sums(arrays: list[Floats]) -> list:
    return [float(each.sum()) for each in arrays]


@app.task
def names_on_cpu() -> object:
    return numpy.array(["a", "b"])


@app.task(gpu=Gpu(result="ref"))
def names(values: Floats) -> dict:
    return {"names": numpy.array(["a", "b"]), "values": values}
