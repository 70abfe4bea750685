"""Pictures in messages: `Image`, a `Blob` that is a PNG or JPEG file; the body gets its pixels on the device.

The driver sees that it is one by its first bytes. Pillow, which only the processes that open pictures load, reads the
header before any pixel is decoded: a small file that would need gigabytes (a decompression bomb) is refused by then.
"""

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy
from celery.exceptions import SoftTimeLimitExceeded

from actors.data.blobs import BlobSpec

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})


@dataclass(frozen=True)
class ImageSpec(BlobSpec):
    """What a picture must be: ``Annotated[Any, ImageSpec(most_pixels=1920 * 1080)]``.

    Args:
        most_bytes: size of the file, at most.
        formats: PNG, JPEG or both.
        most_pixels: width times height, at most; three bytes of memory each, and as `float32` twelve. Above 178,956,970
            Pillow refuses them by itself, unless its `MAX_IMAGE_PIXELS` is raised in the app.
    """

    most_bytes: int | None = 32 << 20
    formats: tuple[str, ...] = ("PNG", "JPEG")
    most_pixels: int = 8192 * 8192
    noun = "picture"

    def __post_init__(self) -> None:
        if not self.formats or not set(self.formats) <= {"PNG", "JPEG"}:
            raise TypeError(f"formats {self.formats}: pictures are PNG, JPEG or both")

    def open(self, source: Any) -> Any:
        """Pixels on this process's device: uint8, shape (height, width, 3), RGB."""
        from actors.executor.device import to_device

        return to_device(self.pixels(source))

    def pixels(self, value: Any) -> "numpy.ndarray[Any, Any]":
        """Pixels in the host's memory, of a picture in any form, for bodies that may be called without a bridge.

        Raises:
            ValueError: no readable 8-bit picture of an allowed format and size.
            DataError: it cannot be had from where it is.
        """
        return numpy.array(decoded(self.file_of(value), self.most_pixels, self.formats))  # Pillow's own is read-only


#: What a task takes that wants a picture of any usual size.
Image = Annotated[Any, ImageSpec()]


def decoded(file: bytes, most_pixels: int, formats: tuple[str, ...] = ("PNG", "JPEG")) -> "Picture":
    """A picture in RGB, turned upright as its EXIF data say.

    Raises:
        ValueError: not a readable 8-bit picture of these formats, or more than `most_pixels`.
        RuntimeError: Pillow is not installed.
    """
    try:
        from PIL import Image as pillow
        from PIL import ImageOps, UnidentifiedImageError
    except ImportError:
        raise RuntimeError("pictures need Pillow where they are opened: pip install 'pillow>=11'") from None

    try:
        with warnings.catch_warnings():
            # Pillow only warns about somewhat too large ones; the bound below says so in its own words.
            warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
            picture: Picture = pillow.open(io.BytesIO(file), formats=formats)
    except SoftTimeLimitExceeded:
        raise
    except pillow.DecompressionBombError as error:
        allowed = min(most_pixels, 2 * (pillow.MAX_IMAGE_PIXELS or most_pixels))  # above that Pillow refuses
        raise ValueError(f"the picture is too large to decode, at most {allowed} pixels: {error}") from error
    except UnidentifiedImageError:
        raise ValueError("the picture cannot be read: its header is broken") from None
    except Exception as error:  # Pillow raises a dozen other types for one
        raise ValueError(f"the picture cannot be read: {error}") from error
    width, height = picture.size
    if width * height > most_pixels:
        raise ValueError(f"the picture has {width} x {height} pixels, at most {most_pixels} are allowed")
    if picture.mode not in _EIGHT_BIT_MODES:
        raise ValueError(f"the picture has pixel format {picture.mode}; send 8 bits per channel")
    try:
        return ImageOps.exif_transpose(picture).convert("RGB")
    except SoftTimeLimitExceeded:
        raise
    except Exception as error:  # and as many for broken pixel data
        raise ValueError(f"the picture cannot be read: {error}") from error
