"""Limits and cancellation while an executor waits for a store: it reads what a body takes, writes what it returned."""

import math
import pickle
import signal
import threading
from pathlib import Path

import numpy
import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from actors.contract import ActorState, FailureKind, StoreConfig, Succeeded
from actors.data.arrays import ArrayRef, ArraySpec
from actors.data.stores import Stores
from actors.unopened import Unopened
from bridge.errors import StoreUnavailable
from tests.integration.test_executor import Driver, exception, exists, kinds, make_config, path, task  # noqa: F401
from tests.support.services import RedisServer, wait_for

#: The store is waited for longer than any test takes, in seconds.
NEVER_S = 300.0
#: Larger than a socket's buffers take: who writes it to a store that hangs waits.
LARGE = 1 << 20
APP = """
import time
from pathlib import Path
import numpy
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from bridge import Gpu, batched
from bridge.data import Array

app = Celery("stores", broker="memory://", set_as_current=False)
app.conf.task_serializer = "json"

@app.task(gpu=True)
def total(values: Array): return float(values.sum())

@app.task(gpu=Gpu(result="ref"))
def ones(size): return numpy.ones(size)

@app.task(gpu=Gpu(result="ref"))
@batched(max_size=4)
def many(sizes: list[int]) -> list[object]: return [numpy.ones(size) for size in sizes]

@app.task(gpu=Gpu(result="ref"))
def hurried(size, caught):
    try:
        time.sleep(60)
    except SoftTimeLimitExceeded:
        Path(caught).touch()
    return numpy.ones(size)

@app.task(gpu=True, bind=True)
def sends(self, size, how):
    array = numpy.ones(size)
    if how == "progress":
        self.update_state(state="PROGRESS", meta={"so far": array})
    elif how == "retry":
        raise self.retry(args=(array, how), exc=ValueError(array), countdown=0)
    elif how == "replace":
        raise self.replace(app.signature("stores.total", ({"deep": [array]},)))
"""
TASKS = ["total", "ones", "many", "hurried", "sends"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("store"))
    yield server
    server.kill_group()


@pytest.fixture(scope="module")
def driver(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("stores")
    (folder / "stores_app.py").write_text(APP)
    driver = Driver()
    config = make_config(folder, "stores", "stores_app", [f"stores_app.{name}" for name in TASKS])
    driver.hello(config._replace(stores=StoreConfig(store.url, timeout_s=NEVER_S, inline_bytes=1000)))
    yield driver
    driver.end()


@pytest.fixture(scope="module")
def stores(store):
    return Stores(Celery(set_as_current=False), StoreConfig(store.url))


@pytest.fixture
def hangs(store):
    """The store does, until the test is over."""
    store.signal(signal.SIGSTOP)
    yield store
    store.signal(signal.SIGCONT)


def is_asked(server):
    """Bytes that wait to be read by a server that hangs."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[4].partition(":")[2], 16) for row in rows if int(row[1].partition(":")[2], 16) == server.port)


def call(name, *args, **limits):
    return task(f"stores_app.{name}", *args, **limits)


def taking(ref):
    """An argument as the driver's check leaves it."""
    return Unopened(ArraySpec(), ref)


def serves(driver, store, stores):
    """Store and executor have a further task, and give each its own data."""
    store.signal(signal.SIGCONT)
    wait_for(lambda: driver.health.state is ActorState.READY, "the executor")
    refs = [stores.put(numpy.full(10, number)) for number in range(5)]
    return driver.values(*(call("total", taking(ref)) for ref in refs)) == [0, 10, 20, 30, 40]


def test_a_soft_limit_ends_reading_and_writing(driver, store, stores, hangs):
    store.signal(signal.SIGCONT)
    ref, executor = stores.put(numpy.ones(LARGE)), driver.executor
    store.signal(signal.SIGSTOP)
    for each in (call("total", taking(ref), soft=0.1), call("ones", LARGE, soft=0.1)):
        (outcome,) = driver.outcomes(each)
        assert outcome.kind is FailureKind.RAISED and isinstance(exception(outcome), SoftTimeLimitExceeded)
    assert serves(driver, store, stores) and driver.executor == executor


def test_a_soft_limit_holds_for_each_result_of_a_batch(driver, store, stores, hangs):
    executor = driver.executor
    outcomes = driver.outcomes(*(call("many", LARGE, soft=0.1) for _ in range(3)))
    assert [type(exception(outcome)) for outcome in outcomes] == [SoftTimeLimitExceeded] * 3
    assert serves(driver, store, stores) and driver.executor == executor


@pytest.mark.parametrize("name", ["total", "ones"])
def test_a_hard_limit_ends_it_with_its_executor(driver, store, stores, hangs, name):
    store.signal(signal.SIGCONT)
    argument = taking(stores.put(numpy.ones(LARGE))) if name == "total" else LARGE
    executor = driver.executor
    store.signal(signal.SIGSTOP)
    assert kinds(driver.outcomes(call(name, argument, hard=0.1))) == [FailureKind.HARD_LIMIT]
    assert serves(driver, store, stores) and driver.executor != executor


def test_a_task_that_is_cancelled_does_not_wait_for_its_result_to_be_stored(driver, store, stores, hangs):
    executor, sent = driver.executor, driver.send(call("ones", LARGE))
    wait_for(lambda: is_asked(store), "the result to be on its way")
    sent.cancel(0)
    assert kinds(sent.outcomes()) == [FailureKind.CANCELLED]
    assert serves(driver, store, stores) and driver.executor == executor


def test_who_has_heard_its_soft_limit_may_store_what_it_has(driver, store, hangs, path):  # noqa: F811
    sent = driver.send(call("hurried", LARGE, path, soft=0.1))
    wait_for(exists(path), "the limit to be heard")
    wait_for(lambda: is_asked(store), "the result to be on its way")
    with driver.shell._lock:
        for _ in range(3):
            driver.shell._look_at_running(math.inf)
    store.signal(signal.SIGCONT)
    assert isinstance(sent.outcomes()[0], Succeeded)


def test_an_answer_that_an_interrupt_has_left_is_not_the_next_ones(store, stores, hangs):
    store.signal(signal.SIGCONT)
    refs = [stores.put(numpy.full(10, number)) for number in range(2)]
    store.signal(signal.SIGSTOP)

    def interrupt(*_):
        raise SoftTimeLimitExceeded

    def interrupt_when_asked(before):
        wait_for(lambda: is_asked(store) > before, "the question")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR2)

    previous = signal.signal(signal.SIGUSR2, interrupt)
    try:
        watch = threading.Thread(target=interrupt_when_asked, args=(is_asked(store),))
        watch.start()
        with pytest.raises(SoftTimeLimitExceeded):
            stores.get(refs[0])
        watch.join()
    finally:
        signal.signal(signal.SIGUSR2, previous)
    before, found = is_asked(store), []
    thread = threading.Thread(target=lambda: found.append(stores.get(refs[1])))
    thread.start()
    wait_for(lambda: is_asked(store) > before, "the next question")
    store.signal(signal.SIGCONT)
    thread.join()
    assert found and (found[0] == 1).all()


