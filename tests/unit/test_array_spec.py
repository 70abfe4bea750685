"""What a task takes that wants an array: dtype, shape, bounds, byte order, NaN; what becomes of lists."""

import base64
import io
import pickle
import tracemalloc
from typing import Annotated, Any

import jsonschema
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pydantic import BaseModel, TypeAdapter, ValidationError

from actors.data import arrays
from actors.data.arrays import Array, ArrayRef, ArraySpec, Inline, Mismatch, read_npy
from actors.data.blobs import Blob
from actors.data.pictures import Image
from actors.executor.device import CpuDevice
from actors.unopened import Unopened


def spec(*parts):
    return Array[parts].__metadata__[0]


def read(spec, value):
    return spec.validate(value)


DTYPES = {
    "same": ("f8", numpy.ones(2), None),
    "narrower float": ("f8", numpy.ones(2, "f4"), None),
    "integers that fit": ("f8", numpy.ones(2, "i4"), None),
    "integers that may not": ("f4", numpy.ones(2, "i4"), "float32 .*found int32"),
    "wider float": ("f4", numpy.ones(2), "found float64"),
    "float for integer": ("i8", numpy.ones(2), "expected int64 of any shape, found float64"),
    "bool for integer": ("i8", numpy.ones(2, bool), None),
    "integer for bool": ("?", numpy.ones(2, int), "expected bool .*found int64"),
    "unsigned for signed": ("i8", numpy.ones(2, "u4"), None),
    "signed for unsigned": ("u8", numpy.ones(2, "i4"), "found int32"),
    "complex for float": ("f8", numpy.ones(2, complex), "found complex128"),
    "float for complex": ("c16", numpy.ones(2), None),
    "half": ("f2", numpy.ones(2, "f2"), None),
    "big endian": ("f8", numpy.ones(2, ">f8"), None),
    "big endian wanted": (">f8", numpy.ones(2), None),
    "strings": (None, numpy.array(["a"]), "expected numbers|not accepted"),
    "dates": (None, numpy.array(["2026-01-01"], "M8[D]"), "expected numbers|not accepted"),
    "objects": (None, numpy.array([None]), "expected numbers|not accepted"),
    "records": (None, numpy.zeros(2, [("a", "f8")]), "expected numbers|not accepted"),
}


@pytest.mark.parametrize(("dtype", "value", "text"), DTYPES.values(), ids=DTYPES)
def test_dtypes(dtype, value, text):
    """By array, envelope and reference alike; the body gets what was asked for, in native byte order."""
    wanted = spec(dtype)
    if text is None:
        for form in (value, Inline.of(value), Inline.of(value).model_dump()):
            found = read(wanted, form)
            assert found.dtype == numpy.dtype(dtype) and (found == value).all()
        wanted.check(value.dtype.str, value.shape)
    else:
        with pytest.raises(ValueError, match=text):
            read(wanted, value)


SHAPES = {
    "any": ((), (2, 3), True),
    "length": ((3,), (3,), True),
    "another length": ((3,), (4,), False),
    "fewer dimensions": ((3, 3), (3,), False),
    "more dimensions": (("*",), (3, 3), False),
    "star": (("*", 3), (0, 3), True),
    "square": (("n", "n"), (4, 4), True),
    "not square": (("n", "n"), (4, 5), False),
    "two names": (("n", "m", "n"), (4, 5, 4), True),
    "bounds": ((slice(1, 3),), (3,), True),
    "below": ((slice(1, 3),), (0,), False),
    "above": ((slice(1, 3),), (4,), False),
    "at least": ((slice(2, None),), (10,), True),
    "at most": ((slice(None, 2),), (0,), True),
    "zero": ((0,), (0,), True),
}


@pytest.mark.parametrize(("wanted", "shape", "fits"), SHAPES.values(), ids=SHAPES)
def test_shapes(wanted, shape, fits):
    for value in (numpy.ones(shape), numpy.asfortranarray(numpy.ones(shape))):
        if fits:
            assert read(spec("f8", *wanted), value).shape == shape
        else:
            with pytest.raises(Mismatch, match=r"found float64 of shape"):
                read(spec("f8", *wanted), value)


def test_a_number_is_an_array_without_dimensions():
    assert read(spec("f8"), numpy.float64(3)).shape == ()
    assert read(spec("f8"), numpy.array(3)).shape == ()
    assert read(ArraySpec("<f8", ()), numpy.array(3.0)).shape == ()
    with pytest.raises(Mismatch, match=r"of shape \(\), found float64 of shape \(1,\)"):
        read(ArraySpec("<f8", ()), numpy.ones(1))


