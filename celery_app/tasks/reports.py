"""CPU tasks: what stands before and after the GPU in a chain or chord. They run in Celery's own prefork children."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from celery_app.application import app
from celery_app.tasks.payloads import Image, open_picture

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

#: Samples of one signal: as JSON about 20 MB, more than a message should carry.
MAX_SAMPLES = 1_000_000

# The contact sheet's measures, in pixels, and colours.
_CELL = (420, 300)
_MARGIN = 48
_SEAM = 4  # between before and after
_CAPTION = 46
_HEADER = 118
_PAIRS_PER_ROW = 2
_PAPER, _INK, _FAINT, _TAG = "#15171c", "#f2f0ea", "#8d929c", "#000000"


@app.task
def make_signal(
    seconds: float = 1.0,
    sample_rate_hz: float = 1000.0,
    tones_hz: Sequence[float] = (50.0, 120.0),
    noise: float = 0.1,
    seed: int = 0,
) -> list[float]:
    """Samples of a sum of sines of amplitude 1, with Gaussian noise.

    Args:
        seconds: how long.
        sample_rate_hz: samples per second.
        tones_hz: frequencies of the sines.
        noise: standard deviation of the noise.
        seed: of the noise; the same seed gives the same samples.

    Raises:
        ValueError: no samples, more than `MAX_SAMPLES`, or a tone that this sample rate cannot carry.
    """
    samples = seconds * sample_rate_hz
    if not 1 <= samples <= MAX_SAMPLES:
        raise ValueError(
            f"{seconds} s at {sample_rate_hz} Hz are {samples:.0f} samples, 1 to {MAX_SAMPLES} are allowed"
        )
    if too_high := [tone for tone in tones_hz if not 0 <= tone < sample_rate_hz / 2]:
        raise ValueError(f"tones must be 0 to below {sample_rate_hz / 2} Hz at this sample rate, got {too_high}")
    times = numpy.arange(int(samples)) / sample_rate_hz
    signal = noise * numpy.random.default_rng(seed).standard_normal(times.size)
    for tone in tones_hz:
        signal += numpy.sin(2 * math.pi * tone * times)
    values: list[float] = signal.tolist()
    return values


@app.task
def summarise(stats: dict[str, float]) -> str:
    """What `statistics` returned, as one sentence for a person.

    Raises:
        ValueError: `stats` lacks a figure.
    """
    needed = ("count", "min", "max", "mean", "std", "median")
    if missing := [name for name in needed if name not in stats]:
        raise ValueError(f"stats lacks {', '.join(missing)}: pass what `statistics` returns")
    low, high, mean, std, median = (f"{stats[name]:.4g}" for name in needed[1:])
    count = int(stats["count"])
    values = "1 value" if count == 1 else f"{count} values"
    return f"{values} from {low} to {high}: mean {mean}, standard deviation {std}, median {median}"


@app.task
def contact_sheet(
    results: list[Image], originals: list[str], captions: list[str], path: str, title: str = "Before and after"
) -> dict[str, str | int]:
    """A page of before/after pairs, written as PNG: the callback of a chord of picture tasks.

    Args:
        results: the pictures after, as a chord hands them over.
        originals: files of the pictures before, in the same order. Files, because Celery puts a callback's arguments
            into every message of its chord.
        captions: one line per pair.
        path: the file to write, ending in .png; its folder is made. On the machine of the worker, like `originals`.
        title: the page's heading.

    Returns:
        path (absolute), pictures, width and height in pixels, and bytes of the file.

    Raises:
        ValueError: no pictures, lists of different lengths, another ending, or a picture that cannot be read.
        FileNotFoundError: an original is not there.
    """
    if not results:
        raise ValueError("results is empty: a contact sheet needs at least one picture")
    if not len(results) == len(originals) == len(captions):
        raise ValueError(
            f"{len(results)} results, {len(originals)} originals and {len(captions)} captions: not a match"
        )
    target = Path(path).absolute()
    if target.suffix.lower() != ".png":
        raise ValueError(f"path must end in .png, got {target.name}")
    page = _page(results, originals, captions, title)
    target.parent.mkdir(parents=True, exist_ok=True)
    page.save(target, format="PNG", optimize=True)
    return {
        "path": str(target),
        "pictures": len(results),
        "width": page.width,
        "height": page.height,
        "bytes": target.stat().st_size,
    }


def _page(results: list[Image], originals: list[str], captions: list[str], title: str) -> "Picture":
    from PIL import Image as pillow
    from PIL import ImageDraw

    columns = min(_PAIRS_PER_ROW, len(results))
    rows = -(-len(results) // columns)
    pair_width, pair_height = 2 * _CELL[0] + _SEAM, _CELL[1] + _CAPTION
    size = (_MARGIN + columns * (pair_width + _MARGIN), _HEADER + rows * (pair_height + _MARGIN // 2) + _MARGIN // 2)
    page = pillow.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    _header(draw, title, len(results))
    for index, (after, original, caption) in enumerate(zip(results, originals, captions, strict=True)):
        row, column = divmod(index, columns)
        corner = (_MARGIN + column * (pair_width + _MARGIN), _HEADER + row * (pair_height + _MARGIN // 2))
        with pillow.open(original) as before:
            _pair(page, corner, before.convert("RGB"), open_picture(after))
        draw.text((corner[0], corner[1] + _CELL[1] + 12), caption, fill=_INK, font=_font(20))
    return page


def _header(draw: "ImageDraw", title: str, pictures: int) -> None:
    draw.text((_MARGIN, 34), title, fill=_INK, font=_font(38))
    count = "1 photograph" if pictures == 1 else f"{pictures} photographs"
    width = draw.im.size[0]
    draw.text((width - _MARGIN, 52), count, fill=_FAINT, font=_font(20), anchor="ra")


def _pair(page: "Picture", corner: tuple[int, int], before: "Picture", after: "Picture") -> None:
    from PIL import ImageDraw, ImageOps

    draw = ImageDraw.Draw(page)
    left, top = corner
    for picture, name in ((before, "before"), (after, "after")):
        # Cut to one shape, a little above the middle, where faces are.
        page.paste(ImageOps.fit(picture, _CELL, centering=(0.5, 0.4)), (left, top))
        draw.rectangle((left, top + _CELL[1] - 28, left + 72, top + _CELL[1] - 1), fill=_TAG)
        draw.text((left + 36, top + _CELL[1] - 15), name, fill=_INK, font=_font(16), anchor="mm")
        left += _CELL[0] + _SEAM


def _font(size: int) -> "FreeTypeFont | ImageFont":
    from PIL.ImageFont import load_default

    return load_default(size=size)  # comes with Pillow: the page looks the same on every machine
