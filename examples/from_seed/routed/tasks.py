"""The seed's third approach: the task says that it wants a GPU, and the bridge takes it to a warm one.

Run by ``python -m bridge.worker -A tasks``. Nothing is started per call: Python, the array library and the CUDA context
have been there since the worker started.
"""

from celery import Celery

from bridge import array_module

app = Celery('tasks', broker='redis://localhost//')  # fmt: skip


@app.task(gpu=True)
def gpu_intensive_task(data):
    """The sum of squares of a list of numbers."""
    xp = array_module()
    values = xp.asarray(data, dtype=float)
    return float((values * values).sum())
