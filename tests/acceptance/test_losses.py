"""Executor, actor or driver lost under a task: Celery's settings decide, as docs/celery-compatibility.md tells."""

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.support.services import Worker, inspected, wait_for

GET = {"timeout": 90}
NAME = f"lossy@{socket.gethostname()}"


@pytest.fixture(scope="module")
def worker(environment, redis_server, tmp_path_factory):
    redis_server.client.flushall()
    folder = tmp_path_factory.mktemp("lossy")
    process = Worker(folder, "-c", "1", "-n", "lossy@%h", app="tests.apps.lossy:app", env=environment)
    yield process
    assert process.popen.poll() is None, process.output[-5000:]
    assert process.stop() == 0, process.output[-5000:]


@pytest.fixture
def gpu(producer, worker):
    """``gpu()``: what `inspect gpu` says now."""
    return lambda: inspected(producer, NAME, "gpu")


def runs(path):
    return Path(path).read_text().count("run") if Path(path).exists() else 0


def ended(result):
    value = result.get(propagate=False, **GET)
    return value if result.state == "SUCCESS" else type(value).__name__


@pytest.mark.parametrize(
    ("task", "how", "times"),
    [
        ("early", "WorkerLostError", 1),
        ("late", "TaskPoisoned", 2),
        ("late_keep", "WorkerLostError", 1),
        ("late_reject", "TaskPoisoned", 2),
        ("early_retry", "WorkerLostError", 3),
        ("late_retry", "WorkerLostError", 3),
    ],
)
def test_the_executor_dies_while_the_task_runs(worker, producer, tmp_path, task, how, times):
    log = str(tmp_path / "log")
    result = producer.send_task(f"lossy.dies.{task}", [log])
    assert (ended(result), runs(log)) == (how, times)


def test_whoever_shared_a_run_with_the_culprit(worker, producer, tmp_path):
    def send(task, *names):
        return [producer.send_task(f"lossy.batch.{task}", [str(tmp_path / f"{task}-{name}")]) for name in names]

    late = [ended(result) for result in send("late", "a", "b", "deadly", "c")]
    assert late == ["done", "done", "TaskPoisoned", "done"]
    early = send("early", "a", "b", "deadly", "c")
    assert ended(early[2]) == "WorkerLostError"
    for result, name in zip(early, ("a", "b", "deadly", "c"), strict=True):
        lost = ended(result) == "WorkerLostError"
        assert runs(tmp_path / f"early-{name}") == 1, "an early one never runs twice, whatever becomes of it"
        assert lost or ended(result) == "done"


def lose(gpu, who):
    """Kill the actor's or the driver's process under a running body; wait until a new one is there."""
    info = gpu()
    pid = info["driver"] if who == "driver" else info["actors"][0]["pid"]
    os.kill(pid, signal.SIGKILL)

    def replaced():
        now = gpu()
        ready = [actor["pid"] for actor in now["actors"] if actor["state"] == "ready"]
        return ready and pid not in (now["driver"], *ready)

    wait_for(replaced, f"another {who} in the place of {pid}")


@pytest.mark.parametrize(
    ("task", "how", "times"),
    [
        ("early", "WorkerLostError", 1),
        ("late", "done", 2),
        ("late_keep", "WorkerLostError", 1),
        ("late_reject", "done", 2),
        ("early_retry", "done", 2),
        ("late_retry", "done", 2),
    ],
)
def test_the_actor_is_lost_while_the_task_runs(worker, producer, gpu, tmp_path, task, how, times):
    check(producer, gpu, tmp_path, task, how, times, "actor")


@pytest.mark.parametrize(
    ("task", "how", "times"),
    [
        ("early", "WorkerLostError", 1),
        ("late", "WorkerLostError", 1),
        ("late_keep", "WorkerLostError", 1),
        ("late_reject", "done", 2),
        ("early_retry", "done", 2),
        ("late_retry", "done", 2),
    ],
)
def test_the_driver_is_lost_while_the_task_runs(worker, producer, gpu, tmp_path, task, how, times):
    check(producer, gpu, tmp_path, task, how, times, "driver")


def check(producer, gpu, tmp_path, task, how, times, who):
    log, gate = str(tmp_path / "log"), tmp_path / "gate"
    result = producer.send_task(f"lossy.holds.{task}", [log, str(gate)])
    wait_for(lambda: runs(log), "the body to run")
    lose(gpu, who)
    gate.touch()
    assert (ended(result), runs(log)) == (how, times)


def test_a_large_value_is_lost_with_its_actor_before_the_driver_has_it(worker, producer, gpu, tmp_path):
    log, gate = tmp_path / "log", tmp_path / "gate"
    result = producer.send_task("lossy.large", [str(log), str(gate)])
    wait_for(lambda: runs(log), "the body to run")
    info = gpu()
    os.kill(info["driver"], signal.SIGSTOP)  # it will not fetch what the actor has
    try:
        gate.touch()
        wait_for(lambda: "end" in log.read_text(), "the body to end")
        os.kill(info["actors"][0]["pid"], signal.SIGKILL)
    finally:
        os.kill(info["driver"], signal.SIGCONT)
    assert ended(result) == "x" * 300_000
    assert (runs(log), gpu()["driver"]) == (2, info["driver"])
