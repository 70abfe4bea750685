"""What stays on the device is loaded once per process."""

import gc
import logging
import threading
import weakref

import numpy
import pytest

from actors.executor import device, device_results, residents
from actors.executor.device import CpuDevice
from actors.executor.device_results import DeviceResults
from actors.executor.residents import Residents, load_all, resident


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    """What is loaded, empty and without a limit."""
    monkeypatch.setattr(residents, "_registry", [])
    monkeypatch.setattr(residents, "shared", Residents())
    monkeypatch.setattr(device, "_current", CpuDevice(""))
    return residents.shared


class Weights:
    """A value whose end can be seen, with an array of so many bytes."""

    def __init__(self, size_bytes):
        self.array = numpy.zeros(size_bytes, numpy.uint8)


def names(found):
    return [name.rpartition(".")[2] for name in found]


@pytest.fixture
def model():
    """A loader with an argument; `model.loads` are the arguments it was called with."""
    loads = []

    @resident
    def model(size_bytes):
        loads.append(size_bytes)
        return Weights(size_bytes)

    model.loads = loads
    return model


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

    assert names(load_all()) == ["one", "two"]
    assert "(not loaded)" not in repr(one) + repr(two)


def test_warm_up_says_what_failed():
    @resident
    def broken():
        raise FileNotFoundError("weights.bin")

    with pytest.raises(FileNotFoundError):
        load_all()


# ---- arguments


def test_it_is_loaded_once_for_each_set_of_arguments(model):
    assert model(10) is model(10) is not model(20)
    assert model(size_bytes=10) is model(10), "however it is written"
    assert model.loads == [10, 20]


def test_each_set_of_arguments_has_its_name(shared, model):
    model(10), model(size_bytes=20)
    assert names(shared.sizes()) == ["model(10)", "model(20)"]


def test_defaults_are_arguments_too(shared):
    @resident
    def model(kind="small", *, layers=2):
        return [kind]

    assert model() is model("small") is model(layers=2) is not model(layers=3)
    assert names(shared.sizes()) == ["model('small', layers=2)", "model('small', layers=3)"]


def test_long_arguments_do_not_make_long_names(shared):
    model = resident(lambda text: text)
    assert model("x" * 10_000) == "x" * 10_000
    assert [len(name) for name in shared.sizes()] == [200]


def test_nothing_is_dropped_while_the_device_may_read_it(shared, model, monkeypatch):
    steps, gone = [], weakref.ref(model(80))
    monkeypatch.setattr(CpuDevice, "synchronize_all", lambda self: steps.append(gone() is None))
    model.drop(80)
    assert steps == [False] and gone() is None


def test_arguments_must_fit_and_be_hashable(model):
    with pytest.raises(TypeError, match="unhashable"):
        model([1])
    with pytest.raises(TypeError, match="size_bytes"):
        model()
    with pytest.raises(TypeError, match="too many"):
        resident(lambda: 1)(2)


