"""What the keeper of data in Ray's object store counts, without Ray."""

import threading

import pytest

from actors.data import ray_store
from actors.data.ray_store import Keeper
from tests.support.services import wait_for


@pytest.fixture
def keeper(monkeypatch):
    plain = Keeper.__ray_metadata__.modified_class
    monkeypatch.setattr(plain, "_tend", lambda self: None)
    return plain()


def test_what_is_told_twice_is_counted_once(keeper):
    """Ray says that an actor "is unavailable" where it does not know whether it was heard; it is asked again."""
    for _ in range(2):
        assert keeper.keep("one", ["reference"], 60, 10.0, 100, True) == ""
    assert keeper.holdings() == (1, 60)
    assert "BRIDGE_DATA_RAY_BYTES" in keeper.keep("other", ["reference"], 60, 10.0, 100, True)
    keeper.forget(["one"])
    assert keeper.holdings() == (0, 0) and keeper.keep("other", ["reference"], 60, 10.0, 100, True) == ""


def test_a_keeper_that_ray_does_not_end_goes_on_forgetting(monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(ray_store, "KEEP_IDLE_S", 0.0)  # without Ray it cannot even say who it is
    monkeypatch.setattr(ray_store.ray, "get_runtime_context", lambda: asked.set() or 1 / 0)
    keeper = Keeper.__ray_metadata__.modified_class()
    assert asked.wait(10)
    assert keeper.keep("one", ["reference"], 60, 0.0, 100, True) == ""
    wait_for(lambda: keeper.holdings() == (0, 0), "what has expired to go")
    keeper._lock.acquire()  # its thread is not to meet the real Ray
