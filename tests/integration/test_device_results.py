"""Results that stay, with real executor processes: what the actor hears of them, and how they make room and end."""

import pickle

import numpy
import pytest

from actors.contract import FailureKind, StoreConfig
from actors.data.arrays import ArrayRef, ArraySpec
from actors.data.handles import DeviceArray
from actors.errors import HandleLost, StoreUnavailable
from actors.executor.errands import DELETE, EXPORT
from actors.unopened import Unopened
from tests.integration import test_executor as executors
from tests.integration.test_executor import exception, value
from tests.support.services import wait_for

APP = """
import numpy
from celery import Celery
from actors.executor import device_results
from actors.executor.device import current_device
from bridge import Gpu

app = Celery("staying", broker="memory://")
KIB = 1024


@app.task(name="d.made", gpu=Gpu(result="device"))
def made(kib, count=1):
    return [numpy.full(kib * KIB // 8, float(kib)) for _ in range(count)]

@app.task(name="d.kept", gpu=Gpu(result="device", keep_copy=True))
def kept(kib): return numpy.ones(kib * KIB // 8)

@app.task(name="d.half_sendable", gpu=Gpu(result="device"))
def half_sendable(): return [numpy.ones(10), lambda: None]

@app.task(name="d.too_much", gpu=Gpu(result="device"))
def too_much(also_alone):
    "The device, from now on, is full for what is to be put on it, while it has results or whatever it has."
    device = current_device()
    def to_device(array):
        if also_alone or device_results.shared.holdings().device_bytes:
            raise MemoryError("out of memory")
        return array
    device.to_device = to_device
    return numpy.ones(1000)

@app.task(name="d.stored", gpu=Gpu(result="ref"))
def stored(given): return [numpy.ones(3), b"bytes", given]

@app.task(name="d.scalars", gpu=Gpu(result="device"))
def scalars(): return {"mean": numpy.float64(0.5), "empty": numpy.zeros((0, 3)), "point": numpy.array(2.0)}

@app.task(name="d.eigh", gpu=Gpu(result="device"))
def eigh(): return numpy.linalg.eigh(numpy.eye(2))

@app.task(name="d.eigh_by_reference", gpu=Gpu(result="ref"))
def eigh_by_reference(): return [numpy.linalg.eigh(numpy.eye(2))]

@app.task(name="d.values_of", gpu=True)
def values_of(pair): return type(pair).__name__, pair.eigenvalues.sum() + pair.eigenvectors.sum()

@app.task(name="d.where", gpu=True)
def where(values): return values.__array_interface__["data"][0], float(values.sum())

@app.task(name="d.held", gpu=True)
def held(): return tuple(device_results.shared.holdings())

@app.task(name="d.large", gpu=Gpu(memory="70KiB"))
def large(): return tuple(device_results.shared.holdings())

@app.task(name="d.short_once", gpu=True, acks_late=True)
def short_once(values, path):
    held = tuple(device_results.shared.holdings())
    if held[1] > values.nbytes:
        raise MemoryError("no room")
    return held
"""
NAMES = "made kept half_sendable too_much stored scalars where held large short_once eigh eigh_by_reference values_of"
TASKS = [EXPORT, DELETE, *(f"d.{name}" for name in NAMES.split())]
KIB = 1024


def task(name, *args, stays=True, **options):
    opened = tuple(Unopened(ArraySpec(), each) if isinstance(each, DeviceArray) else each for each in args)
    name = name if "." in name else f"d.{name}"
    route = {"delivery_info": {"exchange": "", "routing_key": "gpu"}}
    return executors.task(name, *opened, context=route, **options)._replace(stays=stays)


class Driver(executors.Driver):
    def value(self, name, *args, **options):
        return self.values(task(name, *args, **options))[0]

    def made(self, kib, count=1):
        return self.value("made", kib, count)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staying")
    (folder / "staying.py").write_text(APP)
    return folder


