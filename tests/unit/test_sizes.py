"""Bytes as people write and read them, and those of the arrays in a value."""

import math
from types import SimpleNamespace

import numpy
import pytest

from actors.sizes import array_bytes, read_bytes, read_limit, readable


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 << 30), ("1000", 1000), ("1.5 MB", 1_500_000)])
def test_bytes_are_read_as_people_write_them(text, size):
    assert read_bytes(text) == size


@pytest.mark.parametrize("text", ["much", "0%", "101%", "-5%", "x%", ""])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"such as 8GiB"):
        read_limit(text, 100)


def test_a_share_is_of_the_whole():
    assert read_limit("50%", 1000) == 500
    assert read_limit("100%", 1000) == 1000
    assert read_limit("7", 1000) == 7


def test_a_share_of_the_unknown_is_no_limit():
    assert read_limit("50%", 0) is None
    assert read_limit("8KiB", 0) == 8192, "bytes are bytes"


def test_sizes_are_written_for_people():
    assert [readable(size) for size in (5, 1536, 2 << 30)] == ["5 B", "1.5 KiB", "2.0 GiB"]


def test_arrays_are_found_wherever_they_are():
    array = lambda: numpy.zeros(10, numpy.uint8)  # noqa: E731
    value = SimpleNamespace(layers=[{"weights": array(), "bias": (array(), [array()])}], name="x", size=3)
    assert array_bytes(value) == 30
    assert array_bytes(array()) == 10
    assert array_bytes("text") == array_bytes(None) == array_bytes([]) == 0


def test_a_shared_array_counts_once():
    array = numpy.zeros(10, numpy.uint8)
    assert array_bytes([array, {"again": array}, SimpleNamespace(array=array)]) == 10


def test_a_view_counts_as_what_it_keeps_alive():
    array = numpy.zeros(1000, numpy.uint8)
    assert array_bytes(array[:3]) == 1000
    assert array_bytes([array[:3], array[5:9], array.reshape(10, 100)]) == 1000


def test_what_refers_to_itself_ends():
    value = [numpy.zeros(10, numpy.uint8)]
    value.append(value)
    assert array_bytes(value) == 10


def test_the_search_is_bounded():
    value = numpy.zeros(10, numpy.uint8)
    for _ in range(100):
        value = [value]
    assert array_bytes(value) == 0
    assert array_bytes([[number] for number in range(1_000_000)]) == 0


def test_classes_and_modules_are_no_part_of_a_value():
    assert array_bytes([math, numpy, numpy.ndarray, test_the_search_is_bounded]) == 0
