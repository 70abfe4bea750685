"""The bridge: waiting bodies with the mark, and the vectorised one with and without `@batched`."""

from celery import Celery

from benchmarks.apps import bodies
from bridge import batched

app = Celery("bridge_work")

#: Items of one run at most.
MAX_SIZE = 64


@app.task(shared=False, name="wait", gpu=True)
def wait(seconds: float, sent: float = 0.0) -> list[float]:
    """Keep the GPU busy."""
    return bodies.wait(seconds, sent)


@app.task(shared=False, name="single", gpu=True)
def single(item: int) -> list[float]:
    """A run for one item."""
    return bodies.vectorised(1)


@app.task(shared=False, name="together", gpu=True)
@batched(max_size=MAX_SIZE)
def together(item: list[int]) -> list[list[float]]:
    """A run for what waits."""
    return [bodies.vectorised(len(item))] * len(item)
