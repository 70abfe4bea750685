"""Arrays that stay on the device between tasks: one worker, two logical GPUs, and the example on a third."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys

import numpy
import pytest
from celery import Celery, chord, group
from celery.exceptions import TaskRevokedError

from bridge import data, errors
from bridge.data import DeviceArray
from tests.apps.resident import QUEUE
from tests.apps.resident import app as resident_app
from tests.support.joined import Joined
from tests.support.services import ROOT, RayCluster, Worker, inspected, wait_for

GET = {"timeout": 60}
NAME = f"resident@{socket.gethostname()}"
#: Of the arrays here: 8 MB each.
COUNT = 1_000_000


@pytest.fixture(scope="module")
def ray_of_three(clean_environment, tmp_path_factory):
    cluster = RayCluster(tmp_path_factory.mktemp("ray-of-three"), gpus=3)
    yield cluster
    cluster.stop()
    shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def worker(environment, ray_of_three, tmp_path_factory):
    env = environment | {
        "BRIDGE_RAY_ADDRESS": ray_of_three.address, "BRIDGE_NAMESPACE": "resident", "BRIDGE_BEAT_S": "0.2",
        "BRIDGE_MIN_ACTORS": "2", "BRIDGE_MAX_ACTORS": "2",
        "BRIDGE_DEVICE_RESULTS_LIMIT": "64MiB", "BRIDGE_HOST_RESULTS_LIMIT": "128MiB",
    }  # fmt: skip
    options = ("-c", "1", "-n", "resident@%h", "-Q", QUEUE)
    process = Worker(tmp_path_factory.mktemp("resident"), *options, app="tests.apps.resident:app", env=env)
    yield process
    assert process.stop() == 0, process.output[-5000:]


@pytest.fixture(scope="module")
def app(redis_server, worker):
    resident_app.conf.update(broker_url=redis_server.url, result_backend=redis_server.url)
    resident_app.set_current()
    yield resident_app
    resident_app.backend.result_consumer.stop()
    resident_app.close()
    for key in keys(redis_server):  # what CPU tasks have got by reference; it would expire
        redis_server.client.delete(key)


@pytest.fixture(scope="module")
def joined(ray_of_three, environment):
    process = Joined(ray_of_three.address, "resident", "tests.apps.resident:app", environment)
    yield process
    process.end()


@pytest.fixture
def fetched(joined):
    """What is in Ray's object store for tasks on other actors: how many, and their bytes."""
    return lambda: joined("answer = store.holdings()")


@pytest.fixture
def s(app):
    """Signatures by name: ``s.made(3)``."""

    class Signatures:
        def __getattr__(self, name):
            return app.tasks[f"tests.apps.resident.{name}"].s

    return Signatures()


@pytest.fixture
def actors(app):
    """Rows of `inspect gpu`, when both are ready."""

    def rows():
        rows = inspected(app, NAME, "gpu")["actors"]
        return rows if [row["state"] for row in rows] == ["ready"] * 2 else None

    return lambda: wait_for(rows, "both actors to be ready")


@pytest.fixture
def two(s, tmp_path):
    """Handles of arrays on different actors, of so many elements."""
    rounds = iter(range(100))

    def make(*counts):
        folder = tmp_path / f"round-{next(rounds)}"
        folder.mkdir()
        results = [s.made_together(str(folder), str(n), len(counts), count).delay() for n, count in enumerate(counts)]
        handles = [result.get(**GET) for result in results]
        assert len({handle.executor for handle in handles}) == len(counts)
        return handles

    return make


def keys(redis_server):
    return set(redis_server.client.keys("*bridge-data-*"))


def held(actors):
    return {row["executor"]: row["results"] for row in actors()}


def pid_of(actors, handle):
    (pid,) = [row["executor_pid"] for row in actors() if row["executor"] == handle.executor]
    return pid


def stored(redis_server, result):
    return redis_server.client.get(f"celery-task-meta-{result.id}")


def test_the_next_task_of_a_chain_gets_the_very_same_array(s, redis_server):
    made = s.made(COUNT).delay().get(**GET)
    assert isinstance(made["array"], DeviceArray)
    for _ in range(4):  # whichever actor is free
        assert s.place(made["array"]).delay().get(**GET) == [*made["at"], COUNT]
    result = (s.passed_on(made["array"]) | s.passed_on() | s.place()).delay()
    assert result.get(**GET) == [*made["at"], COUNT]


