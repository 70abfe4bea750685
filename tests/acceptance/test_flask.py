"""The Flask project of examples/: its own server and a worker, each as its README starts it."""

import json
import sys
import urllib.request

import pytest

from bridge.worker.standalone import free_port
from tests.support.services import ROOT, Process, wait_for

PROJECT = ROOT / "examples" / "flask_shop"


def fetch(url, payload=None):
    """(status, decoded JSON); POST when there is a payload."""
    body = None if payload is None else json.dumps(payload).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return reply.status, json.load(reply)


@pytest.fixture(scope="module")
def worker(environment, tmp_path_factory):
    more = {"FLASK_UNITS": "km", "FLASK_CELERY__include": '["tests.apps.flask_batch"]', "PYTHONPATH": str(ROOT)}
    env = {**environment, **more}
    command = [sys.executable, "-m", "bridge.worker", "-A", "make_celery", "-c", "1", "-l", "INFO", "-n", "flask@%h"]
    process = Process(command, tmp_path_factory.mktemp("worker") / "log", env=env, cwd=PROJECT)
    process.says(" ready.")
    yield process
    assert process.stop() == 0, process.output[-5000:]


@pytest.fixture(scope="module")
def server(environment, tmp_path_factory):
    port = free_port()
    command = [sys.executable, "-m", "flask", "--app", "flask_shop", "run", "--port", str(port)]
    process = Process(command, tmp_path_factory.mktemp("server") / "log", env=environment, cwd=PROJECT)
    process.says("Running on")
    yield f"http://127.0.0.1:{port}"
    process.kill_group()


@pytest.fixture
def ask(server):
    """``ask("norm", [3, 4])`` posts the task over HTTP and polls for its result; (task id, what the route says)."""

    def post_and_poll(task, payload):
        status, sent = fetch(f"{server}/{task}", payload)
        assert status == 202

        def ended():
            _, found = fetch(f"{server}/results/{sent['id']}")
            return found if found["state"] in ("SUCCESS", "FAILURE") else None

        return sent["id"], wait_for(ended, f"the result of {task}")

    return post_and_poll


def test_each_kind_runs_in_its_process_within_the_application_context(worker, ask):
    gpu, found = ask("norm", [3, 4])
    assert found == {"state": "SUCCESS", "value": "5 km"}
    cpu, found = ask("count", [3, 4])
    assert found == {"state": "SUCCESS", "value": "2 values in km"}
    worker.says(f"/GpuDriver-1] Task flask_shop.tasks.norm[{gpu}] succeeded")
    worker.says(f"/ForkPoolWorker-1] Task flask_shop.tasks.count[{cpu}] succeeded")


def test_an_error_reaches_the_page(worker, ask):
    _, found = ask("norm", ["three", 4])
    assert found["state"] == "FAILURE" and "values.0: Input should be a valid number" in found["error"]


def test_a_shared_run_has_the_application_context_too(worker, producer):
    sent = [producer.send_task("tests.apps.flask_batch.label", [number]) for number in range(20)]
    assert [result.get(timeout=60) for result in sent] == [f"{number} km" for number in range(20)]
