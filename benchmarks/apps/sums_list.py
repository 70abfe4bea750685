"""The bridge: the same task with the mark, and nothing else changed."""

import numpy
from celery import Celery

app = Celery("sums_list")


@app.task(shared=False, name="total", gpu=True)
def total(values: list[float]) -> float:
    """Their sum."""
    return float(numpy.asarray(values).sum())
