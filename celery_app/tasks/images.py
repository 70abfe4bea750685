"""GPU tasks on photographs: a PNG or JPEG file in, as base64 or by reference; base64 of a PNG file out.

Inside, a picture is a device array: float32, shape (height, width, 3), RGB in 0..1. Each task decodes once, stays on
the device, and encodes once; `enhance` shows why that matters: three steps, one trip.
"""

from typing import Annotated, Any

from pydantic import Field

from bridge import Gpu, array_module, scipy_module
from celery_app.application import app
from celery_app.tasks.payloads import Image, image_of, pixels_of

Radius = Annotated[int, Field(ge=1, le=4)]
Sigma = Annotated[float, Field(gt=0, le=20)]
Clip = Annotated[float, Field(ge=1, le=20)]
Strength = Annotated[float, Field(ge=0, le=5)]
Side = Annotated[int, Field(ge=1, le=4096)]

#: A grey gradient of 512 x 384 pixels for warm-up: CuPy compiles reductions anew for arrays much larger than before.
_EXAMPLE: Image = (
    "iVBORw0KGgoAAAANSUhEUgAAAgAAAAGACAAAAAD+S4VjAAACiklEQVR42u3SAQ0AAAjDsB//orFBQjcLbVI/fqLXAQCAABAAAkAACAABIAAEgAAQ"
    "AAJAAAgAASAABIAAEAACQAAIAAEgAASAABAAAkAACAABIAAEgAAQAAJAAAgAASAABIAAEAACQAAIAAEgAASAABAAAkAACAABIAAEgAAQAAJAAAgA"
    "ASAABIAAEAACQAAIAAEgAASAABAAAkAACAABIAAEgAAQAAJAAAgAAASAABAAAkAACAABIAAEgAAQAAJAAAgAASAABIAAEAACQAAIAAEgAASAABAA"
    "AkAACAABIAAEgAAQAAJAAAgAASAABIAAEAACQAAIAAEgAASAABAAAkAACAABIAAEgAAQAAJAAAgAASAABIAAEAACQAAIAAEgAASAABAAAkAACAAB"
    "IAAEgAAQAAJAAAAgAASAABAAAkAACAABIAAEgAAQAAJAAAgAASAABIAAEAACQAAIAAEgAASAABAAAkAACAABIAAEgAAQAAJAAAgAASAABIAAEAAC"
    "QAAIAAEgAASAABAAAkAACAABIAAEgAAQAAJAAAgAASAABIAAEAACQAAIAAEgAASAABAAAkAACAABIAAEgAAQAAIAAAEgAASAABAAAkAACAABIAAE"
    "gAAQAAJAAAgAASAABIAAEAACQAAIAAEgAASAABAAAkAACAABIAAEgAAQAAJAAAgAASAABIAAEAACQAAIAAEgAASAABAAAkAACAABIAAEgAAQAAJA"
    "AAgAASAABIAAEAACQAAIAAEgAASAABAAAkAACAABIAAEgAAQAAAIAAEgAASAABAAAkAACAABIAAEgAAQAAJAAAgAASAABIAAEAACQAAIAAEgAASA"
    "ABAAAkAACAABIAAEgK61MK4D/yLBZGgAAAAASUVORK5CYII="
)
#: Rec. 709 weights of red, green and blue in luminance.
_LUMINANCE = (0.2126, 0.7152, 0.0722)
#: Brightness levels of a histogram; 8-bit pictures have no more.
_LEVELS = 256
#: Tiles along each side of a picture in `equalise`: the usual number, about a face's size in a portrait.
_TILES = 8
#: A pixel gets at most this many times brighter in `equalise`, else noise in deep shadow becomes coloured spots.
_MAX_GAIN = 4.0


@app.task(gpu=Gpu(example=(_EXAMPLE,)))
def denoise(image: Image, radius: Radius = 1) -> Image:
    """Each channel's median over a square of 2 * radius + 1 pixels: removes specks, keeps edges.

    Raises:
        ValueError: a picture that cannot be read.
    """
    return image_of(_denoised(pixels_of(image), radius))


@app.task(gpu=Gpu(example=(_EXAMPLE,)))
def edges(image: Image, sigma: Sigma = 1.0) -> Image:
    """Where brightness changes: grey, the strongest edge of the picture white, flat areas black.

    Args:
        image: the picture.
        sigma: pixels of Gaussian smoothing before, which decides how fine an edge may be.

    Raises:
        ValueError: a picture that cannot be read.
    """
    xp, ndimage = array_module(), scipy_module("ndimage")
    smooth = ndimage.gaussian_filter(_luminance(pixels_of(image)), sigma)
    slope = xp.hypot(ndimage.sobel(smooth, axis=0), ndimage.sobel(smooth, axis=1))
    strongest = xp.maximum(slope.max(), 1e-6)  # a flat picture has none
    return image_of(xp.repeat((slope / strongest)[:, :, None], 3, axis=2))


