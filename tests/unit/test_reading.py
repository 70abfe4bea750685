"""What came closed is read as the signature wants it, and what does not fit names its field."""

import json
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.batching import Batch, batched, run_batch
from actors.closed import ClosedList, split
from actors.errors import PayloadInvalid
from actors.executor.reading import Reader
from bridge.data import Array

NUMBERS = [number / 2 for number in range(1000)]
Vector: Any = Array["float32", "n"]
Counts: Any = Array["int16", "*", 2]


def body(values: Vector, factor: int = 1, *, rows: Counts = (), more: dict[str, Any] | None = None):
    return values, factor, rows, more


def anything(first, /, *rest, key=None):
    return first, rest, key


@batched(max_size=4)
def sums(values: list[list[float]], factor: list[float]) -> list[float]:
    return [sum(each) * times for each, times in zip(values, factor, strict=True)]


def sent(*args, **kwargs):
    """As the executor gets them."""
    closed_args, closed_kwargs, _ = split(json.dumps([args, kwargs, {}]).encode()).values()
    return closed_args, closed_kwargs


def read(function, *args, checks=True, **kwargs):
    args, kwargs = sent(*args, **kwargs)
    return Reader("shop.task", function).reading(function, checks)(*args, **kwargs)


def problems(function, *args, **kwargs):
    with pytest.raises(PayloadInvalid) as caught:
        read(function, *args, **kwargs)
    assert caught.value.task == "shop.task"
    return [(each["field"], each["received"]) for each in caught.value.problems]


def test_lists_become_the_arrays_the_signature_names():
    values, factor, rows, more = read(body, NUMBERS, "3", rows=[[1, -1]] * 500, more={"a": NUMBERS})
    assert (values.dtype, values.shape, values[3]) == (numpy.float32, (1000,), 1.5)
    assert (rows.dtype, rows.shape) == (numpy.int16, (500, 2))
    assert factor == 3 and more == {"a": NUMBERS} and type(more) is dict


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i1", "i8", "f2", "f4", "f8", "c8"])
def test_lists_become_arrays_of_any_dtype(dtype):
    wanted: Any = Array[dtype]

    def takes(values: wanted):
        return values

    values = read(takes, [0, 1, 127] * 500)
    assert values.dtype == dtype and values.tolist() == [0, 1, 127] * 500


@pytest.mark.parametrize(
    ("dtype", "last", "reason"),
    [
        ("u1", 256, "a number beyond 0 to 255"),
        ("u8", -1, "a number beyond 0 to"),
        ("u1", 0.5, "a list of float64"),
        ("f4", 1e300, "a number that is too large for float32"),
        ("f2", 1e5, "a number that is too large for float16"),
        ("f2", 100_000, "a number that is too large for float16"),
    ],
)
def test_numbers_that_the_dtype_does_not_hold(dtype, last, reason):
    wanted: Any = Array[dtype]

    def takes(values: wanted):
        return values

    with pytest.raises(PayloadInvalid, match=reason):
        read(takes, [*[0] * 1000, last])


def test_unannotated_ones_become_lists():
    first, rest, key = read(anything, NUMBERS, 1, {"a": NUMBERS}, key=NUMBERS)
    assert first == key == NUMBERS and rest == (1, {"a": NUMBERS})
    assert type(first) is type(key) is list and type(rest[1]) is dict


def test_unchecked_ones_are_read_and_nothing_more():
    values, factor, rows, _ = read(body, NUMBERS, "3", rows=[["x"]] * 1000, checks=False)
    assert (values, type(values), factor, rows[0]) == (NUMBERS, list, "3", ["x"])


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((NUMBERS, "x"), {}, [("factor", "str")]),
        (([*NUMBERS, "x"],), {}, [("values", "list")]),
        (([NUMBERS, NUMBERS[1:]],), {}, [("values", "list")]),
        ((NUMBERS,), {"rows": [[1, 2]] * 500 + [[1]]}, [("rows", "list")]),
        ((NUMBERS,), {"rows": [[1, 40_000]] * 500}, [("rows", "list")]),
        ((NUMBERS,), {"more": NUMBERS}, [("more", "list")]),
        ((NUMBERS, 1, 2), {}, [("argument 3", "int")]),
        ((NUMBERS, 1, NUMBERS), {}, [("argument 3", "list")]),
        ((), {"rows": [[1, 2]] * 500}, [("values", "nothing")]),
    ],
)
def test_what_does_not_fit_names_its_field(args, kwargs, expected):
    assert problems(body, *args, **kwargs) == expected


