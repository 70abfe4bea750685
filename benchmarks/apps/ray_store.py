"""Tasks for `benchmarks.ray_store`."""

import time
from pathlib import Path
from typing import Any

from celery import Celery

from bridge import Gpu, array_module
from bridge.data import Array

app = Celery("ray_store")
#: Bodies wait so long for each other, at most, in seconds.
TOGETHER_S = 60.0


@app.task(gpu=True)
def total(values: Array) -> float:
    """The sum."""
    return float(values.sum())


@app.task(gpu=Gpu(result="ref"))
def ones(count: int) -> Any:
    """An array by reference."""
    return array_module().ones(count)


@app.task(gpu=Gpu(result="device"))
def held(count: int, folder: str, name: str) -> Any:
    """An array that stays, made when two bodies have come to the folder, so that each is on an actor of its own."""
    Path(folder, name).touch()
    deadline = time.monotonic() + TOGETHER_S
    while len(list(Path(folder).iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return array_module().ones(count)


@app.task(gpu=True)
def joined(arrays: list[Array]) -> float:
    """The sum of all."""
    return sum(float(each.sum()) for each in arrays)
