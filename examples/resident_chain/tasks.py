"""One chain in two forms: arrays that stay on the GPU between its steps, and arrays as base64 in every message."""

import base64
import os

import numpy
from celery import Celery, chain

from bridge import Gpu, array_module, to_host
from bridge.data import Array

URL = os.environ.get("CELERY_BROKER_URL", "redis://localhost:6379/0")
app = Celery("resident_chain", broker=URL, backend=os.environ.get("CELERY_RESULT_BACKEND", URL))
app.conf.update(task_acks_late=True, task_default_queue="resident_chain", broker_connection_retry_on_startup=True)


Signal = Array["float64", "*"]


def measure(count):
    """Something to work on, made where it is needed."""
    xp = array_module()
    return xp.sin(xp.arange(count, dtype="float64"))


def smooth(signal):
    return (signal[:-2] + signal[1:-1] + signal[2:]) / 3


def scale(signal):
    return (signal - signal.min()) / (signal.max() - signal.min())


# ---- the arrays stay


@app.task(gpu=Gpu(result="device"))
def measured(count: int) -> object:
    return measure(count)


@app.task(gpu=Gpu(result="device"))
def smoothed(signal: Signal) -> object:
    return smooth(signal)


@app.task(gpu=Gpu(result="device"))
def scaled(signal: Signal) -> object:
    return scale(signal)


@app.task(gpu=True)
def mean(signal: Signal) -> float:
    return float(signal.mean())


# ---- the same, as it is done without: text in, text out


def text_of(signal):
    return base64.b64encode(numpy.asarray(to_host(signal)).tobytes()).decode()


def signal_of(text):
    return array_module().asarray(numpy.frombuffer(base64.b64decode(text), "float64"))


@app.task(gpu=True)
def measured_text(count: int) -> str:
    return text_of(measure(count))


@app.task(gpu=True)
def smoothed_text(text: str) -> str:
    return text_of(smooth(signal_of(text)))


@app.task(gpu=True)
def scaled_text(text: str) -> str:
    return text_of(scale(signal_of(text)))


@app.task(gpu=True)
def mean_text(text: str) -> float:
    return float(signal_of(text).mean())


CHAINS = {
    "arrays stay": lambda count: chain(measured.s(count), smoothed.s(), scaled.s(), mean.s()),
    "base64": lambda count: chain(measured_text.s(count), smoothed_text.s(), scaled_text.s(), mean_text.s()),
}