def test_what_crosses_redis_does_not_grow_with_the_arrays(s, redis_server):
    sizes, kept = {}, keys(redis_server)
    for count in (10, COUNT):
        before = redis_server.client.info("stats")
        last = (s.ones(count) | s.doubled() | s.doubled() | s.place()).delay()
        assert last.get(**GET)[2] == 4 * count
        after = redis_server.client.info("stats")
        sizes[count] = sum(after[name] - before[name] for name in ("total_net_input_bytes", "total_net_output_bytes"))
        middle = [len(stored(redis_server, each)) for each in (last.parent, last.parent.parent)]
        assert max(middle) < 900, "a result of 8 MB is a few hundred bytes in Redis"
    assert keys(redis_server) <= kept
    assert sizes[COUNT] < 200_000, f"against 8 MB, four times: {sizes}"


def test_the_producer_gets_a_handle_that_is_good_for_the_value(s, redis_server, app):
    handle = s.doubled([1.0, 2.0, 3.0]).delay().get(**GET)
    assert (handle.dtype, handle.shape, handle.size_bytes) == ("<f8", (3,), 24)
    assert numpy.asarray(handle).tolist() == handle.get().tolist() == data.get(handle).tolist() == [2, 4, 6]
    large = s.ones(COUNT).delay().get(**GET)
    before = set(redis_server.client.keys())
    assert (large.get() == numpy.ones(COUNT)).all()
    assert set(redis_server.client.keys()) <= before, "neither the array nor the result of what fetched it stays"
    assert data.get(large.model_dump(mode="json")).sum() == COUNT, "as a producer of another language has it"


