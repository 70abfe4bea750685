"""In the driver: outcomes become what the body returned or raised (`bridge/driver/outcomes.py`)."""

import logging
import pickle

import pytest
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded

from actors.contract import Failed, FailureKind, LogLine, Succeeded
from actors.wishes import Wish
from bridge.driver.outcomes import RemoteTraceback, resolve
from bridge.errors import GpuOutOfMemory, RemoteTaskError, ResultInvalid, TaskNotOnActor


class Task:
    """Notes what it is asked."""

    name = "shop.add"

    def __init__(self):
        self.asked = []

    def retry(self, *args, **kwargs):
        self.asked.append(("retry", args, kwargs))
        return Retry("again", kwargs.get("exc"), 3)

    def replace(self, sig):
        self.asked.append(("replace", (sig,), {}))
        raise Ignore("Replaced by new task")

    def update_state(self, *args, **kwargs):
        self.asked.append(("update_state", args, kwargs))


class ShopError(Exception):
    def __init__(self, code, reason):
        super().__init__(code, reason)
        self.code = code


class Gone(Exception):
    """Cannot be loaded again."""

    def __reduce__(self):
        return vanish, ()


def vanish():
    raise ImportError("no such class here")


def succeeded(value, **options):
    return Succeeded("t", pickle.dumps(value), 0.1, 1, **options)


def failed(error=None, kind=FailureKind.RAISED, message="why", **options):
    pickled = pickle.dumps(error) if error is not None else None
    return Failed("t", kind, "shop.Error", message, "Traceback: somewhere", pickled, **options)


def raised(outcome, task=None):
    with pytest.raises(BaseException) as caught:
        resolve(task or Task(), outcome)
    return caught.value


@pytest.mark.parametrize("value", [None, 1, [1, {"a": (2, b"3")}], "x" * 100_000])
def test_a_value_is_the_value(value):
    assert resolve(Task(), succeeded(value)) == value


@pytest.mark.parametrize(
    "error", [ShopError(3, "because"), KeyError("k"), SoftTimeLimitExceeded(), Reject("no", False)]
)
def test_the_bodys_own_exception_is_raised_with_where_it_came_from(error):
    found = raised(failed(error))
    assert type(found) is type(error)
    assert found.args == error.args
    assert isinstance(found.__cause__, RemoteTraceback)
    assert "somewhere" in str(found.__cause__)


def test_what_cannot_be_rebuilt_is_named():
    assert str(raised(failed())) == "shop.Error: why"
    assert isinstance(raised(failed()), RemoteTaskError)
    assert isinstance(raised(failed(Gone())), RemoteTaskError)


def test_what_is_no_exception_after_all_is_named_too():
    assert isinstance(raised(failed("only text")), RemoteTaskError)


@pytest.mark.parametrize("error", [MemoryError("7 GiB"), type("Sub", (MemoryError,), {})])
def test_no_memory_error_reaches_celery(error):
    outcome = failed(MemoryError("7 GiB")) if isinstance(error, MemoryError) else failed(kind=FailureKind.OUT_OF_MEMORY)
    found = raised(outcome)
    assert isinstance(found, GpuOutOfMemory)
    assert not isinstance(found, MemoryError)
    assert "why" in str(found)


@pytest.mark.parametrize(
    ("kind", "cls"), [(FailureKind.UNKNOWN_TASK, TaskNotOnActor), (FailureKind.NOT_SENDABLE, ResultInvalid)]
)
def test_our_own_kinds_have_their_own_class(kind, cls):
    found = raised(failed(kind=kind))
    assert type(found) is cls
    assert "why" in str(found)


def test_wishes_are_granted_in_order_before_the_value():
    task = Task()
    wishes = pickle.dumps([Wish("update_state", (), {"state": "A"}), Wish("update_state", (), {"state": "B"})])
    assert resolve(task, succeeded(1, wishes=wishes)) == 1
    assert [options["state"] for _, _, options in task.asked] == ["A", "B"]


def test_a_retry_is_asked_of_the_real_task_and_raised():
    task = Task()
    error = ShopError(1, "x")
    wishes = pickle.dumps([Wish("retry", (None, None), {"exc": error, "throw": False, "countdown": 3})])
    found = raised(failed(Retry("wanted"), FailureKind.RETRY, wishes=wishes), task)
    assert isinstance(found, Retry)
    assert found.message == "again", "the real task's exception, not the recorded one"
    ((name, args, options),) = task.asked
    assert (name, args, options["countdown"]) == ("retry", (None, None), 3)


def test_a_replacement_is_asked_of_the_real_task():
    task = Task()
    found = raised(failed(Ignore("x"), FailureKind.RETRY, wishes=pickle.dumps([Wish("replace", ("sig",), {})])), task)
    assert isinstance(found, Ignore)
    assert task.asked == [("replace", ("sig",), {})]


def test_a_retry_that_celery_refuses_raises_what_celery_raises():
    class Refuses(Task):
        def retry(self, *args, **kwargs):
            raise kwargs["exc"]

    wishes = pickle.dumps([Wish("retry", (None, None), {"exc": KeyError("over"), "throw": False})])
    assert isinstance(raised(failed(Retry("wanted"), FailureKind.RETRY, wishes=wishes), Refuses()), KeyError)


def test_logs_are_logged_here_whatever_the_outcome(caplog):
    lines = (
        LogLine(logging.INFO, "shop.images", "100 % done %s", False),
        LogLine(logging.ERROR, "resolve.of_task", "hot", True),  # its logger stays a task logger in this process
    )
    with caplog.at_level(logging.INFO):
        resolve(Task(), succeeded(1, logs=lines))
        raised(failed(logs=lines))
    found = [(record.name, record.levelno, record.getMessage()) for record in caplog.records]
    assert found == [tuple(line[i] for i in (1, 0, 2)) for line in lines] * 2


def test_a_line_keeps_when_and_where_it_was_logged_and_its_extra(caplog):
    line = LogLine(logging.INFO, "shop", "done", False, 5.0, ("shop.py", 7, "body"), pickle.dumps({"tenant": "red"}))
    with caplog.at_level(logging.INFO):
        resolve(Task(), succeeded(1, logs=(line,)))
    (record,) = caplog.records
    assert (record.created, record.pathname, record.lineno, record.funcName) == (5.0, "shop.py", 7, "body")
    assert record.tenant == "red"