LISTS = {
    "integers": ("f8", [1, 2], [1.0, 2.0]),
    "floats": ("f4", [0.5], [0.5]),
    "nested": ("f8", [[1], [2]], [[1.0], [2.0]]),
    "tuples": ("i8", ((1, 2), (3, 4)), [[1, 2], [3, 4]]),
    "empty": ("i8", [], []),
    "empty rows": ("f8", [[], []], [[], []]),
    "truth values": ("?", [True, False], [True, False]),
    "floats for integers": ("i8", [1.5], "found a list of float64"),
    "floats that are whole, for integers": ("i8", [1.0], "found a list of float64"),
    "beyond bounds": ("i1", [1, 128], "found a number beyond -128 to 127"),
    "negative for unsigned": ("u1", [-1], "found a number beyond 0 to 255"),
    "beyond int64": ("u8", [0, 2**64 - 1, 2**63 + 1], [0, 2**64 - 1, 2**63 + 1]),
    "negative, and beyond int64": ("u8", [-1, 2**63], "found a list of float64"),
    "floats for unsigned": ("u8", [1.5, 2**63], "found a list of float64"),
    "unsigned for signed": ("i8", [2**63], "found a number beyond"),
    "truth values for unsigned": ("u1", [True, 2], [1, 2]),
    "truth values alone for the longest unsigned": ("u8", [True, False], [1, 0]),
    "integers for truth values": ("?", [1], "found a list of int64"),
    "too large for float32": ("f4", [0.5, 1e300], "found a number that is too large for float32"),
    "too large for float16": ("f2", [[-1e5]], "found a number that is too large for float16"),
    "an integer too large for float16": ("f2", [70_000], "found a number that is too large for float16"),
    "too large for complex64": ("c8", [1e300], "found a number that is too large for complex64"),
    "infinity": ("f4", [float("inf"), -float("inf")], [float("inf"), -float("inf")]),
    "numbers of numpy": ("f8", [numpy.float32(0.5), numpy.int8(1)], [0.5, 1.0]),
    "floats and what is beyond all integers": ("f8", [0.5, 2**70], [0.5, 2.0**70]),
    "beyond all floats": ("f8", [0.5, 10**400], "found a list with an element that is no number"),
    "floats and truth values": ("f8", [[0.5], [True]], [[0.5], [1.0]]),
    "arrays in a list": ("f8", [numpy.ones(2), numpy.zeros(2)], [[1.0, 1.0], [0.0, 0.0]]),
    "bytes": ("f8", [b"1"], "no number"),
    "text in rows": ("f8", [[1, 2], [3, "4"]], "no number"),
    "text in deeper rows": ("f8", [[1], [[2, "3"]]], "no number"),
    "numbers and text beside rows": ("f8", [[1], 2, "3"], "no number"),
    "beyond all": ("u8", [2**70], "found a list with an element that is no number"),
    "text": ("f8", ["1"], "no number"),
    "nothing": ("f8", [None], "no number"),
    "ragged": ("f8", [[1], [2, 3]], "rows have different lengths"),
    "a dict": ("f8", [{"a": 1}], "no number"),
}


@pytest.mark.parametrize(("dtype", "value", "expected"), LISTS.values(), ids=LISTS)
def test_lists(dtype, value, expected):
    if isinstance(expected, list):
        found = read(spec(dtype), value)
        assert found.dtype == numpy.dtype(dtype) and found.tolist() == expected
    else:
        with pytest.raises(Mismatch, match=expected):
            read(spec(dtype), value)


