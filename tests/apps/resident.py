"""Tasks whose results stay on the device, and tasks that take them."""

import os
import time
from pathlib import Path

import numpy

from actors.executor import device_results
from bridge import Gpu, array_module, batched
from bridge.data import Array
from tests.apps.base import App

QUEUE = "resident"
app = App("resident")
app.conf.update(broker_connection_retry_on_startup=True, task_acks_late=True, task_default_queue=QUEUE)
Floats = Array["float64"]
STAYS = Gpu(result="device")


def at(array):
    """Where an array is: process and address."""
    pointer = array.__array_interface__["data"][0] if isinstance(array, numpy.ndarray) else array.data.ptr
    return [os.getpid(), pointer]


@app.task(gpu=STAYS)
def made(count: int, value: float = 1.0) -> object:
    xp = array_module()
    array = xp.full(count, value)
    return {"array": array, "at": at(array)}


@app.task(gpu=STAYS)
def ones(count: int) -> object:
    return array_module().ones(count)


@app.task(gpu=Gpu(result="device", keep_copy=True))
def copied(count: int) -> object:
    return array_module().ones(count)


@app.task(gpu=STAYS)
def made_together(folder: str, name: str, others: int, count: int) -> object:
    """Ends when as many bodies have come to the folder: each then runs on an actor of its own."""
    Path(folder, name).touch()
    deadline = time.monotonic() + 60
    while len(list(Path(folder).iterdir())) < others and time.monotonic() < deadline:
        time.sleep(0.02)
    return array_module().full(count, float(count))


@app.task(gpu=STAYS)
def doubled(values: Floats) -> object:
    return values * 2


@app.task(gpu=STAYS)
def passed_on(values: Array) -> object:
    return values


@app.task(gpu=True)
def tells(values: Array) -> dict:
    """What is held where `values` are."""
    return device_results.shared.holdings()._asdict()


@app.task(gpu=True)
def place(values: Array) -> list:
    return [*at(values), float(values.sum())]


@app.task(gpu=True)
def joined(arrays: list[Array]) -> list:
    return [os.getpid(), sorted(float(each.sum()) for each in arrays)]


@app.task(gpu=STAYS)
@batched(max_size=8, max_wait_s=0.05)
def halved(values: list[Floats]) -> list:
    return list(array_module().stack(values) / 2)


@app.task(gpu=True)
def unannotated(values) -> list:
    return [type(values).__name__, float(numpy.asarray(values).sum())]


@app.task(gpu=True, autoretry_for=(Exception,), max_retries=1, default_retry_delay=0)
def total(values: Array) -> float:
    return float(values.sum())


@app.task(gpu=STAYS)
def held_up(values: Array, folder: str) -> object:
    """Makes an array, and ends when the test says so."""
    array = values * 3
    Path(folder, "started").touch()
    deadline = time.monotonic() + 60
    while not Path(folder, "go").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    return array


@app.task(gpu=STAYS)
def held_till_killed(values: Array, folder: str) -> object:
    """A name of its own: one that has ended quickly once counts as short, and others are sent behind it."""
    return held_up.run(values, folder)


@app.task
def on_cpu(values) -> list:
    return [type(values).__name__, float(numpy.asarray(values).sum()), os.getpid()]


@app.task
def on_cpu_array(count: int) -> object:
    return numpy.full(count, 2.0)


@app.task
def passed_on_cpu(values) -> object:
    return values
