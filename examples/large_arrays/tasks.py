"""Tasks on arrays, of whatever size and however they come; docs/howto/large-arrays.md explains them."""

from typing import Any

from celery import Celery

from bridge import Gpu
from bridge.data import Array

app = Celery("large_arrays", broker="redis://localhost:6379/0", backend="redis://localhost:6379/0")

Points = Array["float64", "n", 3]  # any number of rows, three columns


@app.task(gpu=True)
def centre(points: Points) -> list[float]:
    """A small result travels as a list."""
    return points.mean(axis=0).tolist()


@app.task(gpu=Gpu(result="ref"))
def scaled(points: Points, factor: float = 1.0) -> Any:
    """A large result goes to the store, and a reference to the caller or the next task."""
    return points * factor


@app.task
def rows(points: Any) -> int:
    """A CPU task gets a NumPy array, also where a reference was sent."""
    return len(points)