def test_what_an_open_list_is_told_a_closed_one_is_told_too():
    for values in ([*NUMBERS, "x"], [NUMBERS], [*NUMBERS, None], [True] * 1000, NUMBERS):
        told = []
        for small in (False, True):
            reader = Reader("shop.task", body)
            args = ([values], {}) if small else sent(values)
            try:
                told.append(reader.read_all(*args, True)[0][0].tolist())
            except PayloadInvalid as error:
                told.append(error.problems)
        assert told[0] == told[1]


NUMBER = st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 300)
ROW = st.lists(NUMBER, max_size=3) | st.lists(st.booleans(), max_size=2) | st.lists(NUMBER | st.none(), max_size=3)
ROWS = st.builds(lambda row, times, odd: [row] * times + [odd], ROW, st.integers(0, 3), ROW) | st.lists(ROW, max_size=3)


@given(
    values=ROW | ROWS | st.lists(ROWS, max_size=3) | st.lists(st.lists(NUMBER, max_size=1), max_size=4),
    dtype=st.sampled_from(["?", "i1", "i8", "u1", "u8", "f2", "f4", "f8", ">f8", "c16"]),
)
@settings(max_examples=300, deadline=None)
def test_any_list_closed_and_open_is_the_same_array_or_the_same_error(values, dtype):
    def takes(values: Array[dtype]) -> None: ...

    reader, told = Reader("shop.task", takes), []
    for each in (values, ClosedList(json.dumps(values).encode())):
        try:
            array = reader.read_all((each,), {}, True)[0][0]
            told.append((array.dtype, array.shape, array.tobytes()))
        except PayloadInvalid as error:
            told.append(error.problems)
    assert told[0] == told[1]


def test_a_number_that_python_takes_for_too_long_names_its_argument():
    text = json.dumps([[1, NUMBERS], {}, {}]).replace("[0.0,", f"[{'9' * 5000},").encode()
    args, kwargs, _ = split(text).values()
    for checks in (True, False):
        with pytest.raises(PayloadInvalid, match=r"second: .*4300 digits"):
            Reader("shop.task", lambda first, second: None).read_all(args, kwargs, checks)


def test_one_of_a_batch_that_does_not_fit_fails_alone():
    items = [sent(NUMBERS, 2.0), sent([*NUMBERS, "x"], 2.0), sent(NUMBERS[:500], 1.0)]
    ran = []

    def run(good):
        ran.append(len(good))
        return run_batch(Batch(sums.__gpu_batch__.body, 4, 0.0), good)

    first, second, third = Reader("shop.sums", sums).reading_items(run, [True] * 3)(items)
    assert (first, third, ran) == (2 * sum(NUMBERS), sum(NUMBERS[:500]), [2])
    assert [each["field"] for each in second.problems] == ["values.1000"]


def test_of_a_batch_each_is_checked_where_it_has_to_be():
    items = [([[1.0]], {"factor": "checked by the driver"}), sent([*NUMBERS, "x"], 2.0), sent(NUMBERS, 2.0)]
    results = Reader("shop.sums", sums).reading_items(lambda good: [pair[1] for pair in good], [False, True, True])(
        items
    )
    assert results[0] == {"factor": "checked by the driver"} and results[2] == {}
    assert [each["field"] for each in results[1].problems] == ["values.1000"]


def test_of_a_batch_of_which_none_fits_nothing_runs():
    (error,) = Reader("shop.sums", sums).reading_items(lambda _: 1 / 0, [True])([sent([*NUMBERS, "x"], 1.0)])
    assert type(error) is PayloadInvalid
