"""Plain Celery: the task does nothing."""

from celery import Celery

app = Celery("plain")


@app.task(name="noop")
def noop() -> None:
    """Do nothing."""
