"""Where arrays in JSON are read: a task's when it is called, a result's when it is known to be one."""

import numpy
import pytest
from kombu.exceptions import DecodeError
from kombu.serialization import dumps, loads

from bridge import data
from bridge.data import ArrayRef, Inline
from bridge.errors import DataLost

ARRAY = numpy.arange(3.0)
LOST = ArrayRef(url="redis:" + "0" * 32, dtype="<f8", shape=(3,), size_bytes=24)


@pytest.fixture(autouse=True)
def store(monkeypatch):
    """It has nothing."""

    def read(ref, most_bytes=None):
        raise DataLost("gone")

    monkeypatch.setattr(data.arrays, "opener", read)
    monkeypatch.setattr(data.arrays, "keeps_forms", False)


@pytest.fixture
def child(monkeypatch):
    monkeypatch.setattr(data, "_is_child", True)


def decoded(value):
    content_type, encoding, text = dumps(value, "json")
    return loads(text, content_type, encoding)


def called(args, kwargs):
    return (lambda *args, **kwargs: (args, kwargs))(*args, **kwargs)


def test_arguments_are_read_as_the_body_is_called(child):
    args, kwargs, _ = decoded([[1, {"deep": [Inline.of(ARRAY)]}], {"a": Inline.of(ARRAY), "b": 2}, {"chain": None}])
    (one, deep), found = called(args, kwargs)
    assert one == 1 and (deep["deep"][0] == ARRAY).all() and (found["a"] == ARRAY).all() and found["b"] == 2
    assert isinstance(args[1]["deep"][0], numpy.ndarray), "from then on they are what they were read as"


@pytest.mark.parametrize("body", [[[LOST], {}, None], [[], {"a": LOST}, {}], [[[{"a": LOST}]], {}, {}]])
def test_what_cannot_be_read_is_an_error_of_that_call(child, body):
    args, kwargs, _ = decoded(body)
    for _ in range(2):
        with pytest.raises(DataLost, match="gone"):
            called(args, kwargs)


def test_what_follows_a_task_stays_as_it_is(child):
    _, _, embed = decoded([[Inline.of(ARRAY)], {}, {"chain": [{"args": [LOST]}]}])
    assert embed["chain"][0]["args"] == [LOST]


def test_a_result_that_cannot_be_read_is_a_failure():
    meta = decoded({"status": "SUCCESS", "result": [LOST], "task_id": "1", "traceback": None, "children": ["x"]})
    assert meta["status"] == "FAILURE" and isinstance(meta["result"], DataLost) and meta["task_id"] == "1"
    meta = decoded({"status": "SUCCESS", "result": [Inline.of(ARRAY)], "task_id": "1"})
    assert meta["status"] == "SUCCESS" and (meta["result"][0] == ARRAY).all()


def test_in_other_json_it_is_an_error_of_reading_it():
    with pytest.raises(DecodeError, match="gone") as caught:
        decoded({"anything": LOST})
    assert isinstance(caught.value.args[0], DataLost)
    assert (decoded([Inline.of(ARRAY)])[0] == ARRAY).all()


def test_a_broken_one_passes_a_worker_for_the_task_to_say_so(monkeypatch):
    """A message that cannot be decoded is dropped, and its sender would wait for ever."""
    broken = {"kind": "door"}
    text = '[[{"__type__": "bridge.array", "__value__": {"kind": "door"}}], {}, {}]'
    monkeypatch.setattr(data.arrays, "keeps_forms", True)
    assert loads(text, "application/json", "utf-8") == [[broken], {}, {}]
    monkeypatch.setattr(data.arrays, "keeps_forms", False)
    with pytest.raises(DecodeError, match="kind must be one of"):
        loads(text, "application/json", "utf-8")


def test_plain_json_and_passing_processes_are_left_alone(monkeypatch):
    assert decoded([[1], {"a": 2}, None]) == [[1], {"a": 2}, None]
    monkeypatch.setattr(data.arrays, "keeps_forms", True)
    assert decoded([[LOST], {}, None]) == [[LOST], {}, None]
