"""Plain Celery on arrays: as JSON lists, and as base64 of the bytes, which people write when lists are too slow."""

import base64

import numpy
from celery import Celery

app = Celery("plain_data")


@app.task(shared=False, name="total")
def total(values: list[float]) -> float:
    """The sum of a JSON list."""
    return float(numpy.asarray(values, numpy.float64).sum())


@app.task(shared=False, name="total_base64")
def total_base64(text: str) -> float:
    """The sum of float64 in base64."""
    return float(numpy.frombuffer(base64.b64decode(text), numpy.float64).sum())


@app.task(shared=False, name="doubled_base64")
def doubled_base64(text: str) -> str:
    """Twice the numbers, in the form in which they came."""
    doubled = 2 * numpy.frombuffer(base64.b64decode(text), numpy.float64)
    return base64.b64encode(doubled.tobytes()).decode("ascii")
