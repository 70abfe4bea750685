"""Deleting what tasks have left behind waits for nobody and piles up nowhere."""

import threading

from bridge import discards
from bridge.discards import Discards
from bridge.errors import DataRefused
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
