"""Reading ahead of a call while a body runs: real Redis, real executors, the actor's shell."""

import itertools
import math
import os
import signal
import threading
from pathlib import Path

import numpy
import pytest
from celery import Celery

from actors.contract import ActorState, FailureKind, StoreConfig
from actors.data import ahead
from actors.data.ahead import Reader, Shelf, Wanted
from actors.data.arrays import ArraySpec
from actors.data.redis_values import CHUNK_BYTES, key_of
from actors.data.stores import Stores, worth_reading_ahead
from actors.unopened import Unopened
from tests.integration.test_executor import LIMITS, Driver, exists, kinds, make_config, path, task, value  # noqa: F401
from tests.integration.test_store_limits import is_asked
from tests.support.services import RedisServer, wait_for

MIB = 1 << 20
APP = """
import time
from pathlib import Path
import numpy
from celery import Celery
from bridge.data import Array

app = Celery("ahead", broker="memory://", set_as_current=False)

@app.task(gpu=True)
def hold(started, release):
    Path(started).touch()
    deadline = time.monotonic() + 60
    while not Path(release).exists() and time.monotonic() < deadline:
        time.sleep(0.002)

@app.task(gpu=True)
def total(values: Array): return float(values.sum())

@app.task(gpu=True)
def both(one: Array, other: Array): return [float(one.sum()), float(other.sum())]
"""
TASKS = [f"ahead_app.{name}" for name in ("hold", "total", "both")]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("store"))
    yield server
    server.kill_group()


@pytest.fixture(scope="module")
def stores(store):
    return Stores(Celery(set_as_current=False), StoreConfig(store.url))


@pytest.fixture(scope="module")
def driver(tmp_path_factory, store):
    folder = tmp_path_factory.mktemp("ahead")
    (folder / "ahead_app.py").write_text(APP)
    driver = Driver(LIMITS._replace(grace_s=0.5))
    driver.hello(make_config(folder, "ahead", "ahead_app", TASKS, stores=StoreConfig(store.url, timeout_s=300.0)))
    yield driver
    driver.end()


