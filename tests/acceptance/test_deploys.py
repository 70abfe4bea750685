"""A rolling restart of two workers under load, with changed code: nothing is lost, each task meets the right code."""

import shutil
import socket
import threading
from collections import Counter

import pytest

from tests.support.services import ROOT, RayCluster, Worker, inspected, wait_for

GET = {"timeout": 90}
APP = """
import time
from pathlib import Path
from tests.apps.base import App

VERSION = "{version}"
app = App("deployed")
app.conf.update(task_acks_late=True, task_default_queue="deployed", worker_prefetch_multiplier=1)

@app.task(name="deployed.version", bind=True, gpu=True)
def version(self, folder, number):
    with open(Path(folder, str(number)), "a") as file:
        file.write("run\\n")
    time.sleep(0.02)
    return VERSION, self.request.hostname
"""


class Load:
    """Tasks sent without a pause, a few in hand at a time, as long as it lives."""

    def __init__(self, producer, folder, in_hand=8):
        self.values, self._producer, self._folder, self._ends = {}, producer, str(folder), threading.Event()
        self.error = None
        self._in_hand = in_hand
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        try:
            pending, number = {}, 0
            while pending or not self._ends.is_set():
                while len(pending) < self._in_hand and not self._ends.is_set():
                    arguments = (self._folder, number)
                    pending[number] = self._producer.send_task("deployed.version", arguments, queue="deployed")
                    number += 1
                oldest = next(iter(pending))
                self.values[oldest] = pending.pop(oldest).get(**GET)
        except BaseException as error:
            self.error = error

    def goes_on(self, count=20):
        """Wait for so many more results."""
        wanted = len(self.values) + count
        wait_for(lambda: len(self.values) >= wanted or self.error, "tasks to go on under the deploy")
        assert self.error is None, self.error

    def end(self):
        self._ends.set()
        self._thread.join(120)
        assert self.error is None, self.error


@pytest.fixture
def cluster(tmp_path):
    cluster = RayCluster(tmp_path, gpus=2)
    yield cluster
    cluster.stop()
    shutil.rmtree(cluster.folder, ignore_errors=True)


def test_a_rolling_restart_under_load(cluster, environment, producer, tmp_path):
    code, runs = tmp_path / "code", tmp_path / "runs"
    code.mkdir(), runs.mkdir()
    env = {
        **environment,
        "BRIDGE_RAY_ADDRESS": cluster.address,
        "BRIDGE_NAMESPACE": "deployed",
        "BRIDGE_BEAT_S": "0.2",
        "PYTHONPATH": f"{code}:{ROOT}",
    }

    def start(name):
        options = ("-c", "1", "-n", f"{name}@%h")
        return Worker(tmp_path, *options, app="deployed:app", env=env, log=f"{name}.log")

    def actors(name):
        return inspected(producer, f"{name}@{socket.gethostname()}", "gpu")["actors"]

    def both_ready(name):
        wait_for(lambda: [actor["state"] for actor in actors(name)] == ["ready", "ready"], f"both actors of {name}")

    (code / "deployed.py").write_text(APP.format(version="first"))
    workers = {"a1": start("a1"), "b1": start("b1")}
    both_ready("a1"), both_ready("b1")
    load = Load(producer, runs)
    load.goes_on()
    (code / "deployed.py").write_text(APP.format(version="the second"))

    assert workers["a1"].stop() == 0
    load.goes_on()  # by the old worker alone
    workers["a2"] = start("a2")
    both_ready("a2")
    load.goes_on()  # by both: old and new code at once, each in executors of its own
    both_ready("b1"), both_ready("a2")
    executors = [{actor["executor_pid"] for actor in actors(name)} for name in ("b1", "a2")]
    assert len(executors[0] | executors[1]) == 4, "each actor has an executor of either release"
    assert workers["b1"].stop() == 0
    load.goes_on()  # by the new worker alone
    workers["b2"] = start("b2")
    both_ready("b2")
    load.goes_on(40)
    load.end()

    done = Counter((version, name.partition("@")[0]) for version, name in load.values.values())
    assert {name: version for version, name in done} == {
        "a1": "first", "b1": "first", "a2": "the second", "b2": "the second",
    }, done  # fmt: skip
    assert {path.name: path.read_text() for path in runs.iterdir()} == {
        str(number): "run\n" for number in load.values
    }, "each task has run once"
    for name in ("a2", "b2"):
        assert workers[name].stop() == 0
    for name, worker in workers.items():
        assert "takes no calls" not in worker.output, f"{name} had no fewer actors than before at any moment"
