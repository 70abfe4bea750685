"""Plain Celery: the sum of a long list, as people write it."""

import numpy
from celery import Celery

app = Celery("sums_plain")


@app.task(shared=False, name="total")
def total(values: list[float]) -> float:
    """Their sum."""
    return float(numpy.asarray(values).sum())
