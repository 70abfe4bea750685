"""The bridge: the same task with the mark."""

import numpy
from celery import Celery

app = Celery("sums_bridge")


@app.task(shared=False, name="total", gpu=True)
def total(values: list[float]) -> float:
    """Their sum."""
    return float(numpy.asarray(values).sum())
