"""What stays on the device is loaded once per process."""

import threading

import pytest

from actors import residents
from actors.residents import load_all, resident


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(residents, "_registry", [])


def test_it_is_loaded_at_its_first_use_and_kept():
    loads = []

    @resident
    def table():
        """A table."""
        loads.append(1)
        return [1, 2]

    assert loads == []
    assert "(not loaded)" in repr(table)
    assert table() is table()
    assert loads == [1]
    assert "(not loaded)" not in repr(table)
    assert table.__doc__ == "A table."
    assert table.__wrapped__() == [1, 2]


def test_none_is_a_value_too():
    loads = []
    nothing = resident(lambda: loads.append(1))
    assert nothing() is None and nothing() is None
    assert loads == [1]


def test_concurrent_first_use_loads_once():
    loads, barrier = [], threading.Barrier(16)
    inside = threading.Event()

    @resident
    def model():
        loads.append(threading.get_ident())
        inside.wait(0.05)
        return object()

    found = []

    def use():
        barrier.wait()
        found.append(model())

    threads = [threading.Thread(target=use) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(loads) == 1
    assert len(found) == 16 and len(set(map(id, found))) == 1


def test_a_failed_load_is_tried_again():
    attempts = []

    @resident
    def flaky():
        attempts.append(1)
        if len(attempts) < 3:
            raise OSError("not yet")
        return "loaded"

    for _ in range(2):
        with pytest.raises(OSError, match="not yet"):
            flaky()
    assert flaky() == "loaded"


def test_what_was_dropped_is_loaded_again():
    loads = []

    @resident
    def table():
        loads.append(1)
        return len(loads)

    assert table() == 1
    table.drop()
    assert table() == 2


def test_one_may_use_another():
    @resident
    def weights():
        return [1, 2]

    @resident
    def model():
        return sum(weights())

    assert model() == 3


def test_warm_up_loads_all_and_names_them():
    @resident
    def one():
        return 1

    @resident
    def two():
        return 2

    names = load_all()
    assert [name.rpartition(".")[2] for name in names] == ["one", "two"]
    assert "(not loaded)" not in repr(one) + repr(two)


def test_warm_up_says_what_failed():
    @resident
    def broken():
        raise FileNotFoundError("weights.bin")

    with pytest.raises(FileNotFoundError):
        load_all()
