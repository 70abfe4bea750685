"""What a task takes that wants a file or a picture: forms, sizes, formats; who opens it, and what nobody repeats."""

import base64
import io
import pickle
from typing import Annotated, Any

import numpy
import pytest
from celery.exceptions import SoftTimeLimitExceeded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as pillow
from pydantic import BaseModel, TypeAdapter, ValidationError

from actors import unopened
from actors.data import arrays, pictures
from actors.data.blobs import SIGNATURES, Blob, BlobRef, BlobSpec, InlineBytes
from actors.data.pictures import Image, ImageSpec
from actors.unopened import Unopened

FILE = b"%PDF-1.7 and more"
TEXT = base64.b64encode(FILE).decode()
ANY = TypeAdapter(Blob)
PDF = TypeAdapter(Annotated[bytes, BlobSpec(most_bytes=20, formats=("PDF",))])
REF = {"kind": "blob", "url": "redis:" + "a" * 32, "size_bytes": 17}


@pytest.fixture
def driver(monkeypatch):
    """A process that passes on, and has no store."""
    monkeypatch.setattr(arrays, "passes_on", True)
    monkeypatch.setattr(arrays, "opener", lambda *_: pytest.fail("opened"))


@pytest.fixture
def stored(monkeypatch):
    """A process with a store; what was asked of it."""
    asked = []
    monkeypatch.setattr(arrays, "opener", lambda ref, most_bytes: (asked.append((ref.url, most_bytes)), FILE)[1])
    return asked


def png(*size, mode="RGB"):
    file = io.BytesIO()
    pillow.new(mode, size, "white").save(file, "PNG")
    return file.getvalue()


PNG = png(3, 2)


@pytest.mark.parametrize("value", [FILE, bytearray(FILE), memoryview(FILE), TEXT, {"kind": "bytes", "data": TEXT}])
def test_bytes_inside_a_message(value):
    assert ANY.validate_python(value) == FILE == PDF.validate_python(value)


@given(data=st.binary(max_size=200))
def test_every_inline_form_is_the_same_bytes(data):
    text = base64.b64encode(data).decode()
    for form in (data, text, InlineBytes.of(data), InlineBytes.of(data).model_dump()):
        assert ANY.validate_python(form) == data
    assert ANY.validate_json(ANY.dump_json(data)) == data


@given(data=st.binary(min_size=1, max_size=40), most=st.integers(1, 40))
def test_the_size_of_base64_is_known_before_it_is_decoded(data, most):
    adapter = TypeAdapter(Annotated[bytes, BlobSpec(most_bytes=most)])
    text = base64.b64encode(data).decode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "passes_on", True)
        if len(data) <= most:
            assert isinstance(adapter.validate_python(text), Unopened)
        else:
            with pytest.raises(ValidationError, match="are allowed"):
                adapter.validate_python(text)


@pytest.mark.parametrize("value", [REF, BlobRef(**REF), "https://files.example.com/a.pdf"])
def test_bytes_elsewhere(stored, value):
    assert PDF.validate_python(value) == FILE
    assert stored[0][1] == 20  # no more is read


def test_the_driver_opens_nothing(driver):
    for value in (FILE, TEXT, REF, "https://files.example.com/a.pdf", {"kind": "bytes", "data": TEXT}):
        found = PDF.validate_python(value)
        assert isinstance(found, Unopened) and "PDF" not in repr(found) and TEXT not in repr(found)
        unopened.forget_found()
        pickle.loads(pickle.dumps([found]))
        assert len(unopened.take_found()) == 1


WRONG = {
    "an int": (5, r"expected a file \(base64, bytes or a reference\), found int"),
    "a list": ([1, 2], "found list"),
    "an array": ({"kind": "npy", "data": ""}, "found Inline"),
    "another kind": ({"kind": "door"}, "its kind must be one of npy, ref, .*bytes, blob"),
    "no kind": ({"data": TEXT}, "its kind must be one of"),
    "no base64": ("§§§§", "the file is not base64"),
    "empty": ("", "the file is empty"),
    "too large": (FILE + b"    ", "the file has 21 B, at most 20 B are allowed"),
    "too large as base64": (base64.b64encode(FILE + b"    ").decode(), "the file has 21 B, at most 20 B"),
    "too large elsewhere": ({**REF, "size_bytes": 21}, "the file has 21 B, at most 20 B"),
    "another format": (b"%PNG", "the file is no PDF"),
    "another format as base64": (base64.b64encode(b"%PNG").decode(), "the file is no PDF"),
    "a negative size": ({**REF, "size_bytes": -1}, "size_bytes"),
    "an address": ({**REF, "host": "elsewhere"}, "host: Extra inputs"),
    "a long URL": ("https://" + "a" * 3000, "2048"),
}


