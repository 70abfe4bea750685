"""Pictures as payloads: what is refused, when, and in which words."""

import base64
import io
import struct
import zlib

import numpy
import pytest
from PIL import Image as pillow
from pydantic import TypeAdapter, ValidationError

from actors.data import blobs
from celery_app.tasks import payloads
from celery_app.tasks.payloads import Image, image_of, open_picture, pixels_of

ADAPTER = TypeAdapter(Image)


def encode(data):
    return base64.b64encode(data).decode()


def png(width, height, data=b"", bit_depth=8, colour=2):
    """A PNG file that claims this size, whatever its data hold."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(picture, file_format="PNG", **options):
    file = io.BytesIO()
    picture.save(file, format=file_format, **options)
    return encode(file.getvalue())


def test_a_good_payload_becomes_pixels():
    assert ADAPTER.validate_python(saved(pillow.new("RGB", (3, 2), "white"))).tolist() == [[[255] * 3] * 3] * 2


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (5, "expected a picture .*found int"),
        ("", "the picture is empty"),
        ("%%%%", "not base64"),
        ("abc", "not base64"),
        ("ünïcode", "not base64"),
        (encode(b"GIF89a"), "neither PNG nor JPEG"),
        (encode(b"II*\0"), "neither PNG nor JPEG"),
    ],
)
def test_a_bad_payload_is_refused_before_any_decoding(bad, reason):
    with pytest.raises(ValidationError, match=reason):
        ADAPTER.validate_python(bad)


def test_a_long_payload_is_refused_by_its_length_alone(monkeypatch):
    monkeypatch.setattr(blobs.base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    long = "A" * (4 * -(-payloads.MAX_IMAGE_BYTES // 3) + 4)
    with pytest.raises(ValidationError, match=r"at most 8\.0 MiB are allowed"):
        ADAPTER.validate_python(long)
    with pytest.raises(ValueError, match=r"at most 8\.0 MiB are allowed"):
        open_picture(long)


@pytest.mark.parametrize("side", [4097, 10_000, 20_000])  # beyond ours, beyond Pillow's warning, beyond Pillow's error
def test_a_decompression_bomb_is_refused_by_its_header(side, monkeypatch):
    monkeypatch.setattr(pillow.Image, "convert", lambda *_: pytest.fail("decoded"))
    bomb = encode(png(side, side))
    assert len(bomb) < 200
    with pytest.raises(ValueError, match=r"at most 16777216 (pixels|are allowed)"):
        open_picture(bomb)


def test_the_largest_size_is_not_called_a_bomb():
    with pytest.raises(ValueError, match="cannot be read"):  # its data are missing, its size is fine
        open_picture(encode(png(4096, 4096)))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_torn_file_is_refused(file_format):
    whole = base64.b64decode(saved(pillow.effect_noise((64, 64), 50), file_format))
    for length in (12, len(whole) // 2):
        with pytest.raises(ValueError, match="the picture cannot be read"):
            open_picture(encode(whole[:length]))


def test_sixteen_bits_per_channel_are_refused_not_cut():
    with pytest.raises(ValueError, match="8 bits per channel"):
        open_picture(encode(png(1, 1, b"\0\1\2", bit_depth=16, colour=0)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA"])
def test_other_pixel_formats_become_rgb(mode):
    picture = open_picture(saved(pillow.new("RGB", (3, 2), "white").convert(mode)))
    assert (picture.mode, picture.size, picture.getpixel((0, 0))) == ("RGB", (3, 2), (255, 255, 255))


def test_a_photograph_taken_upright_is_turned_upright():
    exif = pillow.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    assert open_picture(saved(pillow.new("RGB", (30, 20)), "JPEG", exif=exif)).size == (20, 30)


def test_pixels_there_and_back():
    before = numpy.random.default_rng(5).integers(0, 256, (7, 5, 3), dtype=numpy.uint8)
    pixels = pixels_of(saved(pillow.fromarray(before)))
    assert (pixels.dtype, pixels.shape) == (numpy.float32, (7, 5, 3))
    assert numpy.array_equal(pixels, before.astype(numpy.float32) / 255)
    assert numpy.array_equal(numpy.asarray(open_picture(image_of(pixels))), before)


def test_values_out_of_range_become_black_and_white():
    picture = open_picture(image_of(numpy.array([[[-0.5, 0.5, 1.5]]], dtype=numpy.float32)))
    assert picture.getpixel((0, 0)) == (0, 128, 255)
