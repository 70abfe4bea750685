"""`python -m benchmarks.photos`: photographs, denoised, equalised and sharpened by `celery_app`'s pipeline."""

import base64
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from benchmarks import real
from benchmarks.run import main
from examples.photos.photographs import write_photographs

TASK = "celery_app.tasks.images.enhance"


@cache
def photographs() -> list[str]:
    """The demo's photographs as base64 of JPEG files, about 100 KB each."""
    with tempfile.TemporaryDirectory() as folder:
        return [base64.b64encode(file.read_bytes()).decode() for file in write_photographs(Path(folder))]


class Photos(real.RealWork):
    """The image pipeline; every device computes the same."""

    name = "photos"
    title = "Photographs: denoised, equalised, sharpened"
    task = TASK
    approaches = real.approaches(TASK)
    sizes = {"rounds": (5, 2, 5), "tasks": (24, 3, 48), "calls": (8, 1, 16)}

    def payloads(self) -> Sequence[object]:
        """Eight pictures."""
        return photographs()


if __name__ == "__main__":
    sys.exit(main(Photos()))
