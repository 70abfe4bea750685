"""JSON text to arrays: what NumPy makes of the list, or nothing."""

import json
import tracemalloc

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from actors.data.numbers import _KEPT_BYTES, array_of

shapes = hnp.array_shapes(min_dims=1, max_dims=4, max_side=6)
floats = hnp.arrays(numpy.float64, shapes, elements=st.floats(allow_nan=False, allow_infinity=False))
integers = hnp.arrays(numpy.int64, shapes)


@given(floats | integers, st.booleans(), st.sampled_from([None, 2]))
@settings(max_examples=100, deadline=None)
def test_as_numpy_makes_it(array, as_floats, indent):
    made = array_of(json.dumps(array.tolist(), indent=indent).encode(), as_floats)
    want = numpy.asarray(array.tolist(), numpy.float64 if as_floats else None)
    assert made.dtype == want.dtype and made.shape == want.shape and made.tobytes() == want.tobytes()
    assert made.flags.writeable


@pytest.mark.parametrize(
    "text", ["[1, 2.5]", "[0.5, 1]", "[[1, 2], [3, 4.5]]", "[9007199254740993, 0.5]", "[1e5, 1E-5]"]
)
def test_integers_among_floats(text):
    assert array_of(text.encode(), False).tolist() == numpy.asarray(json.loads(text)).tolist()
    assert array_of(text.encode(), False).dtype == numpy.float64


@pytest.mark.parametrize(
    "text",
    [
        "5", '"text"', "{}", "[]", "[[], []]", "[true]", "[1, true]", "[null]", '["1"]', '[{"a": 1}]', "[1, [2]]",
        "[[1], 2]",
        "[[1, 2], [3]]", "[[1, 2], [3, 4, 5], [6]]", "[[[1], [2]], [[3, 4]]]", "[[1, 2], [[3], 4]]",
        "[[1], [2, 3], []]", "[[1], [], [2]]", "[[[1], []], [[2], []]]",
        "[99999999999999999999999]", "[9223372036854775808]", "[1e999]",
    ],
)  # fmt: skip
def test_what_has_to_be_looked_at_more_closely(text):
    assert array_of(text.encode(), False) is None


def test_a_view_will_do_and_one_array_does_not_change_another():
    first = array_of(memoryview(b"xx[1.5, 2]")[2:], True)
    second = array_of(b"[[7], [8]]", True)
    assert first.tolist() == [1.5, 2.0] and second.tolist() == [[7.0], [8.0]]


def test_after_what_cannot_be_read_the_next_one_can():
    for text in (b"[1e999]", b"[1, [2]]", b"[tru]"):
        assert array_of(text, True) is None
        assert array_of(b"[1]", True).tolist() == [1.0]


@pytest.mark.parametrize("rows", [[[0] * 20_000, *[[0]] * 20_000], [[[0]] * 20_000, *[[[0]]] * 20_000]])
def test_a_long_first_row_does_not_make_a_large_table_of_it(rows):
    """A few bytes per row here, and 400 million if all were as long as the first."""
    text = json.dumps(rows).encode()
    array_of(b"[[1.5], [2.5]]", True)  # what the parser keeps is there
    tracemalloc.start()
    try:
        assert array_of(text, False) is None
        assert tracemalloc.get_traced_memory()[1] < 20 * len(text)
    finally:
        tracemalloc.stop()


def test_more_than_simdjson_counts():
    assert array_of(b"[%b1]" % (b"0," * 2**24), False).shape == (2**24 + 1,)


def test_a_long_one():
    numbers = numpy.arange(_KEPT_BYTES // 4, dtype=numpy.float64)
    assert (array_of(json.dumps(numbers.tolist()).encode(), True) == numbers).all()
