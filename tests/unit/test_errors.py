"""The error tree: as drawn, and as it comes out of pickle and of Celery's JSON results."""

import inspect
import pickle
import re

import pytest
from celery import Celery

from bridge import errors
from bridge.errors import BridgeError, StartupError, TaskError

ALL = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, BridgeError)]
ARGUMENTS = {
    "PayloadInvalid": ("shop.add", [{"field": "a", "reason": "Input should be a valid integer", "received": "str"}]),
    "PayloadTooLarge": ("shop.add", 1024),
    "TaskPoisoned": ("shop.crash", 2, "signal 11 (SIGSEGV)"),
    "ResultRefused": ("shop.render", 1 << 26, "OutOfMemoryError: OOM command not allowed"),
    "RemoteTaskError": ("shop.ShopError", "because"),
    "NoSuitableGpu": ("shop.embed", "a GPU of type H100", "actor 0: A100"),
}
app = Celery("errors", backend="cache+memory://", set_as_current=False)


def make(cls):
    return cls(*ARGUMENTS.get(cls.__name__, ("what happened",)))


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_survives_pickle(cls):
    error = make(cls)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_survives_celerys_json_results(cls):
    error = make(cls)
    backend = app.backend
    assert backend.serializer == "json"
    stored = backend.decode(backend.encode(backend.prepare_exception(error)))
    again = backend.exception_to_python(stored)
    assert type(again) is cls
    assert str(again) == str(error)
    assert vars(again).keys() >= vars(error).keys()


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_every_error_says_what_it_is_and_has_one_text(cls):
    assert cls.__doc__
    error = make(cls)
    assert "\n" not in str(error)
    assert all(str(argument) in str(error) for argument in error.args if isinstance(argument, str))
    assert isinstance(cls.retryable, bool)


def drawn():
    """(name, parent, exit code) of each line of the tree in the module's docstring."""
    found, above = [], {}
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│ ├└─]*)([A-Z]\w+)(?:\s+(\d+)\b)?", line)
        if match:
            depth = len(match[1]) // 4
            above[depth] = match[2]
            found.append((match[2], above.get(depth - 1), int(match[3]) if match[3] else None))
    return found


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes():
    there = {(cls.__name__, None if cls is BridgeError else cls.__bases__[0].__name__) for cls in ALL}
    assert {(name, parent) for name, parent, _ in drawn()} == there


def test_exit_codes_are_drawn_unique_and_of_no_other_meaning():
    codes = {cls.__name__: cls.exit_code for cls in ALL if issubclass(cls, StartupError) and cls is not StartupError}
    assert codes == {name: code for name, _, code in drawn() if code}
    assert len(set(codes.values())) == len(codes)
    assert all(64 <= code <= 113 for code in codes.values()), "sysexits and free ones; 126 and above are the shell's"


def test_only_what_time_can_heal_is_retryable():
    assert {cls.__name__ for cls in ALL if cls.retryable} == {
        *["GpuOutOfMemory", "NoSuitableGpu", "ClusterUnavailable", "StoreUnavailable", "HandleLost"]
    }
    assert all(not issubclass(cls, MemoryError) for cls in ALL), "it would end the Celery worker"
    assert issubclass(errors.GpuOutOfMemory, TaskError)


def test_as_text_is_one_bounded_line():
    text = errors.as_text(ValueError("one\ntwo" + "x" * 1000), limit=50)
    assert text.startswith("ValueError: one two")
    assert len(text) == 50
    assert text.endswith("…")
    assert errors.as_text(KeyError("k")) == "KeyError: 'k'"
