"""Plain Celery: the same bodies in its own processes or threads."""

from celery import Celery

from benchmarks.apps import bodies

app = Celery("plain_work")


@app.task(shared=False, name="wait")
def wait(seconds: float, sent: float = 0.0) -> list[float]:
    """Keep this process busy."""
    return bodies.wait(seconds, sent)
