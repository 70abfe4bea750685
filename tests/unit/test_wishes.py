"""What a body asks of Celery on a GPU node is recorded, and the body ends as it would have."""

import pickle
import threading

import numpy
import pytest
from celery import Celery
from celery.app.task import Context
from celery.exceptions import Ignore, MaxRetriesExceededError, Retry

from actors.wishes import ReplaceWanted, RetryWanted, Wishes


@pytest.fixture
def told():
    """What has been told while the body ran."""
    return []


@pytest.fixture
def wishes(told):
    return Wishes(told.append)


@pytest.fixture
def task(wishes):
    app = Celery("wishes", set_as_current=False)

    @app.task(name="shop.task", bind=True, max_retries=3, shared=False)
    def body(self):
        pass

    app.finalize()
    task = app.tasks["shop.task"]
    wishes.install(task)
    task.push_request(id="id", retries=0, args=(1,), kwargs={"k": 2}, called_directly=False)
    yield task
    task.pop_request()


def taken(wishes):
    return [tuple(wish) for wish in pickle.loads(wishes.take())]


def test_nothing_wished_is_nothing_sent(wishes):
    assert wishes.take() == b""


def test_progress_is_told_at_once_and_the_body_goes_on(task, wishes, told):
    task.update_state(state="PROGRESS", meta={"done": 3})
    task.send_event("task-progress", done=3)
    assert [tuple(wish) for data in told for wish in pickle.loads(data)] == [
        ("update_state", (), {"state": "PROGRESS", "meta": {"done": 3}}),
        ("send_event", ("task-progress",), {"done": 3}),
    ]
    assert wishes.take() == b"", "it is not told again with the outcome"


def test_a_retry_ends_the_body_as_celerys_does(task, wishes):
    with pytest.raises(Retry) as caught:
        task.retry(exc=KeyError("k"), countdown=5, queue="slow")
    assert isinstance(caught.value, RetryWanted)
    assert isinstance(caught.value.exc, KeyError)
    ((method, args, options),) = taken(wishes)
    assert (method, args) == ("retry", (None, None))
    assert options["countdown"] == 5 and options["queue"] == "slow" and options["throw"] is False
    assert isinstance(options["exc"], KeyError)


def test_a_retry_with_other_arguments(task, wishes):
    with pytest.raises(Retry):
        task.retry((1, 2), {"a": 3})
    ((_, args, _),) = taken(wishes)
    assert args == ((1, 2), {"a": 3})


def test_a_retry_may_be_returned_instead_of_raised(task, wishes):
    assert isinstance(task.retry(throw=False), Retry)
    assert len(taken(wishes)) == 1


def test_the_last_retry_raises_the_error_it_was_for(task, wishes):
    task.request.retries = 3
    with pytest.raises(KeyError):
        task.retry(exc=KeyError("k"))
    with pytest.raises(MaxRetriesExceededError, match=r"Can't retry shop\.task\[id\] args:\(1,\) kwargs:"):
        task.retry()
    assert wishes.take() == b""


def test_what_a_body_leaves_on_its_request_is_for_its_handlers(wishes):
    request = Context({"id": "1", "headers": {"a": 1}}, args=[], kwargs={})
    before = dict(vars(request))
    wishes.add_traces(request, before)
    assert wishes.take() == b""
    request.tenant, request.headers, request._own = "red", numpy.zeros(2), "own"
    request.lock, request.huge = threading.Lock(), "x" * 100_000
    wishes.add_traces(request, before)
    ((values,),) = pickle.loads(wishes.take())
    assert set(values) == {"tenant", "headers"} and values["tenant"] == "red"


def test_the_last_retry_raises_the_tasks_own_exhaustion_error(task):
    """Celery raises `self.MaxRetriesExceededError`, which a task class may set."""

    class Exhausted(MaxRetriesExceededError):
        pass

    task.MaxRetriesExceededError = Exhausted
    task.request.retries = 3
    with pytest.raises(Exhausted) as caught:
        task.retry(args=[7])
    assert caught.value.task_args == [7]


def test_a_limit_of_the_call_counts_instead_of_the_tasks(task, wishes):
    task.request.retries = 3
    with pytest.raises(Retry):
        task.retry(max_retries=5)
    assert taken(wishes)[0][2]["max_retries"] == 5
    task.request.retries = 1
    with pytest.raises(MaxRetriesExceededError):
        task.retry(max_retries=1)


def test_none_as_the_calls_limit_means_the_tasks_as_in_celery(task):
    task.request.retries = 3
    with pytest.raises(MaxRetriesExceededError):
        task.retry(max_retries=None)


def test_a_task_without_a_limit_retries_for_ever(task, wishes):
    task.max_retries = None
    task.request.retries = 1000
    with pytest.raises(Retry):
        task.retry()
    assert len(taken(wishes)) == 1


def test_a_replacement_ends_the_body(task, wishes):
    with pytest.raises(Ignore) as caught:
        task.replace("signature")
    assert isinstance(caught.value, ReplaceWanted)
    assert taken(wishes) == [("replace", ("signature",), {})]