@pytest.fixture
def start(folder):
    """An actor of its own: what its executor holds is what the test is about."""
    drivers = []

    def start(**options):
        wanted = {"memory_limit": "100KiB", "results_limit": "50%", "host_results_limit": "100KiB", **options}
        config = executors.make_config(folder, "staying", module="staying", tasks=TASKS, **wanted)
        drivers.append(Driver().hello(config))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.end()


@pytest.fixture
def driver(start):
    return start()


def test_a_handle_says_what_and_where_and_its_array_is_the_same_each_time(driver):
    (handle,) = driver.made(8)
    assert (handle.dtype, handle.shape, handle.size_bytes, handle.kept) == ("<f8", (1024,), 8192, None)
    assert handle.executor == driver.health.executor and handle.route == ("", "gpu")
    first = driver.value("where", handle)
    assert first[1] == 8 * 1024 and driver.value("where", handle) == first
    wait_for(
        lambda: driver.health.results == {"arrays": 1, "device_bytes": 8192, "host_bytes": 0}, "health to tell of it"
    )
    assert driver.health.memory_used_bytes == 8192, "of the logical memory"


def test_scalars_and_small_arrays(driver):
    found = driver.value("scalars")
    assert found["mean"] == 0.5
    assert found["point"] == 2.0, "an array without dimensions is a number"
    assert (found["empty"].shape, found["empty"].size_bytes) == ((0, 3), 0)
    assert driver.value(EXPORT, found["empty"], 100)["kind"] == "npy"


def test_a_named_tuple_of_arrays_becomes_a_tuple_as_any_other_result(start, tmp_path):
    driver = start(stores=StoreConfig(url=f"file://{tmp_path}"))
    values, vectors = value(driver.outcomes(task("eigh"))[0])
    assert isinstance(values, DeviceArray) and (values.shape, vectors.shape) == ((2,), (2, 2))
    ((values, vectors),) = value(driver.outcomes(task("eigh_by_reference"))[0])
    assert isinstance(values, ArrayRef) and isinstance(vectors, ArrayRef)


def test_a_named_tuple_of_arrays_arrives_as_one(driver):
    spec = ArraySpec("<f8")
    named = numpy.linalg.eigh(numpy.eye(2))
    sent = type(named)(*(Unopened(spec, array) for array in named))
    assert value(driver.outcomes(task("values_of", sent))[0]) == ("EighResult", 4.0)


def test_without_ray_an_array_for_another_actor_goes_to_the_store(start, tmp_path):
    driver = start(stores=StoreConfig(url=f"file://{tmp_path}"))
    found = driver.value(EXPORT, driver.made(1)[0], 0, True)
    assert found["url"].startswith(f"file://{tmp_path}")


def test_without_a_taker_for_handles_arrays_go_to_the_store(driver):
    """There is none here, which says that they went there."""
    (outcome,) = driver.outcomes(task("made", 8, stays=False))
    assert isinstance(exception(outcome), StoreUnavailable)
    assert driver.value("held") == (0, 0, 0)


def test_a_result_that_cannot_be_sent_leaves_nothing(driver):
    for name, args, kind in (("half_sendable", (), FailureKind.NOT_SENDABLE), ("kept", (8,), FailureKind.RAISED)):
        (outcome,) = driver.outcomes(task(name, *args))
        assert outcome.kind is kind
    assert driver.value("held") == (0, 0, 0)


def test_others_make_room_for_a_result_that_a_full_device_cannot_keep(driver):
    driver.made(20, 2)
    assert driver.value("too_much", False).size_bytes == 8000
    assert driver.value("held") == (3, 8192, 40 * KIB)
    (outcome,) = driver.outcomes(task("too_much", True))
    assert outcome.kind is FailureKind.OUT_OF_MEMORY and outcome.message.startswith("out of memory; no room for")
    assert 'Gpu(result="ref")' in outcome.message
    assert driver.value("held") == (3, 0, 40 * KIB + 8000), "of it nothing stays"


