"""One of two GPUs goes bad: it is fenced, everybody learns why, its tasks run on the other one, and it comes back."""

import shutil
import socket

import pytest
from celery import Celery

from tests.acceptance.test_events import Events
from tests.support.services import RayCluster, Worker, inspected, wait_for

GET = {"timeout": 90}
NAME = f"sick@{socket.gethostname()}"


@pytest.fixture
def cluster(tmp_path):
    cluster = RayCluster(tmp_path, gpus=2)
    yield cluster
    cluster.stop()
    shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture
def client(redis_server):
    app = Celery("client", broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    app.conf.task_default_queue = "sick"
    yield app
    app.close()


def test_a_bad_gpu_is_fenced_and_its_tasks_run_on_the_other_one(cluster, environment, client, tmp_path):
    sick, runs = tmp_path / "sick", tmp_path / "runs"
    sick.mkdir(), runs.mkdir()
    env = {
        **environment,
        "BRIDGE_RAY_ADDRESS": cluster.address,
        "BRIDGE_NAMESPACE": "sick",
        "BRIDGE_BEAT_S": "0.2",
        "BRIDGE_ENVIRONMENT": '["SICK_*"]',
        "BRIDGE_FENCE_PROBE_S": "[600]",
        "SICK_FOLDER": str(sick),
    }
    worker = Worker(tmp_path, "-E", "-c", "1", "-n", "sick@%h", app="tests.apps.sick:app", env=env)
    events = Events(client)

    def actors():
        return inspected(client, NAME, "gpu")["actors"]

    def send(*numbers):
        return [client.send_task("sick.works", (str(runs), number)) for number in numbers]

    def told(kind):
        return [event for event in events.seen if event["type"] == kind]

    wait_for(lambda: [actor["state"] for actor in actors()] == ["ready", "ready"], "both actors")
    (sick / "0").touch()
    results = []

    def has_fenced():
        results.extend(send(*range(len(results), len(results) + 4)))
        return told("gpu-fenced")

    wait_for(has_fenced, "the fence", every_s=0.2)
    results += send(*range(len(results), len(results) + 20))
    assert {result.get(**GET) for result in results} == {"1"}, "every task ends on the good GPU"
    rows = {actor["state"]: actor for actor in actors()}
    assert set(rows) == {"fenced", "ready"}
    fenced = rows["fenced"]
    assert "a first kernel failed" in fenced["reason"] and 0 < fenced["probe_in_s"] <= 600
    assert fenced["executor_pid"] == 0, "nothing runs there"
    (event,) = told("gpu-fenced")
    assert (event["hostname"], event["actor"], event["reason"]) == (NAME, fenced["slot"], fenced["reason"])
    assert event["node"] == fenced["node"]
    assert worker.output.count("is fenced: ") == 1, "said once, however often the actor is heard of"
    assert f"ERROR/GpuDriver-1] the GPU of actor {fenced['slot']} on" in worker.output

    (sick / "0").unlink()
    client.control.broadcast("gpu_restart", destination=[NAME], reply=True, timeout=20)
    wait_for(lambda: told("gpu-unfenced"), "the repaired GPU's return")
    wait_for(lambda: [actor["state"] for actor in actors()] == ["ready", "ready"], "both actors")
    assert {actor["device_faults"] for actor in actors()} == {0}

    def both_work():
        return {result.get(**GET) for result in send(*range(8))} == {"0", "1"}

    wait_for(both_work, "work on both")
    events.close()
    assert worker.stop() == 0, worker.output[-5000:]
