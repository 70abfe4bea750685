"""The bridge: the same task with the mark, and with an array for the list."""

from typing import Any

from celery import Celery

from bridge.data import Array

app = Celery("sums_bridge")
Vector: Any = Array["float64", "n"]


@app.task(shared=False, name="total", gpu=True)
def total(values: Vector) -> float:
    """Their sum."""
    return float(values.sum())
