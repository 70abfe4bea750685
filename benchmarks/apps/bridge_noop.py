"""The bridge: the same task with the mark."""

from celery import Celery

app = Celery("bridge_noop")


@app.task(shared=False, name="noop", gpu=True)
def noop() -> None:
    """Do nothing, on a warm actor."""
