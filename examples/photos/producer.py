"""The producer: any program with Celery and the broker's URL. It knows tasks by name, and nothing of the bridge."""

import base64
import random
from collections.abc import Sequence
from pathlib import Path

from celery import Celery, chord
from celery.result import AsyncResult

ENHANCE = "celery_app.tasks.images.enhance"
CONTACT_SHEET = "celery_app.tasks.reports.contact_sheet"
NORMALISE = "celery_app.tasks.vectors.normalise"

GPU_QUEUE, CPU_QUEUE = "gpu", "celery"


def connect(url: str) -> Celery:
    """A Celery app that only sends and reads results; `url` is both the broker and the result backend."""
    return Celery("photos", broker=url, backend=url, set_as_current=False)


def send_photographs(app: Celery, files: Sequence[Path], captions: Sequence[str], sheet: Path) -> AsyncResult:
    """Enhance each file on a GPU, then have a CPU task write the contact sheet; returns that last task's result."""
    header = [
        app.signature(ENHANCE, args=[base64.b64encode(file.read_bytes()).decode()], queue=GPU_QUEUE) for file in files
    ]
    callback = app.signature(
        CONTACT_SHEET,
        kwargs={
            "originals": [str(file.absolute()) for file in files],
            "captions": captions,
            "path": str(sheet.absolute()),
        },
        queue=CPU_QUEUE,
    )
    return chord(header, app=app)(callback)


def send_vectors(app: Celery, count: int, dimension: int = 64) -> list[AsyncResult]:
    """One task for each of `count` vectors, as `count` separate callers would send them."""
    numbers = random.Random(count)
    return [
        app.send_task(NORMALISE, args=[[numbers.gauss(0, 1) for _ in range(dimension)]], queue=GPU_QUEUE)
        for _ in range(count)
    ]
