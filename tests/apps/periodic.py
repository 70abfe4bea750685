"""An app whose beat sends a GPU task, over and over."""

from tests.apps.base import App

app = App("periodic")
app.conf.update(
    timezone="UTC",
    broker_connection_retry_on_startup=True,
    task_default_queue="periodic",
    beat_schedule={"often": {"task": "periodic.tick", "schedule": 0.5, "args": [2], "kwargs": {"offset": 1}}},
)


@app.task(name="periodic.tick", gpu=True)
def tick(value: int, offset: int = 0) -> int:
    return value * 10 + offset
