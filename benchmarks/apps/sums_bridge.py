"""The bridge: the same task with the mark, and with an array for the list."""

from celery import Celery

from actors.arrays import Array

app = Celery("sums_bridge")


@app.task(shared=False, name="total", gpu=True)
def total(values: Array["float64", "n"]) -> float:
    """Their sum."""
    return float(values.sum())
