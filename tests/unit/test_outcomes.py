"""From what a body returned or raised to data (`actors/executor/outcomes.py`)."""

import collections
import json
import pickle
import threading

import numpy
import pytest
from celery.exceptions import Ignore, Reject
from pydantic import BaseModel

from actors.contract import FailureKind
from actors.executor.interrupt import Cancelled
from actors.executor.outcomes import TEXT_LIMIT, failure, plain
from actors.wishes import ReplaceWanted, RetryWanted


class Point(BaseModel):
    x: float


class DeviceArray:
    """What CuPy's arrays look like from outside."""

    def __init__(self, values):
        self.values = values

    def get(self):
        return numpy.asarray(self.values)


DeviceArray.__module__ = "cupy._core.core"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (1, 1),
        ("text", "text"),
        (b"bytes", b"bytes"),
        (None, None),
        (True, True),
        (numpy.float64(0.5), 0.5),
        (numpy.float32(0.5), 0.5),
        (numpy.int8(-3), -3),
        (numpy.bool_(True), True),
        (numpy.str_("s"), "s"),
        (numpy.complex128(1 + 2j), 1 + 2j),
        (numpy.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
        (numpy.array(7), 7),
        (numpy.array([]), []),
        ([numpy.int32(1), (numpy.int32(2), [numpy.arange(2)])], [1, (2, [[0, 1]])]),
        ({"a": numpy.float32(1.5), numpy.int64(3): {"b": [numpy.ones(2)]}}, {"a": 1.5, 3: {"b": [[1.0, 1.0]]}}),
        (DeviceArray([1, 2]), [1, 2]),
        (DeviceArray(5), 5),
        ([DeviceArray([1.5])], [[1.5]]),
        (Point(x=1), {"x": 1.0}),
        ([Point(x=1), {"p": Point(x=2)}], [{"x": 1.0}, {"p": {"x": 2.0}}]),
    ],
)
def test_arrays_scalars_and_models_become_plain(value, wanted):
    found = plain(value, keep_models=False)
    assert found == wanted
    assert type(found) is type(wanted)


def test_numpy_scalars_are_json_afterwards():
    value = {"mean": numpy.float32(0.25), "shape": numpy.arange(3).shape, "flags": [numpy.bool_(False)]}
    assert json.loads(json.dumps(plain(value, False))) == {"mean": 0.25, "shape": [3], "flags": [False]}


def test_models_are_kept_for_celerys_own_wrapper():
    assert plain([Point(x=1)], keep_models=True) == [Point(x=1)]
    assert plain({"a": numpy.int8(1), "b": Point(x=1)}, keep_models=True) == {"a": 1, "b": Point(x=1)}


def test_the_bodys_own_value_is_not_changed():
    value = {"a": [numpy.int8(1)]}
    plain(value, False)
    assert type(value["a"][0]) is numpy.int8


@pytest.mark.parametrize(
    "value",
    [
        collections.OrderedDict(a=numpy.int32(1)),
        collections.defaultdict(list, a=[numpy.int32(1)]),
        collections.namedtuple("Pair", "a b")(numpy.int32(1), numpy.arange(2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arrays_inside_subclasses_of_containers_become_plain_too(value):
    assert json.loads(json.dumps(plain(value, False)))


def test_anything_else_is_left_alone():
    thing = object()
    assert plain(thing, False) is thing


# ---- failures


def entry(body):
    """Stands for the executor's frame below which the user's frames begin."""
    body()


def fail(error, body=None, out_of_memory=False):
    def raises():
        raise error

    def guarded():
        try:
            entry(body or raises)
        except BaseException as raised:
            return failure("token", raised, entry.__code__, out_of_memory, 0.25)

    return guarded()


class ShopError(Exception):
    pass


class TwoArguments(Exception):
    """Cannot be rebuilt: pickle calls it with one."""

    def __init__(self, one, two):
        super().__init__(one)


class Holds(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.lock = threading.Lock()


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no text")


class Becomes(Exception):
    def __reduce__(self):
        return str, ("not an exception",)


def test_an_exception_is_described_and_pickled():
    found = fail(ShopError("because", 3))
    assert (found.token, found.kind, found.run_s) == ("token", FailureKind.RAISED, 0.25)
    assert found.type_name == f"{__name__}.ShopError"
    assert found.message == "('because', 3)"
    assert pickle.loads(found.exception).args == ("because", 3)


def test_builtins_are_named_shortly():
    assert fail(KeyError("k")).type_name == "KeyError"


def test_the_traceback_begins_at_the_bodys_own_frames():
    found = fail(ShopError("x"))
    assert "in raises" in found.traceback
    assert "ShopError: x" in found.traceback
    assert "in entry" not in found.traceback
    assert "in guarded" not in found.traceback


def test_causes_are_in_the_traceback():
    def body():
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ShopError("second") from error

    assert "KeyError: 'first'" in fail(None, body).traceback


@pytest.mark.parametrize("error", [TwoArguments(1, 2), Holds("x"), Becomes("x")])
def test_what_pickle_cannot_rebuild_keeps_class_and_arguments(error):
    error.note = "kept"
    rebuilt = pickle.loads(fail(error).exception)
    assert (type(rebuilt), rebuilt.args, rebuilt.note) == (type(error), error.args, "kept")


def test_a_local_class_travels_as_text():
    class Local(Exception):
        pass

    assert fail(Local("x")).exception is None


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (SystemExit(3), FailureKind.EXITED, "exitcode 3"),
        (SystemExit("no"), FailureKind.EXITED, "exitcode 1"),
        (SystemExit(), FailureKind.EXITED, "exitcode 0"),
        (KeyboardInterrupt(), FailureKind.EXITED, "KeyboardInterrupt"),
        (GeneratorExit("odd"), FailureKind.RAISED, "odd"),
    ],
)
def test_what_would_end_the_driver_is_not_pickled(error, kind, message):
    found = fail(error)
    assert (found.kind, found.message, found.exception) == (kind, message, None)


def test_an_exception_without_text_is_described():
    assert fail(Unprintable()).message == "(its __str__ failed)"


def test_texts_are_bounded():
    found = fail(ShopError("x" * 1_000_000))
    assert len(found.message) == TEXT_LIMIT
    assert len(found.traceback) == TEXT_LIMIT


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Cancelled(), FailureKind.CANCELLED),
        (RetryWanted("again"), FailureKind.RETRY),
        (ReplaceWanted("replaced"), FailureKind.RETRY),
        (Ignore(), FailureKind.RAISED),
        (Reject("no"), FailureKind.RAISED),
    ],
)
def test_celerys_control_exceptions_have_their_kinds(error, kind):
    assert fail(error).kind is kind


def test_ignore_and_reject_travel():
    assert isinstance(pickle.loads(fail(Ignore("x")).exception), Ignore)
    again = pickle.loads(fail(Reject("reason", requeue=True)).exception)
    assert (again.reason, again.requeue) == ("reason", True)


def test_out_of_memory_is_never_pickled():
    found = fail(MemoryError("7 GiB"), out_of_memory=True)
    assert found.kind is FailureKind.OUT_OF_MEMORY
    assert found.exception is None
    assert found.message == "7 GiB"
