"""What travels in messages, and its way onto the device and back.

The types are what the bridge's driver checks arguments against before any GPU is touched. A plain Celery worker checks
nothing, so the functions here repeat what a body cannot do without. Numbers stay what JSON made of them (lists): a body
gets the same with and without the bridge. A picture is opened by the bridge, or by `pixels_of` where there is none.
"""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from bridge import array_module
from bridge.data import ImageSpec

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: Bytes of one picture file; a 4096 x 4096 photograph as JPEG fits, and Redis and JSON still carry it well.
MAX_IMAGE_BYTES = 8 * 1024 * 1024
#: Pixels of one decoded picture (4096 x 4096): 192 MiB as float32 RGB, so a few copies fit on any GPU.
MAX_PIXELS = 4096 * 4096

Finite = Annotated[float, Field(allow_inf_nan=False)]
Numbers = Annotated[list[Finite], Field(min_length=1)]
Vector = Annotated[list[Finite], Field(min_length=1)]
Matrix = Annotated[list[Vector], Field(min_length=1)]
_PICTURE = ImageSpec(MAX_IMAGE_BYTES, most_pixels=MAX_PIXELS)
Image = Annotated[Any, _PICTURE]


def vector_of(values: Sequence[float], name: str) -> Any:
    """`values` as a float64 array of shape (n,) on the device.

    Raises:
        ValueError: no values; the text uses `name`.
    """
    if not values:
        raise ValueError(f"{name} is empty: at least one number is needed")
    xp = array_module()
    return xp.asarray(values, dtype=xp.float64)


def matrix_of(rows: Sequence[Sequence[float]], name: str) -> Any:
    """`rows` as a float64 array of shape (rows, columns) on the device.

    Raises:
        ValueError: no rows, empty rows, or rows of different lengths; the text uses `name`.
    """
    if not rows or not rows[0]:
        raise ValueError(f"{name} is empty: at least one row with one number is needed")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise ValueError(f"{name} has rows of different lengths: {min(lengths)} to {max(lengths)}")
    xp = array_module()
    return xp.asarray(rows, dtype=xp.float64)


def open_picture(image: Image) -> "Picture":
    """A payload as a Pillow picture in RGB, turned upright as its EXIF data say.

    Raises:
        ValueError: not a readable 8-bit PNG or JPEG of at most `MAX_IMAGE_BYTES` and `MAX_PIXELS`.
        DataError: it came by reference and cannot be had.
    """
    from PIL import Image as pillow

    return pillow.fromarray(_PICTURE.pixels(image))


def pixels_of(image: Image) -> Any:
    """A payload as pixels on the device: float32, shape (height, width, 3), RGB in 0..1.

    Raises:
        ValueError, DataError: as `open_picture`; the bridge has opened the picture by then.
    """
    xp = array_module()
    # Bytes travel to the device and become floats there: a quarter of the transfer.
    pixels = image if hasattr(image, "dtype") else xp.asarray(_PICTURE.pixels(image))
    return pixels.astype(xp.float32) / 255


def image_of(pixels: Any) -> str:
    """Pixels of shape (height, width, 3) in 0..1, from either device, as base64 of a PNG file."""
    from PIL import Image as pillow

    xp = array_module()
    whole = xp.clip(pixels * 255 + 0.5, 0, 255).astype(xp.uint8)
    on_host = whole.get() if hasattr(whole, "get") else whole  # CuPy's way to NumPy
    file = io.BytesIO()
    # Level 1: the default takes five times as long for files a tenth smaller, and the GPU waits meanwhile.
    pillow.fromarray(on_host).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode("ascii")
