"""Results that stay on the device: budgets, time to live, and why one is gone."""

import numpy
import pytest
from celery import Celery

from actors.contract import Holdings
from actors.errors import HandleLost
from actors.executor import device, device_results
from actors.executor.device import CpuDevice
from actors.executor.device_results import DeviceResults

KIB = 1024


class SplitDevice(CpuDevice):
    """NumPy whose "device" arrays are of a class of their own, so that it can be seen where one is."""

    class Array(numpy.ndarray):
        pass

    def __init__(self):
        super().__init__("")
        self.is_full = False
        self.is_copying = False  # until the stream is waited for

    def to_device(self, array):
        self.is_copying = True
        return numpy.array(array).view(self.Array)

    def synchronize(self):
        self.is_copying = False

    def to_host(self, array):
        if self.is_full:
            raise MemoryError
        return numpy.array(array)


@pytest.fixture
def gpu(monkeypatch):
    split = SplitDevice()
    monkeypatch.setattr(device, "_current", split)
    return split


@pytest.fixture
def results(gpu):
    return DeviceResults()


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(device_results, "time", clock)
    return clock


def made(gpu, kib=1, value=0.0):
    return gpu.to_device(numpy.full(kib * KIB // 8, value))


def why_lost(results, name, executor=None):
    with pytest.raises(HandleLost) as caught:
        results.get(name, executor or results.executor)
    assert caught.value.retryable
    assert "Send the task again" in str(caught.value)
    return str(caught.value)


def is_on_device(array):
    return isinstance(array, SplitDevice.Array)


def test_the_very_same_array_comes_back(results, gpu):
    array = made(gpu)
    name = results.put(array, 60)
    assert results.get(name, results.executor) is array
    assert results.get(name, results.executor) is array
    assert results.holdings() == Holdings(1, KIB, 0)


def test_ids_say_nothing_and_differ(results, gpu):
    names = {results.put(made(gpu), 60) for _ in range(20)}
    assert len(names) == 20 and all(len(name) == 32 for name in names)
    assert DeviceResults().executor != results.executor


def test_the_least_recently_used_moves_to_the_host_and_back(results, gpu):
    results.device_limit_bytes = 2 * KIB
    a, b = results.put(made(gpu, value=1), 60), results.put(made(gpu, value=2), 60)
    results.get(a, results.executor)
    c = results.put(made(gpu, value=3), 60)
    assert results.holdings() == Holdings(3, 2 * KIB, KIB)
    assert list(results._host.held) == [b], "a has been used since"
    again = results.get(b, results.executor)
    assert is_on_device(again) and float(again[0]) == 2.0
    assert results.holdings() == Holdings(3, 2 * KIB, KIB)
    assert is_on_device(results.get(c, results.executor)), "a was used longest ago"
    assert list(results._host.held) == [a]


def test_one_that_comes_back_is_complete_before_another_stream_can_see_it(results, gpu):
    name = results.put(made(gpu), 60)
    results.spill()
    gpu.is_copying = False
    results.get(name, results.executor)
    assert not gpu.is_copying


def test_a_row_held_as_a_copy_is_complete_too(results, gpu):
    batch = made(gpu, 64).reshape(64, -1)
    assert gpu.is_copying
    results.put(batch[0], 60)
    assert not gpu.is_copying


def test_a_body_s_host_array_is_complete_on_the_device_before_it_is_held(gpu, monkeypatch):
    from actors.contract import Config, Release
    from actors.executor.opening import Opener

    held = []
    monkeypatch.setattr(DeviceResults, "put", lambda *_: held.append(gpu.is_copying) or "ab")
    config = Config(Release("r", "lab:app", "", (), "", (), (), ()), "cpu", "90%", 30, 1000, "50%")
    Opener(Celery("lab", broker="memory://", set_as_current=False), config, gpu, lambda call, *args: call(*args)).kept(
        numpy.ones(3), False, ("", "")
    )
    assert held == [False]


def test_one_that_is_larger_than_the_budget_waits_on_the_host(results, gpu):
    results.device_limit_bytes = KIB
    small, large = results.put(made(gpu), 60), results.put(made(gpu, 4), 60)
    assert results.holdings() == Holdings(2, 0, 5 * KIB)
    assert is_on_device(results.get(large, results.executor)), "while it is used, the budget gives way"
    assert results.holdings() == Holdings(2, 4 * KIB, KIB)
    results.tidy()
    assert results.holdings().device_bytes == 0
    assert is_on_device(results.get(small, results.executor))


def test_beyond_the_hosts_budget_the_oldest_is_dropped_and_says_so(results, gpu):
    results.device_limit_bytes, results.host_limit_bytes = KIB, 2 * KIB
    names = [results.put(made(gpu, value=value), 60) for value in range(4)]
    assert results.holdings() == Holdings(3, KIB, 2 * KIB)
    assert "dropped to make room (BRIDGE_DEVICE_RESULTS_LIMIT" in why_lost(results, names[0])
    assert [float(results.get(name, results.executor)[0]) for name in names[1:]] == [1, 2, 3]


def test_a_bound_on_their_number_holds_too(results, gpu, monkeypatch):
    monkeypatch.setattr(device_results, "MOST_ARRAYS", 3)
    names = [results.put(made(gpu), 60) for _ in range(5)]
    assert results.holdings().arrays == 3
    assert "dropped to make room" in why_lost(results, names[1])
    for _ in range(20):
        results.put(made(gpu), 60)
    assert len(results._ends) <= 12


def test_expired_ones_go_and_say_so(results, gpu, clock):
    short, long = results.put(made(gpu), 10), results.put(made(gpu), 60)
    assert results.expires_in_s() == 10
    clock.now += 11
    assert results.expires_in_s() == 0
    results.tidy()
    assert results.holdings() == Holdings(1, KIB, 0)
    assert "time to live is over" in why_lost(results, short)
    clock.now += 60
    assert "time to live is over" in why_lost(results, long), "also when nobody has tidied up"
    assert results.expires_in_s() is None


def test_use_does_not_prolong_its_life(results, gpu, clock):
    name = results.put(made(gpu), 10)
    clock.now += 9
    results.get(name, results.executor)
    clock.now += 2
    why_lost(results, name)


def test_deleted_and_unknown_ones_say_so(results, gpu):
    name = results.put(made(gpu), 60)
    results.drop([name, "never there"])
    assert results.holdings() == Holdings()
    assert "it was deleted" in why_lost(results, name)
    assert "nobody knows it" in why_lost(results, "made up")


def test_another_executors_are_refused_whatever_their_id(results, gpu):
    name = results.put(made(gpu), 60)
    assert "has ended, or belongs to another app" in why_lost(results, name, executor="feed")


def test_reasons_are_kept_for_a_bounded_number(results, gpu, monkeypatch):
    monkeypatch.setattr(device_results, "MOST_REASONS", 3)
    names = [results.put(made(gpu), 60) for _ in range(5)]
    results.drop(names)
    assert "nobody knows" in why_lost(results, names[1])
    assert "deleted" in why_lost(results, names[2])


def test_when_memory_is_short_all_go_but_those_in_use(results, gpu):
    old, used = results.put(made(gpu), 60), results.put(made(gpu), 60)
    results.forget_touched()
    array = results.get(used, results.executor)
    assert results.spillable_bytes() == KIB
    results.spill()
    assert results.holdings() == Holdings(2, KIB, KIB)
    assert results.get(used, results.executor) is array
    assert results.spillable_bytes() == 0
    assert is_on_device(results.get(old, results.executor))


def test_no_more_is_moved_than_is_needed(results, gpu):
    for _ in range(3):
        results.put(made(gpu), 60)
    results.forget_touched()
    results.spill(lambda: results.holdings().device_bytes <= KIB)
    assert results.holdings() == Holdings(3, KIB, 2 * KIB)


def test_one_that_the_host_cannot_take_either_is_dropped(results, gpu):
    name = results.put(made(gpu), 60)
    results.forget_touched()
    gpu.is_full = True
    results.spill()
    assert results.holdings() == Holdings()
    assert "dropped to make room" in why_lost(results, name)


def test_a_view_counts_as_what_it_keeps_alive(results, gpu):
    results.put(made(gpu, 8)[:600], 60)
    assert results.holdings().device_bytes == 8 * KIB


def test_a_small_view_of_much_is_held_as_a_copy(results, gpu):
    batch = made(gpu, 64).reshape(64, -1)
    names = [results.put(row, 60) for row in batch]
    assert results.holdings().device_bytes == 64 * KIB
    assert all(is_on_device(results.get(name, results.executor)) for name in names)


def test_small_ones_count_as_the_pool_counts_them(results, gpu):
    results.put(gpu.to_device([1.0]), 60)
    assert results.holdings().device_bytes == 512


def test_changes_are_counted(results, gpu):
    seen = [results.changes]
    name = results.put(made(gpu), 60)
    seen.append(results.changes)
    results.forget_touched()
    results.spill()
    seen.append(results.changes)
    results.get(name, results.executor)
    seen.append(results.changes)
    results.drop([name])
    seen.append(results.changes)
    assert seen == sorted(set(seen)), "the actor is told of each"
