"""What travels in messages, and its way onto the device and back.

The types are what the bridge's driver checks arguments against before any GPU is touched. A plain Celery worker checks
nothing, so the functions here repeat what a body cannot do without. Payloads stay what JSON made of them (lists,
numbers, strings): a body gets the same with and without the bridge.
"""

import base64
import binascii
import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy
from pydantic import AfterValidator, Field, StringConstraints

from bridge import array_module

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: Bytes of one picture file; a 4096 x 4096 photograph as JPEG fits, and Redis and JSON still carry it well.
MAX_IMAGE_BYTES = 8 * 1024 * 1024
#: The same as base64, which turns 3 bytes into 4 characters.
MAX_IMAGE_CHARACTERS = 4 * -(-MAX_IMAGE_BYTES // 3)
#: Pixels of one decoded picture (4096 x 4096): 192 MiB as float32 RGB, so a few copies fit on any GPU.
MAX_PIXELS = 4096 * 4096

_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")  # how PNG and JPEG files begin
_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})


def check_image(image: str) -> str:
    """The payload itself, when it is base64 of a PNG or JPEG file that is not too large. Decodes no pixels.

    Raises:
        ValueError: it is not; the text says what is wrong and never repeats the payload.
    """
    _file_of(image)
    return image


Finite = Annotated[float, Field(allow_inf_nan=False)]
Numbers = Annotated[list[Finite], Field(min_length=1)]
Vector = Annotated[list[Finite], Field(min_length=1)]
Matrix = Annotated[list[Vector], Field(min_length=1)]
Image = Annotated[str, StringConstraints(max_length=MAX_IMAGE_CHARACTERS), AfterValidator(check_image)]


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


def open_picture(image: str) -> "Picture":
    """A payload as a Pillow picture in RGB, turned upright as its EXIF data say.

    Raises:
        ValueError: not a readable 8-bit PNG or JPEG, or more than `MAX_PIXELS` pixels. Its header is read first, so a
            decompression bomb is refused before it takes memory.
    """
    from PIL import Image as pillow
    from PIL import ImageOps

    data = _file_of(image)
    try:
        with warnings.catch_warnings():
            # Pillow only warns about somewhat too large ones; the limit below is lower and says so in its own words.
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
            picture: Picture = pillow.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    except pillow.DecompressionBombError as error:
        raise ValueError(f"the picture is too large to decode, at most {MAX_PIXELS} pixels: {error}") from error
    except Exception as error:  # Pillow raises a dozen types for a broken header
        raise ValueError(f"the picture cannot be read: {error}") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"the picture has {picture.width} x {picture.height} pixels, at most {MAX_PIXELS} are allowed")
    if picture.mode not in _EIGHT_BIT_MODES:
        raise ValueError(f"the picture has pixel format {picture.mode}; send 8 bits per channel")
    try:
        return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # and as many for broken pixel data
        raise ValueError(f"the picture cannot be read: {error}") from error


def pixels_of(image: str) -> Any:
    """A payload as pixels on the device: float32, shape (height, width, 3), RGB in 0..1.

    Raises:
        ValueError: as `open_picture`.
    """
    xp = array_module()
    # Bytes travel to the device and become floats there: a quarter of the transfer.
    return xp.asarray(numpy.asarray(open_picture(image))).astype(xp.float32) / 255


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


def _file_of(image: str) -> bytes:
    if not image:
        raise ValueError("the picture is empty")
    if len(image) > MAX_IMAGE_CHARACTERS:
        raise ValueError(f"the picture has {len(image)} base64 characters, at most {MAX_IMAGE_CHARACTERS} are allowed")
    try:
        data = base64.b64decode(image, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the picture is not base64: {error}") from error
    if not data.startswith(_SIGNATURES):
        raise ValueError("the picture is neither PNG nor JPEG")
    return data
