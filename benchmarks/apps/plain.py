"""Plain Celery: the task does nothing."""

from celery import Celery

app = Celery("plain")


@app.task(shared=False, name="noop")
def noop() -> None:
    """Do nothing."""