@pytest.mark.parametrize("dtype", ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"])
def test_every_dtype_takes_a_list(dtype):
    for wanted in (dtype, ">" + dtype if dtype[1:] not in ("", "1") else dtype):
        found = read(spec(wanted), [True, False] if dtype == "?" else [[0, 1, 100]])
        assert found.dtype == wanted and found.tolist() == ([True, False] if dtype == "?" else [[0, 1, 100]])


@pytest.mark.parametrize("place", [[], [1.5], [[1.5], [2.5]]], ids=["first", "last", "beside rows"])
def test_text_among_numbers_takes_no_more_room_than_it_has(place):
    """NumPy would make a table of it, four bytes times the longest text times the elements."""
    values = [*place, "x" * 100_000, *[1] * 10_000]
    tracemalloc.start()
    try:
        with pytest.raises(Mismatch, match="no number"):
            read(ArraySpec(), values)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_no_memory_for_a_list_is_its_senders_error(monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(arrays.lists, "_array", full)
    with pytest.raises(Mismatch, match="found a list for which there is no memory"):
        read(ArraySpec(), [1])


@given(values=st.lists(st.floats(width=64), max_size=20))
def test_lists_of_floats_are_exact(values):
    numpy.testing.assert_array_equal(read(spec("f8"), values), numpy.array(values))


@given(
    values=st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=10),
    dtype=st.sampled_from(["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"]),
)
def test_lists_of_integers_are_exact_or_refused(values, dtype):
    bounds = numpy.iinfo(dtype)
    fits = all(bounds.min <= value <= bounds.max for value in values)
    try:
        found = read(spec(dtype), values)
    except Mismatch:
        assert not fits
        return
    assert fits and found.tolist() == values


@pytest.mark.parametrize("value", [[1.0, float("nan")], numpy.array([[1, numpy.inf]]), numpy.array([1j * numpy.nan])])
def test_finite(value):
    wanted = ArraySpec(None, None, True)
    with pytest.raises(Mismatch, match="expected finite numbers, found NaN or an infinity at"):
        read(wanted, value)
    assert read(ArraySpec(), value) is not None
    assert read(wanted, [1, 2]).tolist() == [1, 2] and read(wanted, []).size == 0


def test_what_is_no_array():
    for value in (
        3,
        "text",
        None,
        {1},
        {"kind": "bytes", "data": ""},
        {"kind": "blob", "url": "redis:a"},
        {"kind": []},
    ):
        with pytest.raises(ValueError, match=r"found|kind"):
            read(spec("f8"), value)


WRONG = [("f8", 1.5), ("f8", None), ("nonsense",), ("O",), ("S3",), ("M8[s]",)]
NEVER_FITS = [("f8", -1), ("f8", True), ("f8", slice(3, 1)), ("f8", slice(1, 3, 2)), ("f8", slice(1.5, 3))]


@pytest.mark.parametrize("parts", WRONG + NEVER_FITS)
def test_a_wrong_type_fails_where_it_is_declared(parts):
    with pytest.raises((TypeError, ValueError)):
        Array[parts]


@pytest.mark.parametrize("dimension", ["n", 2, slice(1, 3)])
def test_it_may_be_left_out(dimension):
    optional = TypeAdapter(Array["f8", dimension] | None)
    assert optional.validate_python(None) is None and optional.validate_python([1, 2]).tolist() == [1, 2]


def test_every_array_in_a_body_can_be_written_into(monkeypatch):
    """However it came, and after the pickles on its way, whose buffers may lie beside them."""
    array = numpy.arange(6.0).reshape(2, 3)
    assert Inline.of(array).get().flags.writeable
    monkeypatch.setattr(arrays, "passes_on", True)
    for value in (array, array.tolist(), Inline.of(array), Inline.of(array.T)):
        unopened = spec("f8").validate(value)
        buffers = []
        data = pickle.dumps(unopened, 5, buffer_callback=buffers.append)
        for arrived in (pickle.loads(pickle.dumps(unopened, 5)), pickle.loads(data, buffers=map(bytes, buffers))):
            opened = arrived.open()
            opened += 1
            assert opened.sum() == 21


def test_the_driver_passes_on(monkeypatch):
    monkeypatch.setattr(arrays, "passes_on", True)
    ref = {"kind": "ref", "url": "redis:" + "a" * 32, "dtype": "<f8", "shape": [2], "size_bytes": 16, "once": True}
    arrays.seen.clear()
    found = TypeAdapter(Annotated[Any, spec("f8", 2)]).validate_python(ref)
    assert isinstance(found, Unopened) and isinstance(found.source, ArrayRef) and len(arrays.seen) == 1
    arrays.seen.clear()
    assert isinstance(pickle.loads(pickle.dumps(found)).source, ArrayRef)
    with pytest.raises(Mismatch, match=r"expected float64 of shape \(3\), found float64 of shape \(2,\)"):
        spec("f8", 3).validate(ref)


def test_a_size_that_contradicts_the_shape_is_told_plainly():
    ref = {"kind": "ref", "url": "redis:" + "a" * 32, "dtype": "<f8", "shape": [2], "size_bytes": 15}
    with pytest.raises(ValueError, match=r"^a broken reference or envelope: <f8 of shape \(2,\) has 16 bytes, not 15$"):
        spec("f8").validate(ref)


BROKEN = {
    "dtype": {"dtype": "|O"},
    "no dtype": {"dtype": "nonsense"},
    "a comma for dtype": {"dtype": ","},
    "half a dtype": {"dtype": "(1"},
    "size": {"size_bytes": 8},
    "negative": {"shape": [-2], "size_bytes": 0},
    "many dimensions": {"shape": [1] * 33, "size_bytes": 8},
    "text": {"shape": "2"},
    "unknown": {"password": "x"},
    "long": {"url": "x" * 3000},
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN)
def test_broken_references(changes):
    ref = {"kind": "ref", "url": "redis:" + "a" * 32, "dtype": "<f8", "shape": [2], "size_bytes": 16}
    with pytest.raises(ValueError, match="a broken reference or envelope"):
        spec("f8").validate({**ref, **changes})


@given(data=st.binary(max_size=200))
def test_no_npy_file_does_anything_but_be_read_or_refused(data):
    file = io.BytesIO()
    numpy.save(file, numpy.arange(4))
    whole = file.getvalue()
    for broken in (data, whole[:8] + data, whole[: len(data)]):
        with pytest.raises(ValueError, match=r"\.npy|follow the header|not accepted|no dtype"):
            read_npy(broken)


def test_an_npy_file_of_objects_runs_nothing():
    file = io.BytesIO()
    numpy.save(file, numpy.array([print]), allow_pickle=True)
    with pytest.raises(ValueError, match="not accepted"):
        Inline(data=base64.b64encode(file.getvalue()).decode()).get()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions_of_npy(version):
    file = io.BytesIO()
    numpy.lib.format.write_array(file, numpy.arange(3), version=version)
    assert read_npy(file.getvalue()).tolist() == [0, 1, 2]


@given(
    array=npst.arrays(st.sampled_from(["<f8", ">f8", "?", "<c8", ">i2"]), npst.array_shapes(min_dims=0, min_side=0)),
    cut=st.integers(1, 50),
)
def test_what_a_device_receives(array, cut):
    """In pieces of any size."""
    data = array.tobytes()
    pieces = [data[start : start + cut] for start in range(0, len(data), cut)]
    received = CpuDevice("").receive(iter(pieces), array.shape, array.dtype.str)
    assert received.shape == array.shape and received.dtype == array.dtype.newbyteorder("=")
    numpy.testing.assert_array_equal(received, array)
    if data:
        with pytest.raises(ValueError, match="and more came"):
            CpuDevice("").receive([*pieces, b"1"], array.shape, array.dtype.str)


def test_what_only_speaks_dlpack_is_an_array():
    class Foreign:
        """As an array of another library, which NumPy knows by this protocol alone."""

        def __dlpack__(self, **options):
            return numpy.arange(3.0).__dlpack__(**options)

        def __dlpack_device__(self):
            return 1, 0

    found = TypeAdapter(Annotated[Any, ArraySpec("float64", ("n",))]).validate_python(Foreign())
    assert found.tolist() == [0, 1, 2]
    with pytest.raises(ValidationError, match="expected int64 of any shape, found float64"):
        TypeAdapter(Annotated[Any, ArraySpec("int64")]).validate_python(Foreign())


# ---- JSON Schema: models with arrays and files in them can be described, for FastAPI and the like


class Described(BaseModel):
    points: Array["float64", slice(1, 3), 2]  # noqa: F821 - a name, not a class
    any_array: Array
    file: Blob
    picture: Image | None = None


def is_described(**changes):
    value = {"points": [[1, 2]], "any_array": [[1], [2.5]], "file": "AAAA"} | changes
    try:
        jsonschema.validate(value, Described.model_json_schema())
    except jsonschema.ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    "form", [Inline.of(numpy.zeros((2, 2))), ArrayRef(url="redis:1", dtype="<f8", shape=(2, 2), size_bytes=32)]
)
def test_forms_are_in_the_schema(form):
    assert is_described(points=form.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("points", "expected"),
    [([[1, 2]], True), ([[1, 2]] * 3, True), ([], False), ([[1, 2]] * 4, False), ([[1]], False), ([["x", 2]], False)],
)
def test_lists_are_described_by_their_shape(points, expected):
    assert is_described(points=points) is expected


def test_what_the_schema_says_of_the_rest():
    assert is_described(file="https://example.org/x") and is_described(picture="AAAA")
    assert not is_described(any_array="text") and not is_described(file=3)
    assert Described.model_json_schema()["properties"]["points"]["description"] == "float64 of shape (1..3, 2)"
