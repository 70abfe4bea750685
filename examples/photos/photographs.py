"""Photographs that come inside scikit-image's wheel, so that the demo needs no network."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from PIL import Image

#: Pixels of a photograph's longer side as it is sent: about 100 KB as base64 in a JSON message.
LONGEST_SIDE = 512


class Photograph(NamedTuple):
    """A file of the wheel, and what it shows."""

    file: str
    caption: str


PHOTOGRAPHS = (
    Photograph("chelsea.png", "Chelsea the cat"),
    Photograph("coffee.png", "A cup of coffee"),
    Photograph("astronaut.png", "Eileen Collins, astronaut"),
    Photograph("motorcycle_left.png", "A motorcycle, from a stereo pair"),
    Photograph("rocket.jpg", "A rocket at dusk"),
    Photograph("retina.jpg", "A human retina"),
    Photograph("camera.png", "A photographer"),
    Photograph("moon.png", "The surface of the moon"),
)


def write_photographs(folder: Path) -> list[Path]:
    """Write each photograph as a JPEG of at most `LONGEST_SIDE` pixels into `folder`; returns the files in order.

    Raises:
        FileNotFoundError: scikit-image is not installed, or its wheel no longer holds a photograph.
    """
    source = _data_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_small(source / photograph.file, folder) for photograph in PHOTOGRAPHS]


def _write_small(original: Path, folder: Path) -> Path:
    target = folder / original.with_suffix(".jpg").name
    with Image.open(original) as picture:
        small = picture.convert("RGB")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    small.save(target, quality=92)
    return target


def _data_folder() -> Path:
    found = find_spec("skimage")
    if found is None or found.origin is None:
        raise FileNotFoundError("scikit-image is not installed: pip install 'celery-gpu-bridge[demo]'")
    return Path(found.origin).parent / "data"
