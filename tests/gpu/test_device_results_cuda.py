"""Results that stay on a real GPU: the same memory, bytes as the pool counts them, to the host and back, no leak."""

import gc

import numpy
import pytest

from actors.data.foreign import is_device_array
from actors.executor import device
from actors.executor.device import open_device
from actors.executor.device_results import DeviceResults
from actors.executor.leaks import Leaks
from actors.executor.residents import Residents

MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def gpu():
    try:
        import cupy

        assert cupy.cuda.runtime.getDeviceCount() > 0
    except Exception as error:
        pytest.skip(f"no CUDA device here: {type(error).__name__}: {error}")
    before = device._current
    yield open_device("cuda", "90%")
    device._current = before


@pytest.fixture
def results(gpu):
    gc.collect()
    gpu.free()
    return DeviceResults()


def test_the_next_body_gets_the_same_memory(gpu, results):
    array = gpu.xp.arange(MIB)
    name = results.put(array, 60)
    assert results.get(name, results.executor).data.ptr == array.data.ptr


@pytest.mark.parametrize("count", [1, 63, 1000, MIB])
def test_its_bytes_are_what_it_takes_of_the_pool(gpu, results, count):
    before = gpu.pooled_bytes()
    results.put(gpu.xp.zeros(count), 60)
    assert results.device_bytes() == gpu.pooled_bytes() - before


def test_it_moves_to_the_host_with_its_memory_and_comes_back(gpu, results):
    before = gpu.memory(0).free
    name = results.put(gpu.xp.full(64 * MIB, 7.0), 60)
    assert gpu.memory(0).free <= before - 500 * MIB
    results.spill()
    assert gpu.memory(0).free >= before - 16 * MIB
    assert results.holdings().host_bytes == 512 * MIB
    assert isinstance(results._host.held[name].array, numpy.ndarray)
    again = results.get(name, results.executor)
    assert is_device_array(again) and float(again.min()) == float(again.max()) == 7.0


def test_what_another_stream_still_writes_is_complete_on_the_host(gpu, results):
    stream = gpu.streams(1)[0]
    with stream:
        array = gpu.xp.zeros(32 * MIB)
        for _ in range(50):
            array += 1
        name = results.put(array, 60)
    results.spill()
    host = results._host.held[name].array
    assert host.min() == host.max() == 50


def test_what_comes_back_on_one_stream_is_complete_for_another(gpu, results):
    """Bodies of `Gpu(streams=2)`: the first fetches a spilled array, the second takes it from the device at once."""
    first, second = gpu.streams(2)
    for value in range(5):
        name = results.put(gpu.xp.full(64 * MIB, float(value)), 60)
        results.forget_touched()
        results.spill()
        with first:
            results.get(name, results.executor)
        with second:
            array = results.get(name, results.executor)
            assert float(array.min()) == float(array.max()) == value
        del array
        results.drop([name])


def test_a_copy_of_a_row_made_on_one_stream_is_complete_for_another(gpu, results):
    first, second = gpu.streams(2)
    with first:
        batch = gpu.xp.zeros((4, 32 * MIB))
        for _ in range(20):
            batch += 1
        name = results.put(batch[3], 60)
    with second:
        array = results.get(name, results.executor)
        assert array.base is None and float(array.min()) == float(array.max()) == 20


def test_a_row_of_a_batch_is_held_as_a_copy(gpu, results):
    before = gpu.pooled_bytes()
    batch = gpu.xp.zeros((64, MIB))
    names = [results.put(row, 60) for row in batch[:2]]
    assert results.device_bytes() == 2 * 8 * MIB
    del batch
    gpu.free()
    assert gpu.pooled_bytes() - before == results.device_bytes(), "the others have gone"
    assert float(results.get(names[1], results.executor).sum()) == 0.0


def test_held_results_are_no_leak(gpu, results):
    leaks = Leaks(gpu, Residents(), results, 10 * MIB)
    results.put(gpu.xp.zeros(32 * MIB), 60)
    leaks.note("task")
    assert leaks.complaint() == ""
    results.spill()
    leaks.note("task")
    assert leaks.complaint() == ""