@app.task(gpu=Gpu(example=(_EXAMPLE,)))
def equalise(image: Image, clip: Clip = 2.0) -> Image:
    """Local contrast, by contrast-limited adaptive histogram equalisation (CLAHE) of luminance; hues stay.

    Args:
        image: the picture.
        clip: how many times its even share one brightness may count; 1 changes little, 20 is close to unlimited.

    Raises:
        ValueError: a picture that cannot be read.

    Source: K. Zuiderveld, "Contrast limited adaptive histogram equalization", Graphics Gems IV, 1994.
    """
    return image_of(_equalised(pixels_of(image), clip))


@app.task(gpu=Gpu(example=(_EXAMPLE, 256, 192)))
def resize(image: Image, width: Side, height: Side) -> Image:
    """The picture at another size in pixels, by cubic splines; smoothed first where it shrinks, against moiré.

    Raises:
        ValueError: a picture that cannot be read, or a side below 1.
    """
    if width < 1 or height < 1:
        raise ValueError(f"width and height must be 1 or more, got {width} x {height}")
    return image_of(_resized(pixels_of(image), width, height))


@app.task(gpu=Gpu(example=(_EXAMPLE,)))
def enhance(image: Image, radius: Radius = 1, clip: Clip = 2.0, sharpness: Strength = 0.6) -> Image:
    """Denoised, locally equalised and sharpened, in one visit to the device.

    Args:
        image: the picture.
        radius: of `denoise`, in pixels.
        clip: of `equalise`.
        sharpness: how much of the finest detail is added once more; 0 adds none.

    Raises:
        ValueError: a picture that cannot be read.
    """
    return image_of(_sharpened(_equalised(_denoised(pixels_of(image), radius), clip), sharpness))


def _denoised(pixels: Any, radius: int) -> Any:
    side = 2 * radius + 1
    return scipy_module("ndimage").median_filter(pixels, size=(side, side, 1))


def _sharpened(pixels: Any, strength: float) -> Any:
    detail = pixels - scipy_module("ndimage").gaussian_filter(pixels, sigma=(1.2, 1.2, 0))
    return array_module().clip(pixels + strength * detail, 0, 1)


def _luminance(pixels: Any) -> Any:
    red, green, blue = _LUMINANCE
    return red * pixels[:, :, 0] + green * pixels[:, :, 1] + blue * pixels[:, :, 2]


def _equalised(pixels: Any, clip: float) -> Any:
    xp, ndimage = array_module(), scipy_module("ndimage")
    height, width, _ = pixels.shape
    luminance = _luminance(pixels)
    curves = _tone_curves(luminance, clip)  # one per tile: tiles down x tiles across x brightness levels
    down, across, _ = curves.shape
    # One lookup blends the curves of the four nearest tiles and the two nearest levels, so no tile border shows.
    where = xp.stack(
        [
            xp.broadcast_to(((xp.arange(height) + 0.5) * down / height - 0.5)[:, None], luminance.shape),
            xp.broadcast_to(((xp.arange(width) + 0.5) * across / width - 0.5)[None, :], luminance.shape),
            luminance * (_LEVELS - 1),
        ]
    )
    wanted = ndimage.map_coordinates(curves, where, order=1, mode="nearest")
    gain = xp.minimum(wanted / xp.maximum(luminance, 1 / _LEVELS), _MAX_GAIN)
    return xp.clip(pixels * gain[:, :, None], 0, 1)


def _tone_curves(luminance: Any, clip: float) -> Any:
    """For each tile of a (height, width) picture, the new brightness of each level: 0..1, (down, across, levels)."""
    xp = array_module()
    height, width = luminance.shape
    down, across = min(_TILES, height), min(_TILES, width)  # each tile has a pixel
    row = xp.arange(height) * down // height
    column = xp.arange(width) * across // width
    tile = row[:, None] * across + column[None, :]
    level = (luminance * (_LEVELS - 1) + 0.5).astype(xp.int64)
    counts = xp.bincount((tile * _LEVELS + level).ravel(), minlength=down * across * _LEVELS)
    share = counts.reshape(down, across, _LEVELS).astype(xp.float32)
    share /= share.sum(axis=2, keepdims=True)
    limited = xp.minimum(share, clip / _LEVELS)
    limited += (share - limited).sum(axis=2, keepdims=True) / _LEVELS  # what was cut off goes to all levels alike
    return xp.cumsum(limited, axis=2) - limited / 2


def _resized(pixels: Any, width: int, height: int) -> Any:
    xp, ndimage = array_module(), scipy_module("ndimage")
    old_height, old_width, _ = pixels.shape
    # scikit-image's rule for how much to smooth before shrinking.
    sigma = [max(0.0, (old / new - 1) / 2) for old, new in ((old_height, height), (old_width, width))]
    smooth = ndimage.gaussian_filter(pixels, sigma=(*sigma, 0))
    rows = (xp.arange(height) + 0.5) * old_height / height - 0.5
    columns = (xp.arange(width) + 0.5) * old_width / width - 0.5
    where = xp.stack(xp.meshgrid(rows, columns, indexing="ij"))
    # Not `zoom`: cupyx compiles one kernel per output size for it, and none for coordinates.
    channels = [ndimage.map_coordinates(smooth[:, :, c], where, order=3, mode="nearest") for c in range(3)]
    return xp.clip(xp.stack(channels, axis=2), 0, 1)