@pytest.mark.parametrize("where", ["driver", "elsewhere"])
@pytest.mark.parametrize(("value", "text"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_told_without_repeating_it(request, where, value, text):
    if where == "driver":
        request.getfixturevalue("driver")
    with pytest.raises(ValidationError, match=text) as caught:
        PDF.validate_python(value)
    assert all(secret not in each["msg"] for secret in (TEXT, "§") for each in caught.value.errors())


def test_what_only_the_bytes_tell_is_told_when_they_are_opened(driver, monkeypatch):
    monkeypatch.setattr(arrays, "opener", lambda *_: b"GIF89a")
    for value, text in (({**REF, "size_bytes": None}, "is no PDF"), (TEXT[:16] + "§" * 4, "not base64")):
        with pytest.raises(ValueError, match=text):
            PDF.validate_python(value).open()


def test_what_is_used_once_is_noted(driver):
    arrays.seen.clear()
    PDF.validate_python({**REF, "once": True})
    assert [ref.url for ref in arrays.seen] == [REF["url"]]
    arrays.seen.clear()


def test_models_hold_files(driver):
    class Letter(BaseModel):
        file: Blob
        picture: Image

    letter = Letter(file=TEXT, picture=png(2, 2))
    assert isinstance(letter.file, Unopened) and isinstance(letter.picture, Unopened)


@pytest.mark.parametrize("make", [lambda: BlobSpec(formats=("EXE",)), lambda: ImageSpec(formats=("GIF",))])
def test_unknown_formats_fail_where_they_are_declared(make):
    with pytest.raises(TypeError, match="formats"):
        make()


def test_signatures_know_real_files():
    made = {}
    for name in ("PNG", "JPEG", "GIF", "WebP", "TIFF", "PDF"):
        file = io.BytesIO()
        pillow.new("RGB", (2, 2)).save(file, name)
        made[name] = file.getvalue()
    file = io.BytesIO()
    numpy.save(file, numpy.ones(2))
    made["NPY"] = file.getvalue()
    for name, data in made.items():
        for other in SIGNATURES:
            adapter = TypeAdapter(Annotated[bytes, BlobSpec(formats=(other,))])
            if name == other:
                assert adapter.validate_python(data) == data
            else:
                with pytest.raises(ValidationError, match=f"is no {other}"):
                    adapter.validate_python(data)


# ---- pictures


@pytest.mark.parametrize("wrap", [bytes, lambda file: base64.b64encode(file).decode(), InlineBytes.of])
def test_a_picture_becomes_pixels_that_a_body_may_change(wrap):
    pixels = TypeAdapter(Image).validate_python(wrap(png(3, 2)))
    assert (pixels.dtype, pixels.shape) == (numpy.uint8, (2, 3, 3))
    pixels[0, 0] = 7
    assert pixels.tolist() == [[[7] * 3, [255] * 3, [255] * 3], [[255] * 3] * 3]


def test_a_picture_of_too_many_pixels_is_refused_before_one_is_decoded(monkeypatch):
    monkeypatch.setattr(pillow.Image, "load", lambda *_: pytest.fail("decoded"))
    spec = ImageSpec(most_pixels=5)
    with pytest.raises(ValueError, match="has 3 x 2 pixels, at most 5 are allowed"):
        spec.pixels(PNG)


@pytest.mark.parametrize(("most", "told"), [(5, 5), (100, 8)])
def test_pillows_own_limit_is_told_where_it_is_the_lower_one(most, told, monkeypatch):
    monkeypatch.setattr(pillow, "MAX_IMAGE_PIXELS", 4)  # twice as many are an error
    with pytest.raises(ValueError, match=f"too large to decode, at most {told} pixels: "):
        ImageSpec(most_pixels=most).pixels(png(3, 3))


def test_one_format_alone():
    with pytest.raises(ValueError, match="the picture is no JPEG"):
        ImageSpec(formats=("JPEG",)).pixels(png(1, 1))


def test_no_pillow_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(RuntimeError, match="pip install 'pillow"):
        ImageSpec().pixels(PNG)


@pytest.mark.parametrize("where", ["open", "convert"])
def test_a_soft_limit_within_pillow_is_no_broken_picture(monkeypatch, where):
    def interrupted(*_: Any, **__: Any):
        raise SoftTimeLimitExceeded

    if where == "open":
        monkeypatch.setattr(pictures.io, "BytesIO", interrupted)
    else:
        monkeypatch.setattr(pillow.Image, "convert", interrupted)
    with pytest.raises(SoftTimeLimitExceeded):
        ImageSpec().pixels(base64.b64encode(b"\x89PNG\r\n\x1a\n" if where == "open" else PNG).decode())