# ---- what a body asks Celery to send


def in_wish(outcome):
    (wish,) = pickle.loads(outcome.wishes)
    return wish


def test_a_large_array_in_a_wish_goes_to_the_store(driver, stores):
    (retry,) = driver.outcomes(call("sends", 1000, "retry"))
    wish = in_wish(retry)
    (ref, how), error = wish.args[0], wish.kwargs["exc"]
    assert (stores.get(ref) == 1).all() and how == "retry"
    assert isinstance(error.args[0], numpy.ndarray), "an exception stays as it is"
    (replaced,) = driver.outcomes(call("sends", 1000, "replace"))
    signature = in_wish(replaced).args[0]
    assert (stores.get(signature.args[0]["deep"][0]) == 1).all()
    sent = driver.send(call("sends", 1000, "progress"))
    token = sent.call.tasks[0].token
    assert isinstance(sent.outcomes()[0], Succeeded)
    assert isinstance(sent.wishes[token][0].kwargs["meta"]["so far"], ArrayRef)


def test_a_small_one_travels_inside(driver):
    (retry,) = driver.outcomes(call("sends", 10, "retry"))
    assert isinstance(in_wish(retry).args[0][0], numpy.ndarray)


@pytest.mark.parametrize("how", ["retry", "progress"])
def test_limits_hold_while_a_wish_is_stored(driver, store, stores, hangs, how):
    executor = driver.executor
    (outcome,) = driver.outcomes(call("sends", LARGE, how, soft=0.1))
    assert isinstance(exception(outcome), SoftTimeLimitExceeded)
    assert serves(driver, store, stores) and driver.executor == executor


def test_a_wish_that_the_store_does_not_take_fails_its_task(driver, store, stores):
    store.client.config_set("maxmemory", store.client.info("memory")["used_memory"])
    try:
        (outcome,) = driver.outcomes(call("sends", LARGE, "retry"))
    finally:
        store.client.config_set("maxmemory", 0)
    assert outcome.kind is FailureKind.RAISED and isinstance(exception(outcome), StoreUnavailable)
    assert not outcome.wishes
