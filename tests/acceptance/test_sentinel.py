"""Redis behind a sentinel as broker and backend: the master is killed, the replica takes over, nothing is lost."""

import json
import socket

import psutil
import pytest
from celery import Celery

from tests.support.sentinel import NAME, RedisPair
from tests.support.services import Worker, inspected, wait_for

GET = {"timeout": 60}
QUEUE = "failover"
CONF = {
    "task_default_queue": QUEUE,
    "broker_transport_options": {"master_name": NAME, "visibility_timeout": 3},  # what was in hand comes again after it
    "result_backend_transport_options": {"master_name": NAME},
    "result_backend_always_retry": True,  # else stock Celery ends CPU tasks whose result finds no master
}


@pytest.fixture
def pair(tmp_path):
    made = RedisPair(tmp_path)
    yield made
    made.close()


def client(url):
    app = Celery("producer", broker=url, backend=url, set_as_current=False)
    app.conf.update(CONF)
    return app


def connections_of(worker, server):
    """What Redis knows of the worker's own connections: the command each has sent last, and its flags."""
    ports = {each.laddr.port for each in psutil.Process(worker.pid).net_connections("tcp")}
    return [each for each in server.client.client_list() if int(each["addr"].rsplit(":")[-1]) in ports]


def waits_without_taking(worker, server):
    found = connections_of(worker, server)
    assert not any(each["cmd"] == "brpop" for each in found)
    return any("t" in each["flags"] and each["cmd"] == "exists" for each in found)


def test_a_failover_loses_nothing(pair, environment, tmp_path):
    env = {
        **environment, "CELERY_BROKER_URL": pair.url, "CELERY_RESULT_BACKEND": pair.url,
        "CELERY_MESSAGES": json.dumps(CONF), "BRIDGE_GPU_SLOTS": "3",
    }  # fmt: skip
    worker = Worker(tmp_path, "-c", "1", "-n", "failover@%h", app="tests.apps.messages:app", env=env)
    try:
        wait_for(lambda: waits_without_taking(worker, pair.master), "the worker to wait at the master")
        sent = tasks_around(pair.fail_over, pair.url, tmp_path)
        with client(pair.url) as producer:
            assert [producer.AsyncResult(each).get(**GET) for each in sent] == list(sent.values())
            wait_for(lambda: waits_without_taking(worker, pair.replica), "the worker to wait at the new master")
            wait_for(lambda: not pair.replica.client.exists("unacked", QUEUE), "nothing to be left")
            stats = inspected(producer, f"failover@{socket.gethostname()}", "stats")
        assert stats["pool"]["gpu"]["in_flight"] == 0
        assert "Redis did not take" not in worker.output
        assert worker.stop() == 0, worker.output[-5000:]
    finally:
        worker.kill_group()


def tasks_around(fail_over, url, folder):
    """Tasks sent before a failover and after it, one of them running meanwhile: by id, what they are to return."""
    gate, log = folder / "go", folder / "log"

    def send(producer, name, *args):
        return producer.send_task(f"messages.{name}", args).id, args[-1]

    with client(url) as producer:
        sent = [send(producer, "gpu.holds", str(gate), str(log), "held")]
        wait_for(log.exists, "the body to run")
        sent += [send(producer, f"{kind}.same", n) for n in range(8) for kind in ("gpu", "cpu")]
    fail_over()
    gate.touch()
    with client(url) as producer:
        sent += [send(producer, f"{kind}.same", n) for n in range(8) for kind in ("gpu", "cpu")]
    return dict(sent)