@pytest.fixture(autouse=True)
def lent(driver, stores):
    """The actor can read: the executor has read something large itself and has lent it a connection."""
    wait_for(lambda: driver.health.state is ActorState.READY, "the executor")
    assert driver.values(taking(stores.put(numpy.ones(MIB // 8)), ahead=False)) == [MIB // 8]
    reader_of(driver)._late = reader_of(driver)._to_pass = 0


@pytest.fixture
def held_body(driver, path):  # noqa: F811
    """A body runs until `release` is called."""
    first = driver.send(task("ahead_app.hold", path, path + "-end"))
    wait_for(lambda: exists(path), "the body")

    def release():
        open(path + "-end", "w").close()
        assert kinds(first.outcomes()) == ["succeeded"]

    yield release
    open(path + "-end", "w").close()


def held():
    """Memory and threads of readers in this process, which is the actor's."""
    links = [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]
    return [each for each in links if "gpu-ahead" in each], [
        each for each in threading.enumerate() if each.name == "ahead"
    ]


def reader_of(driver):
    (child,) = driver.shell._children
    return child._ahead


def taking(*refs, ahead=True, name="total", **limits):
    """A task as the driver sends it."""
    sent = task(f"ahead_app.{name}", *(Unopened(ArraySpec(), ref) for ref in refs), **limits)
    return sent._replace(large=worth_reading_ahead(refs) if ahead else ())


def reads(store):
    """Values that Redis has been asked for."""
    return store.client.info("commandstats").get("cmdstat_get", {"calls": 0})["calls"]


def keys_of(ref):
    name = ref.url.partition(":")[2]
    return [key_of("", name, number) for number in range(math.ceil(ref.size_bytes / CHUNK_BYTES))]


def is_there(store, before, count):
    return lambda: reads(store) == before + count


def is_ready(driver, size_bytes):
    """Whether so many bytes lie ready for the next call."""
    reader = reader_of(driver)
    return lambda: reader._memory.ready(1 - reader._room) >= size_bytes


# ---- as it should be


@pytest.mark.parametrize("mib", [1, 3])
def test_the_next_calls_data_are_read_while_a_body_runs(driver, store, stores, held_body, mib):
    """All of them, and nobody asks again: they are gone from Redis when the second body starts."""
    ref, before = stores.put(numpy.arange(mib * MIB / 8)), reads(store)
    second = driver.send(taking(ref))
    wait_for(is_ready(driver, ref.size_bytes), "what the second call needs")
    assert reads(store) == before + mib
    store.client.delete(*keys_of(ref))
    held_body()
    assert value(second.outcomes()[0]) == numpy.arange(mib * MIB / 8).sum()
    assert reads(store) == before + mib


def test_of_more_than_there_is_room_for_the_first_part_is_read(driver, store, stores, held_body):
    """Whole values, and the executor asks for the others."""
    one, other = stores.put(numpy.ones(3 * MIB // 16)), stores.put(numpy.full(ahead.ROOM_BYTES // 8, 2.0))
    values = ahead.ROOM_BYTES // MIB
    before = reads(store)
    second = driver.send(taking(one, other, name="both"))
    wait_for(is_ready(driver, (values - 2) * MIB + 3 * MIB // 2), "what there is room for")
    assert reads(store) == before + values
    held_body()
    assert value(second.outcomes()[0]) == [3 * MIB / 16, 2.0 * ahead.ROOM_BYTES / 8]
    assert reads(store) == before + 2 + values


def test_small_data_and_other_stores_are_left_to_the_executor(stores):
    assert not worth_reading_ahead([stores.put(numpy.ones(MIB // 8 - 1))])
    large = stores.put(numpy.ones(MIB // 8))
    assert len(worth_reading_ahead([large])) == 1
    others = [large.model_copy(update={"url": url}) for url in ("file:///tmp/x.npy", "ray:" + "a" * 32, "redis:../x")]
    assert not worth_reading_ahead(others)


def test_only_the_next_call_is_read_for(driver, store, stores, held_body):
    refs = [stores.put(numpy.full(MIB // 8, each)) for each in (1.0, 2.0)]
    before = reads(store)
    calls = [driver.send(taking(ref)) for ref in refs]
    wait_for(is_ready(driver, MIB), "the second call's")
    assert reads(store) == before + 1
    calls[0].cancel(0)
    wait_for(lambda: reader_of(driver)._job.call == calls[0].call.id, "the supervisor")
    held_body()
    assert kinds(calls[0].outcomes()) == [FailureKind.CANCELLED]
    assert value(calls[1].outcomes()[0]) == 2.0 * MIB / 8


# ---- what goes wrong is the task's, as ever


@pytest.mark.parametrize("fault", ["lost", "other bytes", "shorter"])
def test_what_is_lost_or_damaged_fails_its_task_alone_in_the_same_words(driver, store, stores, held_body, fault):
    refs = [stores.put(numpy.full(2 * MIB // 8, 3.0)) for _ in range(2)]
    last = keys_of(refs[0])[-1]
    store.client.delete(last) if fault == "lost" else store.client.set(last, b"x" * (MIB - (fault == "shorter")))
    spoilt = driver.send(taking(refs[0]), taking(refs[1]))
    wait_for(is_ready(driver, MIB * (2 if fault == "other bytes" else 1)), "what can be read")
    held_body()
    outcomes = spoilt.outcomes()
    assert kinds(outcomes) == [FailureKind.RAISED, "succeeded"]
    (alone,) = driver.outcomes(taking(refs[0], ahead=False))
    assert (outcomes[0].type_name, outcomes[0].message) == (alone.type_name, alone.message)
    assert outcomes[0].type_name.endswith("DataLost" if fault == "lost" else "DataCorrupt")


def test_a_store_that_hangs_stops_nobody_but_the_body_that_needs_it(driver, store, stores, held_body, path):  # noqa: F811
    ref = stores.put(numpy.ones(MIB // 8))
    store.signal(signal.SIGSTOP)
    try:
        second = driver.send(taking(ref, hard=0.5))
        wait_for(lambda: is_asked(store), "the question")
        held_body()  # it ends, though the reader waits
        assert kinds(second.outcomes()) == [FailureKind.HARD_LIMIT]
        wait_for(lambda: driver.health.state is ActorState.READY, "the next executor")
        assert driver.values(task("ahead_app.hold", path, path)) == [None]
    finally:
        store.signal(signal.SIGCONT)
    wait_for(lambda: held() == ([], []), "the end of the reader of the executor that was ended")
    assert driver.values(taking(ref)) == [MIB / 8]


def test_an_executor_that_is_killed_leaves_nothing_and_the_next_one_reads_ahead_again(
    driver,
    store,
    stores,
    path,  # noqa: F811
):
    ref = stores.put(numpy.ones(MIB // 8))
    first = driver.send(task("ahead_app.hold", path, path + "-end"))
    wait_for(lambda: exists(path), "the body")
    second = driver.send(taking(ref))
    wait_for(is_ready(driver, MIB), "what the second call needs")
    os.kill(driver.executor, signal.SIGKILL)
    assert kinds(first.outcomes()) == [FailureKind.CRASHED]
    assert value(second.outcomes()[0]) == MIB / 8
    wait_for(lambda: held() == ([], []), "the reader of the dead executor to end")


def test_a_connection_that_breaks_is_lent_anew(driver, store, stores, path):  # noqa: F811
    ref = stores.put(numpy.ones(MIB // 8))
    store.client.client_kill_filter(_type="normal", skipme=True)
    for number in range(3):
        first = driver.send(task("ahead_app.hold", f"{path}{number}", f"{path}{number}-end"))
        wait_for(lambda number=number: exists(f"{path}{number}"), "the body")
        second = driver.send(taking(ref))
        reader = reader_of(driver)
        wait_for(lambda r=reader, n=number: r._connection is None if n == 0 else r._job is not None, "the reader")
        reader._to_pass = 0
        open(f"{path}{number}-end", "w").close()
        assert kinds(first.outcomes()) == ["succeeded"]
        assert value(second.outcomes()[0]) == MIB / 8
    wait_for(lambda: reader_of(driver)._connection is not None, "another connection")


# ---- nobody waits in vain


@pytest.fixture
def ends(store):
    """Both ends in this process, connected; keys begin with "shop:"."""
    reader = Reader(5.0)
    shelf = Shelf(reader.theirs.detach())
    shelf.lend(store.client.connection_pool, "shop:")
    yield reader, shelf
    reader.close()
    shelf._lent.disconnect()
    shelf._actor.close()
    shelf._memory.close()


@pytest.fixture
def wanted(store):
    wanted = Wanted("b" * 32, MIB)
    store.client.set(key_of("shop:", wanted.name, 0), b"x" * MIB)
    return wanted


def test_keys_have_the_apps_prefix(ends, wanted):
    reader, shelf = ends
    reader.want("a call", [wanted])
    wait_for(lambda: shelf._memory.ready(1) == MIB, "its data")
    shelf.begin(reader.give("a call"))
    assert shelf.piece(wanted.name, 0) == b"x" * MIB


def test_what_a_body_forks_reads_for_itself(ends, wanted):
    """It may outlive the call, and other data are where its own were."""
    reader, shelf = ends
    reader.want("a call", [wanted])
    wait_for(lambda: shelf._memory.ready(1) == MIB, "its data")
    shelf.begin(reader.give("a call"))
    child = os.fork()
    if not child:
        os._exit(shelf.piece(wanted.name, 0) is not None)
    assert os.waitpid(child, 0)[1] == 0 and shelf.piece(wanted.name, 0) == b"x" * MIB


def test_who_is_always_late_is_asked_less_and_less(store, ends, wanted):
    """The executor comes before anything is ready: bodies are too short, and reading twice would only cost."""
    reader, shelf = ends
    tried = []
    for number in range(40):
        store.signal(signal.SIGSTOP)
        reader.want(str(number), [wanted])
        if not reader._job.is_passed:
            wait_for(lambda: reader._job.is_begun, "the reader")
        shelf.begin(places := reader.give(str(number)))
        assert shelf.piece(wanted.name, 0) is None
        shelf.end()
        store.signal(signal.SIGCONT)
        tried += [number] * bool(places)
        if places:
            wait_for(lambda place=places[0]: shelf._memory.ready(place.room), "Redis' answer")
    pauses = [later - earlier for earlier, later in itertools.pairwise(tried)]
    assert pauses == sorted(pauses) and pauses[-1] == ahead.MOST_PASSED + 1