def test_concurrent_first_use_with_arguments_loads_each_once(model):
    barrier, found = threading.Barrier(16), []

    def use(number):
        barrier.wait()
        found.append(model(number % 2))

    threads = [threading.Thread(target=use, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(model.loads) == [0, 1]
    assert len(found) == 16 and len(set(map(id, found))) == 2


def test_one_may_use_itself_with_other_arguments():
    @resident
    def power(number):
        return 1 if number == 0 else 2 * power(number - 1)

    assert power(5) == 32


def test_warm_up_leaves_what_needs_arguments_or_says_so(model):
    @resident(preload=False)
    def later():
        raise AssertionError("not at warm-up")

    @resident
    def with_default(size=1):
        return size

    assert names(load_all()) == ["with_default"]
    assert model.loads == []
    with pytest.raises(AssertionError):
        later()


def test_one_set_of_arguments_can_be_dropped_and_all_can(model):
    model(1), model(2), model(3)
    model.drop(2)
    model(1), model(2)
    assert model.loads == [1, 2, 3, 2]
    model.drop()
    model(1), model(3)
    assert model.loads == [1, 2, 3, 2, 1, 3]


# ---- bytes and budget


def test_its_bytes_are_those_of_its_arrays(shared, model):
    model(1000)
    assert list(shared.sizes().values()) == [1000]
    assert shared.size_bytes() == 1000


def test_bytes_of_the_pool_count_where_they_are_more(shared, monkeypatch):
    """Less what other residents, loaded meanwhile, have taken of it."""
    pooled = [0]
    monkeypatch.setattr(CpuDevice, "pooled_bytes", lambda self: pooled[0])

    @resident
    def weights():
        pooled[0] += 300

    @resident
    def model():
        weights()
        pooled[0] += 50

    model()
    assert [(name.rpartition(".")[2], size) for name, size in shared.sizes().items()] == [
        ("weights", 300),
        ("model", 50),
    ]


def test_the_least_recently_used_go_until_the_budget_holds(shared, model):
    shared.limit_bytes = 100
    model(40), model(41), model(40)
    model(59)
    assert names(shared.sizes()) == ["model(40)", "model(59)"]
    model(90)
    assert names(shared.sizes()) == ["model(90)"]
    assert model.loads == [40, 41, 59, 90]
    model(41)
    assert model.loads[-1] == 41, "what went is loaded again"


def test_one_larger_than_the_budget_stays_alone_and_is_said(shared, model, caplog):
    shared.limit_bytes = 1024
    model(100)
    with caplog.at_level(logging.WARNING):
        model(2048)
    assert names(shared.sizes()) == ["model(2048)"]
    assert model(2048) and model.loads == [100, 2048]
    assert "2.0 KiB" in caplog.text and "1.0 KiB" in caplog.text


def test_who_holds_a_value_keeps_it_when_it_goes(shared, model):
    shared.limit_bytes = 100
    held = model(80)
    seen = weakref.ref(held)
    model(90)
    assert names(shared.sizes()) == ["model(90)"]
    assert held.array.nbytes == 80
    del held
    gc.collect()
    assert seen() is None, "and nobody else does"


def test_memory_is_given_back_after_one_has_gone(shared, model, monkeypatch):
    """Also, nothing is dropped while the device may still read it."""
    steps, gone = [], weakref.ref(model(80))
    monkeypatch.setattr(CpuDevice, "synchronize_all", lambda self: steps.append(("wait", gone() is None)))
    monkeypatch.setattr(CpuDevice, "free", lambda self: steps.append(("free", gone() is None)))
    shared.evict(())
    assert steps == [("wait", False), ("free", True)]


def test_those_in_use_are_kept_when_others_go(shared, model):
    model(1), model(2), model(3)
    shared.evict((), lambda: shared.size_bytes() <= 5)
    assert names(shared.sizes()) == ["model(2)", "model(3)"]
    kept = [name for name in shared.sizes() if name.endswith("model(2)")]
    shared.evict(kept)
    assert names(shared.sizes()) == ["model(2)"]
    assert not shared.can_evict(kept) and shared.can_evict(())


def test_what_was_used_is_known(shared, model):
    model(1), model(2)
    shared.forget_touched()
    assert shared.touched() == ()
    model(2), model(2)
    assert names(shared.touched()) == ["model(2)"]


def test_every_change_is_counted(shared, model):
    before = shared.changes
    model(1)
    assert shared.changes == before + 1
    model(1)
    assert shared.changes == before + 1
    shared.evict(())
    assert shared.changes == before + 2
    model.drop()
    assert shared.changes == before + 2, "nothing was there"


def test_a_load_that_lacks_memory_is_tried_again_without_those_not_in_use(shared, model):
    attempts = []

    @resident
    def large():
        attempts.append(names(shared.sizes()))
        if len(shared.sizes()) > 1:
            raise MemoryError("no room")
        return "large"

    model(1), model(2)
    shared.forget_touched()
    model(2)
    assert large() == "large"
    assert attempts == [["model(1)", "model(2)"], ["model(2)"]]


def test_a_load_that_lacks_memory_sends_results_that_stay_to_the_host(shared, monkeypatch):
    results = DeviceResults()
    monkeypatch.setattr(device_results, "shared", results)
    results.put(numpy.zeros(1024), 60)
    results.forget_touched()

    @resident
    def large():
        if results.holdings().device_bytes:
            raise MemoryError("no room")
        return "large"

    assert large() == "large"
    assert results.holdings().arrays == 1


def test_a_load_that_lacks_memory_with_nothing_to_give_up_fails(shared, model):
    attempts = []

    @resident
    def large():
        attempts.append(1)
        raise MemoryError("no room")

    model(1)
    with pytest.raises(MemoryError):
        large()
    assert len(attempts) == 1, "what this body uses stays"
    assert names(shared.sizes()) == ["model(1)"]
