"""Picture tasks against plain loops over pixels: slow, and independent of SciPy."""

import base64
import io

import numpy
import pytest
from PIL import Image as pillow

from actors.data.pictures import ImageSpec
from celery_app.tasks.images import _equalised, _resized, denoise, edges, enhance, equalise, resize


def payload(pixels, file_format="PNG"):
    file = io.BytesIO()
    pillow.fromarray(numpy.asarray(pixels, dtype=numpy.uint8)).save(file, format=file_format)
    return base64.b64encode(file.getvalue()).decode()


def pixels_of(result):
    assert type(result) is str
    picture = pillow.open(io.BytesIO(base64.b64decode(result)))
    assert (picture.format, picture.mode) == ("PNG", "RGB")
    return numpy.asarray(picture).astype(int)


def photograph(height=40, width=56):
    """Smooth shapes with some texture, dark on one side, as uint8 RGB."""
    y, x = numpy.mgrid[0:height, 0:width] / 10
    shapes = numpy.stack([numpy.sin(x) * numpy.cos(y), numpy.sin(y + 1), numpy.cos(x - y)], axis=2)
    shade = (0.3 + 0.5 * x / x.max())[:, :, None]
    grain = numpy.random.default_rng(4).normal(0, 4, shapes.shape)
    return ((shapes * 0.4 + 0.5) * shade * 255 + grain).clip(0, 255).astype(numpy.uint8)


