"""Tasks on files and pictures: what they take, in every form, and what they return."""

import hashlib
import time
from typing import Annotated, Any

from pydantic import BaseModel

from bridge import Gpu, array_module, batched
from bridge.data import Array, Blob, BlobSpec, Image, ImageSpec
from bridge.errors import StoreUnavailable
from tests.apps.base import App

QUEUE = "media"
app = App("media")
app.conf.update(broker_connection_retry_on_startup=True, task_acks_late=True, task_default_queue=QUEUE)

Letter = Annotated[bytes, BlobSpec(most_bytes=1000, formats=("PDF",))]
Small = Annotated[Any, ImageSpec(most_pixels=10_000)]
Numbers = Array["float64"]


@app.task(gpu=True)
def digest(file: Blob) -> list:
    return [type(file).__name__, len(file), hashlib.sha256(file).hexdigest()]


@app.task(gpu=True)
def read(letter: Letter) -> int:
    return len(letter)


@app.task(gpu=True)
def brightness(image: Small, scale: float = 1.0) -> list:
    xp = array_module()
    return [type(image).__module__, image.dtype.str, list(image.shape), float(xp.asarray(image).mean()) * scale]


@app.task(gpu=True)
@batched(max_size=8, max_wait_s=0.05)
def widths(images: list[Small]) -> list[int]:
    return [image.shape[1] for image in images]


class Album(BaseModel):
    name: str
    pictures: list[Image]


@app.task(gpu=True)
def pixels_of(album: Album) -> int:
    return sum(each.size for each in album.pictures)


@app.task(gpu=Gpu(result="ref"))
def twice(file: Blob) -> dict:
    return {"name": "twice", "file": file * 2}


@app.task(gpu=True)
def echo(file: Blob) -> object:
    return file


@app.task(gpu=True, autoretry_for=(StoreUnavailable,), max_retries=100, default_retry_delay=0.2, retry_backoff=False)
def patient(file: Blob) -> int:
    return len(file)


@app.task(gpu=Gpu(result="ref"), autoretry_for=(StoreUnavailable,), max_retries=100, default_retry_delay=0.2)
def patient_result(size: int) -> bytes:
    return bytes(size)


@app.task(gpu=Gpu(result="ref"))
def numbers(size: int) -> object:
    return array_module().zeros(size)


@app.task(gpu=True)
def total(values: Numbers) -> float:
    return float(values.sum())


@app.task(gpu=True, soft_time_limit=1)
def soft(file: Blob) -> int:
    return len(file)


@app.task
def on_cpu(file) -> list:
    return [type(file).__name__, len(file)]


@app.task(gpu=True)
def nap(seconds: float) -> None:
    time.sleep(seconds)
