"""Redis that refuses results, and an object store with less room than what is on its way."""

import socket
from pathlib import Path

import pytest
from celery import Celery

from tests.support.services import RedisServer, Worker, inspected, wait_for

GET = {"timeout": 90}
MIB = 1 << 20
QUEUE = "refused"


@pytest.fixture(scope="module")
def backend(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("backend"))
    yield server
    server.client.close()
    server.kill_group()


@pytest.fixture(scope="module")
def refused(environment, backend, tmp_path_factory):
    """A worker whose results go to a Redis of their own."""
    env = {**environment, "CELERY_RESULT_BACKEND": backend.url}
    worker = Worker(tmp_path_factory.mktemp("refused"), "-c", "1", "-Q", QUEUE, "-n", "refused@%h", env=env)
    yield worker
    assert worker.stop() == 0, worker.output[-5000:]


def refuse(backend, how):
    if how == "maxmemory":
        backend.client.config_set("maxmemory", 1)
    else:
        backend.client.execute_command("REPLICAOF", "127.0.0.1", "1")


def accept(backend):
    backend.client.config_set("maxmemory", 0)
    backend.client.execute_command("REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize(
    ("how", "cause"),
    [("maxmemory", "command not allowed when used memory"), ("replica", "You can't write against a read only replica")],
)
def test_a_result_that_redis_refuses_fails_its_task_once_and_says_why(
    refused, backend, redis_server, tmp_path, how, cause
):
    client = Celery("client", broker=redis_server.url, backend=backend.url, set_as_current=False)
    log = tmp_path / "log"

    def send(name, *args):
        return client.send_task(f"shop.{name}", args, queue=QUEUE)

    def in_flight():
        name = f"refused@{socket.gethostname()}"
        return inspected(client, name, "gpu")["in_flight"]

    refuse(backend, how)
    try:
        lost = [send("records", str(log), str(number)) for number in range(3)]
        for each in lost:
            wait_for(lambda each=each: f"SETEX celery-task-meta-{each.id}" in refused.output, "the cause and the task")
        wait_for(lambda: in_flight() == 0, "the slots to come back")
    finally:
        accept(backend)
    assert cause in refused.output
    assert sorted(Path(log).read_text().split()) == ["0", "1", "2"], "each has run once: there is no endless retry"
    assert send("add", 1, 1).get(**GET) == 2, "and the worker goes on"
    assert sorted(Path(log).read_text().split()) == ["0", "1", "2"]
    client.close()


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
