"""Flower shows GPU tasks as it shows all others, sends them and revokes them."""

import contextlib
import json
import socket
import sys
import urllib.error
import urllib.request

import pytest

from bridge.worker.standalone import free_port
from tests.support.services import Process, Worker, wait_for

APP = "tests.apps.twins:app"
WORKER = f"flowers@{socket.gethostname()}"
NAP_S = 0.2


class Flower(Process):
    """Real Flower, asked through its HTTP API."""

    def __init__(self, folder, env):
        self.port = free_port()
        command = [sys.executable, "-m", "celery", "-A", APP, "flower", "--address=127.0.0.1", f"--port={self.port}"]
        super().__init__(command, folder / "flower.log", env={**env, "FLOWER_UNAUTHENTICATED_API": "true"})
        self.says("Connected to")

    def asks(self, path, payload=None):
        """What the API answers; POST when there is a payload."""
        body = None if payload is None else json.dumps(payload).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/{path}", body, timeout=30) as reply:
            return json.load(reply)

    def send(self, task, *args, **kwargs):
        """Send a task by its API; the task's id."""
        return self.asks(f"task/async-apply/twins.{task}", {"args": args, "kwargs": kwargs})["task-id"]

    def info(self, task_id):
        """What is known of a task; no more than nothing until its first event."""
        with contextlib.suppress(urllib.error.HTTPError):
            return self.asks(f"task/info/{task_id}")
        return {"state": "unknown"}

    def reaches(self, task_id, state):
        """Wait for a task's state; what is known of the task then."""
        wait_for(lambda: self.info(task_id)["state"] == state, f"{state} of {task_id}")
        return self.info(task_id)


@pytest.fixture(scope="module")
def flower(environment, redis_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flower")
    worker = Worker(folder, "-E", "-c", "1", "-n", "flowers@%h", app=APP, env=environment)
    flower = Flower(folder, environment)
    yield flower
    flower.kill_group()
    assert worker.stop() == 0, worker.output[-5000:]
    redis_server.client.delete("twins.later")


def test_every_state_with_what_belongs_to_it(flower):
    sent = {
        "SUCCESS": flower.send("gpu.nap", NAP_S, label="one"),
        "FAILURE": flower.send("gpu.fails", "odd"),
        "RETRY": flower.send("gpu.postpones"),
    }
    found = {state: flower.reaches(task_id, state) for state, task_id in sent.items()}
    assert {task["worker"] for task in found.values()} == {WORKER}
    done = found["SUCCESS"]
    assert (done["name"], done["args"], done["kwargs"]) == ("twins.gpu.nap", f"[{NAP_S}]", "{'label': 'one'}")
    assert (done["result"], done["routing_key"]) == (f"[{NAP_S}, 'one']", "twins")
    assert NAP_S <= done["runtime"] <= done["succeeded"] - done["received"]
    failed = found["FAILURE"]
    assert failed["exception"] == "ValueError('odd')" and "raise ValueError(reason)" in failed["traceback"]
    assert found["RETRY"]["exception"] == "ValueError('later')"
    again = flower.reaches(flower.send("gpu.retries", 1), "SUCCESS")
    assert (again["retries"], again["result"]) == (1, "1")
    assert flower.asks(f"task/result/{sent['SUCCESS']}")["result"] == [NAP_S, "one"]


def test_started_while_it_runs_and_revoked_by_flower(flower, tmp_path):
    task_id = flower.send("gpu.waits", str(tmp_path / "never"))
    running = flower.reaches(task_id, "STARTED")
    assert running["started"] >= running["received"] and running["runtime"] is None
    flower.asks(f"task/revoke/{task_id}?terminate=true", {})
    assert flower.reaches(task_id, "REVOKED")["worker"] == WORKER


def test_the_lists_of_tasks_and_workers(flower):
    gpu, cpu = (flower.reaches(flower.send(f"{kind}.nap", 0), "SUCCESS")["uuid"] for kind in ("gpu", "cpu"))
    assert {gpu, cpu} <= set(flower.asks("tasks?state=SUCCESS"))
    assert cpu not in flower.asks("tasks?taskname=twins.gpu.nap")
    assert {"twins.gpu.nap", "twins.cpu.nap"} <= set(flower.asks("workers?refresh=true")[WORKER]["registered"])

    def counted():
        (actor,) = flower.asks("workers?refresh=true")[WORKER]["stats"]["pool"]["gpu"]["actors"]
        return "twins.gpu.nap" in actor["by_task"]

    wait_for(counted, "the GPU pool's figures in the worker's stats")