def test_an_outcome_says_what_was_made_for_it(start, tmp_path):
    from actors.contract import StoreConfig

    driver = start(stores=StoreConfig(url=f"file://{tmp_path}"))
    handle = driver.made(1)[0]
    (outcome,) = driver.outcomes(task("kept", 8))
    assert pickle.loads(outcome.made) == [value(outcome)]
    (outcome,) = driver.outcomes(task("stored", {"ref": handle.model_dump(mode="json")}))
    assert pickle.loads(outcome.made) == value(outcome)[:2], "not what it was given"
    (outcome,) = driver.outcomes(task("held"))
    assert outcome.made == b""


def test_an_empty_array_is_exported_by_reference(start, tmp_path):
    from actors.contract import StoreConfig

    driver = start(stores=StoreConfig(url=f"file://{tmp_path}"))
    handle = driver.value("scalars")["empty"]
    ref = ArrayRef.model_validate(driver.value(EXPORT, handle))
    assert (ref.shape, ref.size_bytes) == ((0, 3), 0)
    assert driver.value("where", Unopened(ArraySpec(), ref))[1] == 0.0


def test_copies_go_to_the_store_and_serve_when_the_array_has_gone(start, tmp_path):
    driver = start(stores=StoreConfig(url=f"file://{tmp_path}"))
    handle = driver.value("kept", 8)
    assert isinstance(handle.kept, ArrayRef) and handle.kept.size_bytes == 8192
    assert driver.value("where", handle)[1] == 1024
    driver.value(DELETE, [handle.model_dump(mode="json")])
    assert driver.value("where", handle)[1] == 1024
    exported = driver.value(EXPORT, driver.made(4)[0])
    assert exported["kind"] == "ref" and exported["size_bytes"] == 4096


def test_it_expires_although_nobody_calls(start):
    driver = start(keep_s=0.3)
    (handle,) = driver.made(8)
    assert handle.expires_at is not None
    wait_for(lambda: driver.health.results["arrays"] == 0 and driver.health.calls == 1, "its end")
    (outcome,) = driver.outcomes(task("where", handle))
    assert isinstance(exception(outcome), HandleLost)
    assert "time to live is over" in str(exception(outcome))


def test_those_used_longest_ago_leave_the_device_and_come_back(driver):
    handles = driver.made(20, 4)
    assert driver.value("held") == (4, 40 * KIB, 40 * KIB)
    assert driver.value("where", handles[0])[1] == 20.0 * 2560
    assert driver.value("held") == (4, 40 * KIB, 40 * KIB)
    driver.made(20, 5)
    (outcome,) = driver.outcomes(task("where", handles[1]))
    assert "dropped to make room" in str(exception(outcome))
    assert driver.value("held") == (7, 40 * KIB, 100 * KIB)


def test_they_make_room_for_a_body_that_declares_its_memory(driver):
    driver.made(20, 2)
    assert driver.value("large") == (2, 20 * KIB, 20 * KIB), "one of them was enough"


def test_they_make_room_for_a_body_that_ran_out_of_memory_but_not_what_it_takes(driver, tmp_path):
    handles = driver.made(20, 2)
    assert driver.value("short_once", handles[0], "") == (2, 20 * KIB, 20 * KIB)


def test_what_is_held_goes_with_its_executor_and_another_one_says_so(driver):
    import os
    import signal

    (handle,) = driver.made(8)
    pid, name = driver.executor, driver.health.executor
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: driver.health.executor not in ("", name), "its successor")
    (outcome,) = driver.outcomes(task("where", handle))
    assert "has ended" in str(exception(outcome))
    assert driver.health.results == {"arrays": 0, "device_bytes": 0, "host_bytes": 0}


def test_a_handle_survives_pickle_and_json():
    handle = DeviceArray(id="ab", actor=1, executor="cd", dtype="<f8", shape=(2,), size_bytes=16, route=("", "gpu"))
    assert pickle.loads(pickle.dumps(handle)) == handle
    form = handle.model_dump(mode="json")
    assert form["copy"] is None and "kept" not in form
    assert DeviceArray.model_validate(form) == handle
    assert numpy.prod(handle.shape) == 2


def test_a_value_without_arrays_is_itself(driver):
    assert value(driver.outcomes(task("held"))[0]) == (0, 0, 0)
