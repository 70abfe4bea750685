"""Deleting what tasks have left behind waits for nobody and piles up nowhere."""

import threading

import pytest
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.exceptions import Retry

from actors.data.arrays import ArrayRef
from actors.data.blobs import BlobRef
from bridge.driver import discards
from bridge.driver.discards import Discards, is_final, once_in
from bridge.driver.tracing import einfo
from bridge.driver.verdicts import Standing
from bridge.errors import DataRefused, TaskPoisoned
from bridge.link import Done, Ended, Flushed, TimedOut
from tests.support.services import wait_for


def test_each_is_deleted_in_turn():
    deleted = []
    Discards(deleted.append).add(["a", "b"])
    assert wait_for(lambda: deleted == ["a", "b"], "both to be deleted")


def test_one_that_may_not_be_deleted_costs_no_other(caplog):
    deleted = []

    def delete(ref):
        if ref == "theirs":
            raise DataRefused("only what `put` has made is deleted")
        deleted.append(ref)

    Discards(delete).add(["a", "theirs", "b"])
    assert wait_for(lambda: deleted == ["a", "b"], "the others to be deleted")
    assert "only what `put` has made" in caplog.text


def test_a_store_that_hangs_blocks_nobody_and_one_that_fails_is_left_alone_for_a_while(monkeypatch, caplog):
    monkeypatch.setattr(discards, "MOST_WAITING", 3)
    gate, asked = threading.Event(), []

    def delete(ref):
        asked.append(ref)
        gate.wait(60)
        raise OSError("away")

    all_of_them = Discards(delete)
    all_of_them.add(["first"])
    wait_for(lambda: asked == ["first"], "it to hang")
    all_of_them.add(range(100))  # does not wait
    gate.set()
    wait_for(lambda: all_of_them._waiting.empty(), "the others to be let go")
    assert asked == ["first"] and "left to expire: OSError: away" in caplog.text


def failed(error):
    return Done(1, (True, einfo(error), 0.0))


LATE = Standing(True, True, False, 2, 0, 0, False)
EARLY = LATE._replace(acks_late=False)


@pytest.mark.parametrize(
    ("message", "task", "acks_on_timeout", "expected"),
    [
        (Done(1, (False, "value", 0.1)), LATE, True, True),
        (failed(ValueError()), LATE, True, True),
        (failed(Retry()), LATE, True, False),
        (failed(TaskPoisoned("shop.norm", 2, "signal 11")), LATE, True, False),
        (TimedOut(1, 1.0), LATE, True, True),
        (TimedOut(1, 1.0), LATE, False, False),
        (TimedOut(1, 1.0), EARLY, False, True),
        (Ended(1, einfo(WorkerLostError())), EARLY, True, True),
        (Ended(1, einfo(WorkerLostError())), LATE, True, False),
        (Ended(1, einfo(WorkerLostError())), LATE._replace(reject_on_worker_lost=False), True, True),
        (Ended(1, einfo(WorkerLostError())), EARLY._replace(retry_on_worker_lost=True), True, False),
        (Ended(1, einfo(TimeLimitExceeded(1))), LATE, True, True),
        (Ended(1, einfo(Terminated(15))), EARLY, True, False),
        (Flushed(1), EARLY, True, False),
    ],
)
def test_data_go_after_a_tasks_last_run(message, task, acks_on_timeout, expected):
    assert is_final(message, task, acks_on_timeout) is expected


def test_what_a_revoked_task_was_to_take_is_found_wherever_it_is():
    array = ArrayRef(url="redis:" + "0" * 32, dtype="<f8", shape=(1,), size_bytes=8, once=True)
    blob = BlobRef(url="redis:" + "1" * 32, size_bytes=8, once=True)
    args = [array, {"deep": [blob.model_dump(mode="json")]}, array.model_copy(update={"once": False}), 3, "once"]
    args += [{"kind": "ref", "once": True, "odd": 1}]
    assert set(once_in([args, {"a": (blob,)}])) == {array, blob}
    assert once_in([list(range(discards.MOST_OBJECTS)), [array]]) == (array,), "near the top it is found in any case"
    assert once_in([[[array]], list(range(discards.MOST_OBJECTS))]) == ()
