"""Ray's head killed under running bodies, and started again: with what it knew kept in a Redis, and without."""

import os
import socket

import psutil
import pytest

from bridge.driver.head import VARIABLE
from bridge.worker.standalone import free_port
from tests.support.heads import TwoNodes, kill_all_of
from tests.support.services import RedisServer, Worker, inspected, wait_for
from tests.support.tls import Certificate, TlsProxy

GET = {"timeout": 90}


@pytest.fixture
def start(environment, producer, tmp_path, monkeypatch):
    """``start(env)``: two nodes whose head runs with `env`, and a worker of the lossy app; both are patient."""
    monkeypatch.setenv(VARIABLE, "170")
    started = []

    class Site:
        def __init__(self, env=None):
            started.append(self)
            self.name, self.folder = f"head@{socket.gethostname()}", tmp_path
            self.cluster = TwoNodes(tmp_path, free_port(), env)
            settings = {
                **environment,
                "BRIDGE_RAY_ADDRESS": self.cluster.address,
                "BRIDGE_BEAT_S": "0.5",
                "BRIDGE_HEAD_WAIT_S": "160",
            }
            options = ("-c", "1", "-Q", "head", "-n", "head@%h")
            self.worker = Worker(tmp_path, *options, app="tests.apps.lossy:app", env=settings)

        def gpu(self):
            return inspected(producer, self.name, "gpu")

        def send(self, task, name):
            """A body that runs until `release`; its result."""
            log, gate = self.folder / name, self.folder / f"{name}-gate"
            return producer.send_task(f"lossy.holds.{task}", [str(log), str(gate)], queue="head")

        def runs(self, name):
            log = self.folder / name
            return log.read_text().count("run") if log.exists() else 0

        def release(self, *names):
            for name in names:
                (self.folder / f"{name}-gate").touch()

    yield Site
    for each in started:
        each.worker.kill_group()
        each.cluster.close()


def cpu_task_works(site, producer):
    return producer.send_task("lossy.cpu", [1], queue="head").get(**GET) == 1


@pytest.fixture
def memory(tmp_path):
    """What makes a head remember, as docs/howto/production-cluster.md says: a Redis that wants certificates."""
    folder = tmp_path / "memory"
    folder.mkdir()
    server, authority = RedisServer(folder), Certificate(folder, "authority")
    ours = Certificate(folder, "head", authority)
    proxy = TlsProxy(Certificate(folder, "redis", authority), server.port, clients_of=authority)
    yield {
        "RAY_REDIS_ADDRESS": f"rediss://localhost:{proxy.port}",
        "RAY_REDIS_CA_CERT": str(authority.file),
        "RAY_REDIS_CLIENT_CERT": str(ours.file),
        "RAY_REDIS_CLIENT_KEY": str(ours.key_file),
        "RAY_external_storage_namespace": "head",
    }
    proxy.stop()
    server.client.close()
    server.kill_group()


def test_a_head_that_remembers_costs_nothing(memory, start, producer):
    """What runs goes on, what comes meanwhile starts on the warm actor, and nothing is built anew afterwards."""
    site = start(memory)
    before, early = site.gpu(), site.send("early", "first")
    wait_for(lambda: site.runs("first"), "the body to run")
    kill_all_of(site.cluster.head)
    site.worker.says("Ray's head does not answer")
    second = site.send("early", "second")
    site.release("first")
    assert early.get(**GET) == "done"
    wait_for(lambda: site.runs("second"), "a task that came without a head to run")
    assert cpu_task_works(site, producer)
    site.cluster.start_head()
    site.worker.says("Ray's head is back")
    site.release("second")
    assert second.get(**GET) == "done"
    assert (site.runs("first"), site.runs("second")) == (1, 1)
    after = wait_for(lambda: site.gpu()["nodes"] >= 2 and site.gpu(), "both nodes to be seen")
    assert after["driver"] == before["driver"], "no driver was lost"
    assert after["actors"][0]["executor_pid"] == before["actors"][0]["executor_pid"], "nor any warm executor"
    os.kill(after["actors"][0]["pid"], 9)  # what the head knows it can use: it starts the actor again
    third = site.send("late", "third")
    site.release("third")
    assert third.get(**GET) == "done"


def test_a_head_that_forgets_costs_what_was_running(start, producer):
    site = start()
    before, early, late = site.gpu(), site.send("early", "early"), site.send("late_reject", "late")
    wait_for(lambda: site.runs("early"), "the body to run")
    kill_all_of(site.cluster.head)
    site.worker.says("Ray's head does not answer")
    site.cluster.start_head()
    site.worker.says("the GPU driver ended (exit code 75): 1 GPU tasks are lost, 1 go to the next driver")
    assert type(early.get(propagate=False, **GET)).__name__ == "WorkerLostError", "Celery's rule for a lost worker"
    assert "StackTrace" not in site.worker.output, "it left by itself, before Ray would have ended it"
    assert cpu_task_works(site, producer)
    assert late.state == "PENDING", "it waits for a GPU"
    kill_all_of(site.cluster.node)  # its processes end by themselves after a minute: Ray wants it started again
    site.cluster.start_node()
    site.release("late")
    assert late.get(**GET) == "done"
    assert (site.runs("early"), site.runs("late")) == (1, 1)
    assert "no GPU actor has it" not in site.worker.output, "the new actor suits"
    now = site.gpu()
    assert now["driver"] != before["driver"] and not psutil.pid_exists(before["driver"])