def gaussian(plane, sigma):
    """A Gaussian blur of one plane by an explicit kernel, edges mirrored."""
    radius = int(4 * sigma + 0.5)
    weights = numpy.exp(-(numpy.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    for axis in (0, 1):
        padded = numpy.pad(plane, [(radius, radius) if axis == a else (0, 0) for a in (0, 1)], mode="symmetric")
        plane = numpy.apply_along_axis(numpy.convolve, axis, padded, weights, mode="valid")
    return plane


def luminance(pixels):
    return pixels @ numpy.array([0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("radius", [1, 2])
def test_denoise_is_the_median_of_each_channel(radius):
    before = photograph()
    padded = numpy.pad(before, [(radius, radius), (radius, radius), (0, 0)], mode="symmetric")
    side = 2 * radius + 1
    expected = numpy.empty(before.shape, int)
    for y in range(before.shape[0]):
        for x in range(before.shape[1]):
            expected[y, x] = numpy.median(padded[y : y + side, x : x + side], axis=(0, 1))
    assert numpy.array_equal(pixels_of(denoise(payload(before), radius)), expected)


def test_denoise_removes_specks_and_keeps_an_edge():
    clean = numpy.zeros((20, 20, 3))
    clean[:, 10:] = 200
    speckled = clean.copy()
    speckled[5, 5] = speckled[12, 3] = 255
    assert numpy.array_equal(pixels_of(denoise(payload(speckled))), clean)


def test_edges_are_the_slope_of_smoothed_luminance():
    before = photograph()
    smooth = gaussian(luminance(before / 255), 1.5)
    padded = numpy.pad(smooth, 1, mode="symmetric")
    across = padded[:, 2:] - padded[:, :-2]
    down = padded[2:] - padded[:-2]
    across = across[:-2] + 2 * across[1:-1] + across[2:]
    down = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    slope = numpy.hypot(across, down)
    after = pixels_of(edges(payload(before), 1.5))
    assert numpy.abs(after[:, :, 0] - slope / slope.max() * 255).max() <= 1
    assert numpy.array_equal(after[:, :, 0], after[:, :, 2])


def test_a_flat_picture_has_no_edges():
    assert pixels_of(edges(payload(numpy.full((9, 9, 3), 130)))).max() == 0


def test_equalise_blends_the_clipped_tone_curves_of_the_four_nearest_tiles():
    before, clip = photograph(), 2.0
    height, width, _ = before.shape
    grey = luminance(before / 255.0)
    level = numpy.floor(grey * 255 + 0.5).astype(int)
    curves = numpy.empty((8, 8, 256))
    for i in range(8):
        for j in range(8):
            inside = (numpy.arange(height) * 8 // height == i)[:, None] & (numpy.arange(width) * 8 // width == j)
            share = numpy.array([(level[inside] == number).mean() for number in range(256)])
            cut = numpy.minimum(share, clip / 256)
            cut = cut + (share - cut).sum() / 256
            curves[i, j] = numpy.cumsum(cut) - cut / 2
    expected = numpy.empty(before.shape)
    for y in range(height):
        for x in range(width):
            wanted = trilinear(curves, (y + 0.5) / height * 8 - 0.5, (x + 0.5) / width * 8 - 0.5, grey[y, x] * 255)
            expected[y, x] = before[y, x] * min(wanted / max(grey[y, x], 1 / 256), 4)
    difference = numpy.abs(pixels_of(equalise(payload(before), clip)) - expected.clip(0, 255))
    assert difference.max() <= 1


def trilinear(table, *position):
    total = 0.0
    floors = [int(numpy.floor(p)) for p in position]
    for corner in numpy.ndindex(2, 2, 2):
        weight, index = 1.0, []
        for p, floor, step, size in zip(position, floors, corner, table.shape, strict=True):
            weight *= (p - floor) if step else 1 - (p - floor)
            index.append(min(max(floor + step, 0), size - 1))
        total += weight * table[tuple(index)]
    return total


def test_equalise_raises_contrast_and_keeps_hues():
    before = (photograph(64, 64) * 0.3 + 20).astype(numpy.uint8)
    after = pixels_of(equalise(payload(before), 3.0))
    assert local_contrast(after) > 1.5 * local_contrast(before)
    bright = before.min(axis=2) > 20
    hue_before = before[bright] / before[bright].sum(axis=1, keepdims=True)
    hue_after = after[bright] / after[bright].sum(axis=1, keepdims=True)
    assert numpy.abs(hue_before - hue_after).max() < 0.02


def local_contrast(pixels):
    blocks = luminance(pixels).reshape(8, 8, 8, 8).swapaxes(1, 2)
    return blocks.std(axis=(2, 3)).mean()


def test_equalise_at_most_quadruples_brightness():
    before = numpy.full((32, 32, 3), 4)
    assert pixels_of(equalise(payload(before), 20.0)).max() <= 16


def test_resize_to_the_same_size_changes_nothing():
    before = photograph()
    assert numpy.array_equal(pixels_of(resize(payload(before), 56, 40)), before)


@pytest.mark.parametrize(("width", "height"), [(112, 80), (90, 33), (28, 20), (1, 1), (56, 7)])
def test_resize_gives_the_size_asked_for_and_keeps_the_mean(width, height):
    before = photograph()
    after = pixels_of(resize(payload(before), width, height))
    assert after.shape == (height, width, 3)
    assert after.mean(axis=(0, 1)) == pytest.approx(before.mean(axis=(0, 1)), abs=4)


def test_enlarging_agrees_with_pillow_on_a_smooth_picture():
    y, x = numpy.mgrid[0:30, 0:40]
    before = numpy.stack([120 + 100 * numpy.sin(x / 9), 3 * x + 4 * y, 120 + 100 * numpy.cos(y / 7)], axis=2)
    before = before.clip(0, 255).astype(numpy.uint8)
    expected = numpy.asarray(pillow.fromarray(before).resize((120, 90), pillow.Resampling.BICUBIC)).astype(int)
    assert numpy.abs(pixels_of(resize(payload(before), 120, 90)) - expected)[6:-6, 6:-6].max() <= 3


def test_shrinking_a_fine_chessboard_gives_grey_not_moire():
    board = (numpy.indices((60, 60)).sum(axis=0) % 2 * 255)[:, :, None].repeat(3, axis=2)
    after = pixels_of(resize(payload(board), 17, 17))
    assert numpy.abs(after - 127.5).max() < 16


def test_resize_is_centred():
    before = photograph().astype(numpy.float32) / 255
    assert numpy.allclose(_resized(before[::-1, ::-1], 23, 19), _resized(before, 23, 19)[::-1, ::-1], atol=1e-5)


def test_enhance_is_median_then_equalisation_then_sharpening():
    before = photograph()
    quiet = pixels_of(denoise(payload(before), 1)) / 255
    even = _equalised(quiet.astype(numpy.float32), 2.5)
    blurred = numpy.stack([gaussian(even[:, :, c], 1.2) for c in range(3)], axis=2)
    expected = (even + 0.8 * (even - blurred)).clip(0, 1) * 255
    after = pixels_of(enhance(payload(before), radius=1, clip=2.5, sharpness=0.8))
    assert numpy.abs(after - expected).max() <= 1


def test_without_sharpness_enhance_is_the_two_other_tasks():
    before = payload(photograph())
    assert pixels_of(enhance(before, sharpness=0)) == pytest.approx(pixels_of(equalise(denoise(before))), abs=1)


@pytest.mark.parametrize("task", [denoise, edges, equalise, enhance])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 2), (7, 7)])
def test_tiny_pictures_keep_their_size(task, shape):
    before = numpy.random.default_rng(6).integers(0, 256, (*shape, 3))
    assert pixels_of(task(payload(before))).shape == (*shape, 3)


@pytest.mark.parametrize("task", [denoise, edges, equalise, enhance])
def test_jpeg_is_taken_too(task):
    assert pixels_of(task(payload(photograph(), "JPEG"))).shape == (40, 56, 3)


@pytest.mark.parametrize("call", [denoise, lambda image: denoise.apply((image,)).get()], ids=["called", "eager"])
def test_each_form_gives_the_same_picture_without_a_bridge_too(call):
    text = payload(photograph())
    file = base64.b64decode(text)
    for form in (file, bytearray(file), {"kind": "bytes", "data": text}, ImageSpec().pixels(text)):
        assert call(form) == denoise(text)


@pytest.mark.parametrize("task", [denoise, edges, equalise, enhance, lambda image: resize(image, 4, 4)])
@pytest.mark.parametrize(
    ("bad", "reason"), [("", "empty"), ("%%%%", "not base64"), ("aGVsbG8=", "neither PNG nor JPEG")]
)
def test_what_is_no_picture_is_refused(task, bad, reason):
    with pytest.raises(ValueError, match=reason):
        task(bad)


def test_resize_to_nothing_is_refused():
    with pytest.raises(ValueError, match="width and height must be 1 or more, got 0 x 5"):
        resize(payload(photograph()), 0, 5)