def test_whoever_asks_need_not_know_the_queue(s, redis_server, app):
    handle = s.ones(30).delay().get(**GET)
    other = Celery("other", broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    other.set_current()
    try:
        assert data.get(handle).sum() == 30
        assert asyncio.run(data.aget(handle)).sum() == 30
    finally:
        app.set_current()
        other.backend.result_consumer.stop()
        other.close()


def test_a_cpu_task_gets_the_value(s, redis_server):
    (name, total, _) = (s.ones(COUNT) | s.on_cpu()).delay().get(**GET)
    assert (name, total) == ("ndarray", COUNT)
    handle = s.ones(50).delay().get(**GET)
    assert s.on_cpu(handle).delay().get(**GET)[:2] == ["ndarray", 50]
    (s.ones(40) | s.doubled() | s.on_cpu()).delay().get(**GET)


def test_cpu_and_gpu_tasks_take_the_same_array(s):
    """In the middle of a chain, in a chord's header, and in a group behind one."""
    assert (s.ones(50) | s.passed_on_cpu() | s.doubled() | s.place()).delay().get(**GET)[2] == 100
    assert chord([s.ones(50), s.on_cpu_array(50)])(s.joined()).get(**GET)[1] == [50, 100]
    held, value = (s.ones(50) | group(s.place(), s.on_cpu())).delay().get(**GET)
    assert (held[2], value[:2]) == (50, ["ndarray", 50])


def test_a_task_without_an_annotation_gets_what_is_good_for_the_value(s):
    handle = s.ones(50).delay().get(**GET)
    assert s.unannotated(handle).delay().get(**GET) == ["DeviceArray", 50]


def moved(redis_server):
    """Bytes that Redis has taken and given."""
    stats = redis_server.client.info("stats")
    return stats["total_net_input_bytes"] + stats["total_net_output_bytes"]


def test_a_chord_of_arrays_on_two_actors_runs_where_most_bytes_are(s, two, actors, fetched, redis_server, tmp_path):
    small, large = two(COUNT // 2, COUNT)
    before = moved(redis_server)
    pid, sums = s.joined([small, large]).delay().get(**GET)
    assert moved(redis_server) - before < 200_000, "4 MB have gone from one actor to the other, not through Redis"
    assert pid == pid_of(actors, large) and sums == [(COUNT / 2) ** 2, float(COUNT) ** 2]
    wait_for(lambda: fetched() == [0, 0], "what was fetched for it to be deleted")
    folder = tmp_path / "chord"
    folder.mkdir()
    header = [s.made_together(str(folder), str(n), 2, count) for n, count in enumerate((2000, 30))]
    assert chord(header)(s.joined()).get(**GET)[1] == [900.0, 2000.0**2]
    wait_for(lambda: fetched() == [0, 0], "what was fetched for it to be deleted")


def test_an_empty_array_of_another_actor_comes_too(s, two, fetched, redis_server):
    before = keys(redis_server)
    assert s.joined(two(0, 7)).delay().get(**GET)[1] == [0.0, 49.0]
    wait_for(lambda: fetched() == [0, 0], "what was fetched for it to be deleted")
    assert keys(redis_server) <= before


def test_without_a_keeper_another_one_begins(s, two, joined):
    for _ in range(2):
        assert s.joined(two(3, 4)).delay().get(**GET)[1] == [9.0, 16.0]
        joined("ray.kill(store._found())")


def test_batched_tasks_take_and_give_handles(s, two, redis_server):
    before = keys(redis_server)
    a, b = two(100, 200)
    results = [s.halved(each).delay() for each in (a, a, a)]
    halves = [result.get(**GET) for result in results]
    assert [float(half.get().sum()) for half in halves] == [5000.0] * 3
    assert all(half.executor == a.executor and half.size_bytes == 800 for half in halves)
    assert float(s.halved(b).delay().get(**GET).get().sum()) == 20_000
    assert keys(redis_server) <= before


def test_health_tells_what_is_held_and_delete_forgets_it(s, actors):
    handle = s.ones(COUNT).delay().get(**GET)
    other = s.doubled(handle).delay().get(**GET)
    tells = s.tells(handle).delay().get(**GET)
    assert tells["arrays"] >= 2 and tells["device_bytes"] >= 16 * COUNT
    wait_for(lambda: held(actors)[handle.executor] == tells, "health to tell")
    data.delete(other)
    wait_for(lambda: held(actors)[handle.executor]["arrays"] == tells["arrays"] - 1, "it to go")
    with pytest.raises(errors.HandleLost, match="it was deleted"):
        s.place(other).delay().get(**GET)


def test_those_used_longest_ago_move_to_the_host_and_then_go(s):
    """64 MiB on the device and 128 MiB on the host are 8 and 16 arrays."""
    first = s.ones(COUNT).delay().get(**GET)
    made = [s.doubled(first).delay().get(**GET) for _ in range(12)]  # where the first is
    tells = s.tells(first).delay().get(**GET)
    assert tells["device_bytes"] <= 64 << 20 and 0 < tells["host_bytes"] <= 128 << 20, tells
    assert s.place(made[0]).delay().get(**GET)[2] == 2 * COUNT, "it comes back"
    for _ in range(24):
        s.doubled(first).delay().get(**GET)
    with pytest.raises(errors.HandleLost, match="dropped to make room"):
        s.place(made[1]).delay().get(**GET)


def test_an_executor_that_ends_takes_its_arrays_along_unless_there_are_copies(s, actors, redis_server):
    lost = s.ones(50).delay().get(**GET)
    kept = s.copied(60).delay().get(**GET)
    for handle in (lost, kept):
        os.kill(pid_of(actors, handle), signal.SIGKILL)
        wait_for(lambda handle=handle: handle.executor not in held(actors), "its successor")
        if handle.executor == kept.executor:
            break
    text = "has ended.*Send the task again that made it.*keep_copy=True"
    for task in (s.place, s.total):  # the second is retried by its own rule
        with pytest.raises(errors.HandleLost, match=text):
            task(lost).delay().get(**GET)
    with pytest.raises(errors.HandleLost, match=text):
        lost.get()
    assert s.place(kept).delay().get(**GET)[2] == 60
    assert kept.get().sum() == 60
    assert s.joined([kept, s.ones(3).delay().get(**GET)]).delay().get(**GET)[1] == [3, 60]
    with pytest.raises(errors.HandleLost):
        s.joined([lost, s.ones(3).delay().get(**GET)]).delay().get(**GET)
    copy = f"bridge-data-{kept.kept.url.removeprefix('redis:')}-0".encode()
    assert copy in keys(redis_server)
    data.delete(kept)
    assert copy not in keys(redis_server)


def test_those_that_run_with_or_wait_for_an_executor_that_dies_are_told(s, actors, tmp_path):
    handle = s.ones(50).delay().get(**GET)
    running = s.held_till_killed(handle, str(tmp_path)).delay()
    wait_for((tmp_path / "started").exists, "its start")
    waiting = s.place(handle).delay()
    os.kill(pid_of(actors, handle), signal.SIGKILL)
    for result in (running, waiting):  # the first may run twice, and finds it gone
        with pytest.raises(errors.HandleLost, match="has ended"):
            result.get(**GET)


def test_an_actor_that_is_killed_between_two_steps_of_a_chain(s, actors, tmp_path):
    last = (s.ones(50) | s.held_up(str(tmp_path)) | s.place()).delay()
    handle = last.parent.parent.get(**GET)
    wait_for((tmp_path / "started").exists, "the second step's start")
    (actor,) = [row["pid"] for row in actors() if row["executor"] == handle.executor]
    os.kill(actor, signal.SIGKILL)
    with pytest.raises(errors.HandleLost, match="has ended"):
        last.get(**GET)
    assert (s.ones(50) | s.doubled() | s.place()).delay().get(**GET)[2] == 100


def changed(handle, **fields):
    return {**handle.model_dump(mode="json"), **fields}


FORGED = {
    "of another app": ({"executor": "0123456789abcdef"}, errors.HandleLost, "has ended, or belongs to another app"),
    "a guess": ({"id": "00" * 16}, errors.HandleLost, "nobody knows it"),
    "another shape": ({"shape": [25, 2]}, errors.DataCorrupt, "not of the dtype and shape"),
    "no name": ({"id": "../x"}, errors.PayloadInvalid, "id: String should match pattern"),
    "an address": ({"host": "elsewhere"}, errors.PayloadInvalid, "host: Extra inputs"),
    "no executor": ({"executor": ""}, errors.PayloadInvalid, "executor: String should"),
}


@pytest.mark.parametrize("fields, error, text", FORGED.values(), ids=FORGED)
def test_a_handle_that_is_not_good_fails_its_task_alone(s, fields, error, text):
    handle = s.ones(50).delay().get(**GET)
    forged = changed(handle, **fields)
    with pytest.raises(error, match=text):
        s.place(forged).delay().get(**GET)
    assert s.place(handle).delay().get(**GET)[2] == 50


def test_a_revoked_task_leaves_nothing(s, two, redis_server, fetched, tmp_path, app):
    """Neither one that runs, nor one that waits with what was fetched for it or until it is."""
    small, large = two(10, 20)
    more = [s.doubled(small).delay().get(**GET) for _ in range(2)]

    def counts():
        return [s.tells(handle).delay().get(**GET)["arrays"] for handle in (small, large)], fetched()[0]

    before, in_redis = counts(), keys(redis_server)
    running = s.held_up(large, str(tmp_path)).delay()
    wait_for((tmp_path / "started").exists, "its start")
    waiting = s.joined([small, large]).delay()
    wait_for(lambda: fetched()[0] == 1, "the small one to be fetched")
    fetching = s.joined([large, small, *more]).delay()  # runs where the small ones are
    wait_for(lambda: fetching.id in {each["id"] for each in inspected(app, NAME, "reserved")}, "it to be taken")
    fetching.revoke()
    with pytest.raises(TaskRevokedError):
        fetching.get(**GET)  # while the large one's actor is busy
    assert running.state == "PENDING"
    waiting.revoke()
    running.revoke(terminate=True)
    for result in (waiting, running):
        with pytest.raises(TaskRevokedError):
            result.get(**GET)
    wait_for(lambda: counts() == before, "nothing more to be held than before")
    assert before[1] == 0 and keys(redis_server) <= in_redis


def test_the_example_compares_both_ways(environment, ray_of_three, worker, tmp_path):
    env = environment | {
        "BRIDGE_RAY_ADDRESS": ray_of_three.address, "BRIDGE_NAMESPACE": "example", "BRIDGE_MIN_ACTORS": "1",
        "BRIDGE_MAX_ACTORS": "1",
    }  # fmt: skip
    example = Worker(tmp_path, "-c", "1", "-n", "example@%h", app="examples.resident_chain.tasks", env=env)
    done = subprocess.run(
        [sys.executable, "-m", "examples.resident_chain.compare", "1", "2"],
        env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if "over Redis" in line]
    stay, text = (float(line.partition(" ms")[2].split()[0]) for line in lines)
    assert stay < 0.2 and text > 9, done.stdout + done.stderr
    assert len({line.rpartition("mean")[2] for line in lines}) == 1, "both compute the same"
    assert example.stop() == 0, example.output[-3000:]
