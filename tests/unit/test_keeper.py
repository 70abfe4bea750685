"""What the keeper of data in Ray's object store counts, without Ray."""

import pytest

from actors.ray_store import Keeper


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
