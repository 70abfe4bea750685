"""Redis that refuses results, and an object store with less room than what is on its way."""

import json
import os
import signal
import socket

import pytest
from celery import Celery

from tests.support.services import RedisServer, Worker, inspected, wait_for

GET = {"timeout": 90}
MIB = 1 << 20
QUEUE = "refused"
SLOTS = 3
#: Whoever has no message any more waits for Redis for two seconds.
RESULTS = {"retry_policy": {"max_retries": 3, "interval_start": 0, "interval_step": 1, "interval_max": 1}}
CAUSES = {"full": "command not allowed when used memory", "replica": "write against a read only replica"}


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("backend"))
    yield server
    server.client.close()
    server.kill_group()


@pytest.fixture(scope="module")
def refused(environment, backend, tmp_path_factory):
    """A worker whose results go to a Redis of their own."""
    env = {
        **environment,
        "CELERY_RESULT_BACKEND": backend.url,
        "SHOP_RESULT_OPTIONS": json.dumps(RESULTS),
        "BRIDGE_GPU_SLOTS": str(SLOTS),
    }
    worker = Worker(tmp_path_factory.mktemp("refused"), "-c", "1", "-Q", QUEUE, "-n", "refused@%h", env=env)
    yield worker
    assert worker.stop() == 0, worker.output[-5000:]


@pytest.fixture
def client(redis_server, backend, refused):
    client = Celery("client", broker=redis_server.url, backend=backend.url, set_as_current=False)
    yield client
    accept(backend)
    client.close()


@pytest.fixture
def to_refused(client):
    return lambda name, *args: client.send_task(f"shop.{name}", args, queue=QUEUE)


def refuse(backend, how):
    if how == "full":
        backend.client.config_set("maxmemory", 1)
    else:
        backend.client.execute_command("REPLICAOF", "127.0.0.1", "1")


def accept(backend):
    backend.client.config_set("maxmemory", 0)
    backend.client.execute_command("REPLICAOF", "NO", "ONE")


def gpu(client):
    return inspected(client, f"refused@{socket.gethostname()}", "gpu")


def unacknowledged(redis_server, results):
    """How many of their messages the broker still has as somebody's."""
    texts = b" ".join(redis_server.client.hvals("unacked"))
    return sum(result.id.encode() in texts for result in results)


def asked(backend):
    return backend.client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]


@pytest.mark.parametrize("how", CAUSES)
def test_a_late_result_waits_unacknowledged_until_redis_stores_again(
    client, to_refused, backend, redis_server, tmp_path, how
):
    log = tmp_path / "log"
    refuse(backend, how)
    results = [to_refused("records", str(log), str(number)) for number in range(SLOTS + 2)]
    wait_for(lambda: log.exists() and len(log.read_text().split()) == SLOTS, "bodies in all slots to run")
    wait_for(lambda: CAUSES[how] in gpu(client)["results"], "the cause to be told")
    before = asked(backend)
    wait_for(lambda: asked(backend) >= before + 2, "Redis to be asked again")
    assert unacknowledged(redis_server, results[:SLOTS]) == SLOTS, "none is acknowledged without an outcome"
    assert sorted(log.read_text().split()) == ["0", "1", "2"], "and nothing runs whose result would have no place"
    assert gpu(client)["running"] == SLOTS
    accept(backend)
    assert [result.get(**GET) for result in results] == ["0", "1", "2", "3", "4"]
    assert sorted(log.read_text().split()) == ["0", "1", "2", "3", "4"], "each has run once"
    wait_for(lambda: unacknowledged(redis_server, results) == 0, "the acknowledgements")
    wait_for(lambda: gpu(client)["results"] == "", "the trouble to be over")


def test_a_driver_that_is_killed_while_results_wait_costs_no_outcome(
    client, to_refused, backend, redis_server, tmp_path
):
    log = tmp_path / "log"
    refuse(backend, "replica")
    results = [to_refused("records", str(log), str(number)) for number in range(SLOTS)]
    wait_for(lambda: log.exists() and len(log.read_text().split()) == SLOTS, "all bodies to run")
    wait_for(lambda: CAUSES["replica"] in gpu(client)["results"], "the cause to be told")
    os.kill(gpu(client)["driver"], signal.SIGKILL)
    wait_for(lambda: len(log.read_text().split()) == 2 * SLOTS, "the next driver to run them again")
    assert unacknowledged(redis_server, results) == SLOTS, "Celery would acknowledge them and lose that they are lost"
    accept(backend)
    assert [result.get(**GET) for result in results] == ["0", "1", "2"]
    wait_for(lambda: unacknowledged(redis_server, results) == 0, "the acknowledgements")


def test_an_early_one_waits_for_as_long_as_celery_would_and_the_log_has_it(
    refused, client, to_refused, backend, tmp_path
):
    log = tmp_path / "log"
    refuse(backend, "full")
    lost = to_refused("records_early", str(log), "once")
    wait_for(lambda: f"SETEX celery-task-meta-{lost.id}" in refused.output, "the cause and the task")
    wait_for(lambda: gpu(client)["in_flight"] == 0, "the slot to come back")
    accept(backend)
    assert to_refused("add", 1, 1).get(**GET) == 2, "and the worker goes on"
    assert log.read_text().split() == ["once"]


def test_a_result_that_alone_is_too_large_is_a_failure_that_says_what_to_do(to_refused, backend):
    backend.client.config_set("maxmemory", backend.client.info("memory")["used_memory"] + 8 * MIB)
    large = to_refused("big", "x", 24 * MIB)
    with pytest.raises(Exception, match=r"OOM command not allowed.*by reference") as caught:
        large.get(**GET)
    assert (type(caught.value).__name__, large.state) == ("ResultRefused", "FAILURE")
    assert to_refused("add", 1, 2).get(**GET) == 3, "smaller ones are stored"


def test_a_worker_that_ends_leaves_what_is_not_stored_in_the_broker(
    refused, client, to_refused, backend, redis_server, tmp_path
):
    """The last test of this worker."""
    log = tmp_path / "log"
    refuse(backend, "replica")
    result = to_refused("records", str(log), "once")
    wait_for(log.exists, "the body to run")
    assert refused.stop() == 0
    assert f"{result.id}] has run and its outcome is not stored" in refused.output
    (message,) = redis_server.client.lrange(QUEUE, 0, -1)
    assert json.loads(message)["headers"]["id"] == result.id and unacknowledged(redis_server, [result]) == 0
    redis_server.client.delete(QUEUE)
    accept(backend)
    assert result.state == "PENDING" and log.read_text().split() == ["once"]


def test_more_large_results_at_once_than_the_object_store_holds(worker, send, gpu_stats):
    results = [send("big", str(number), 12 * MIB) for number in range(10, 22)]  # 288 MiB; the store has 100 MB
    for number, result in enumerate(results, 10):
        assert result.get(**GET) == str(number) * 12 * MIB
        result.forget()
    assert gpu_stats()["in_flight"] == 0


def test_more_large_arguments_at_once_than_the_object_store_holds(worker, send, gpu_stats):
    results = [send("big", "x" * 12 * MIB, 0) for _ in range(12)]
    assert [result.get(**GET) for result in results] == [""] * 12
    assert gpu_stats()["in_flight"] == 0
