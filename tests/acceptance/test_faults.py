"""Real kills: executor, actor, driver. Nothing lost, blame exact, the worker lives."""

import os
import signal
from pathlib import Path

import pytest

from tests.support.services import Worker, wait_for

GET = {"timeout": 90}


def lines(path):
    return path.read_text().split("\n")[:-1] if path.exists() else []


def failure(result):
    with pytest.raises(Exception) as caught:
        result.get(**GET)
    return type(caught.value).__name__, caught.value.args


def test_executor_killed_from_outside_runs_only_its_running_task_again(worker, send, tmp_path):
    log, others = tmp_path / "nap", tmp_path / "others"
    before = [send("records", str(others), f"before {n}") for n in range(3)]
    assert [result.get(**GET) for result in before] == [f"before {n}" for n in range(3)]
    running = send("nap", 2, kwargs={"path": str(log)})
    wait_for(lambda: lines(log), "the body to start")
    waiting = [send("records", str(others), f"after {n}") for n in range(5)]
    os.kill(int(lines(log)[0].split()[1]), signal.SIGKILL)
    assert running.get(**GET) == 2
    assert [result.get(**GET) for result in waiting] == [f"after {n}" for n in range(5)]
    assert [line.split()[0] for line in lines(log)] == ["start", "start", "end"]
    assert sorted(lines(others)) == sorted([f"before {n}" for n in range(3)] + [f"after {n}" for n in range(5)])


def test_a_task_that_kills_its_executor_once_succeeds_at_the_second_run(worker, send, tmp_path):
    assert send("kills_executor", str(tmp_path / "log"), 1).get(**GET) == "survived"


def test_a_task_that_always_kills_its_executor_is_poisoned_and_its_neighbours_are_not(worker, send, tmp_path):
    log = tmp_path / "others"
    neighbours = [send("records", str(log), str(n)) for n in range(20)]
    killer = send("segfaults", str(tmp_path / "log"))
    neighbours += [send("records", str(log), str(n)) for n in range(20, 40)]
    name, args = failure(killer)
    assert name == "TaskPoisoned" and list(args) == ["shop.segfaults", 2, "signal 11 (SIGSEGV)"]
    assert lines(tmp_path / "log") == ["segfault", "segfault"]
    assert [result.get(**GET) for result in neighbours] == [str(n) for n in range(40)]
    assert sorted(lines(log), key=int) == [str(n) for n in range(40)], "neighbours must run once"


def test_actor_killed(worker, send, gpu_stats, tmp_path):
    log = tmp_path / "nap"
    running = send("nap", 2, kwargs={"path": str(log)})
    wait_for(lambda: lines(log), "the body to start")
    waiting = [send("records", str(tmp_path / "others"), str(n)) for n in range(5)]
    actor = gpu_stats()["actors"][0]["pid"]
    executor = int(lines(log)[0].split()[1])
    os.kill(actor, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{executor}").exists(), "the executor to die with its actor")
    assert running.get(**GET) == 2
    assert [result.get(**GET) for result in waiting] == [str(n) for n in range(5)]
    assert [line.split()[0] for line in lines(log)] == ["start", "start", "end"]
    assert gpu_stats()["actors"][0]["pid"] != actor


def test_driver_killed(worker, send, gpu_stats, tmp_path):
    log, others = tmp_path / "nap", tmp_path / "others"
    running = send("nap", 3, kwargs={"path": str(log)})
    wait_for(lambda: lines(log), "the body to start")
    waiting = [send("records", str(others), str(n)) for n in range(10)]
    wait_for(lambda: gpu_stats()["in_flight"] == 11, "all tasks to be in the worker")
    driver, executor = gpu_stats()["driver"], gpu_stats()["actors"][0]["executor_pid"]
    os.kill(driver, signal.SIGKILL)
    name, _ = failure(running)
    assert name == "WorkerLostError", "started tasks follow Celery's rule for a lost worker"
    assert [result.get(**GET) for result in waiting] == [str(n) for n in range(10)]
    assert sorted(lines(others), key=int) == [str(n) for n in range(10)], "what had not started runs once"
    assert gpu_stats()["driver"] != driver
    assert gpu_stats()["actors"][0]["executor_pid"] == executor, "the warm executor is found again"
    assert "end" not in lines(log), "the old driver's task was interrupted, not run to its end"


@pytest.mark.parametrize("task", ["memory_error", "array_memory_error"])
def test_memory_error_costs_one_task_and_not_the_worker(worker, send, tmp_path, task):
    name, _ = failure(send(task, *([str(tmp_path / "log")] if task == "memory_error" else [])))
    assert name == "GpuOutOfMemory"
    assert send("add", 1, 1).get(**GET) == 2
    assert worker.popen.poll() is None
    if task == "memory_error":
        assert lines(tmp_path / "log") == ["ran", "ran"], "once more alone after memory was freed, then no more"


def test_sys_exit_in_a_body_is_the_tasks_problem_only(worker, send):
    name, args = failure(send("exits", 3))
    assert name == "WorkerLostError" and args[0] == "Worker exited prematurely: exitcode 3."
    assert send("add", 1, 1).get(**GET) == 2


def test_revoking_a_running_task_keeps_the_executor_warm(worker, send, producer, tmp_path):
    before, log = send("pid").get(**GET), tmp_path / "log"
    running = send("nap", 60, kwargs={"path": str(log)})
    wait_for(lambda: lines(log), "the body to start")
    producer.control.revoke(running.id, terminate=True)
    assert failure(running)[0] == "TaskRevokedError"
    assert send("pid").get(**GET) == before
    assert lines(log) == [f"start {before}"]


@pytest.mark.parametrize("priority", ["5", "high", None, 3])
def test_an_odd_priority_costs_nobody_anything(worker, send, gpu_stats, tmp_path, priority):
    driver, log = gpu_stats()["driver"], tmp_path / "nap"
    results = [send("nap", 0.5, kwargs={"path": str(log)})]
    wait_for(lambda: lines(log), "the body to start")
    results += [send("add", n, 0, headers={"odd": True}, priority=priority) for n in range(3)] + [send("add", 3, 0)]
    assert [result.get(**GET) for result in results] == [0.5, 0, 1, 2, 3]
    assert gpu_stats()["driver"] == driver


def test_many_refused_payloads_behind_a_long_task(environment, producer, redis_server, tmp_path):
    env = {**environment, "BRIDGE_GPU_SLOTS": "1500"}
    other = Worker(tmp_path, "-c", "1", "-n", "many@%h", "-Q", "many", env=env)
    log = tmp_path / "nap"
    nap = producer.send_task("shop.nap", (3,), {"path": str(log)}, queue="many")
    wait_for(lambda: lines(log), "the body to start")
    refused = [producer.send_task("shop.length", ("x",), queue="many") for _ in range(1200)]
    assert nap.get(**GET) == 3, "each refused task ends before its body: a thousand in a row must not nest"
    assert {failure(result)[0] for result in refused} == {"PayloadInvalid"}
    assert other.stop() == 0


@pytest.mark.parametrize("victim", ["actor", "executor"])
def test_a_revoked_task_does_not_run_again_when_its_process_dies(worker, send, producer, gpu_stats, tmp_path, victim):
    log = tmp_path / "log"
    stuck = send("stuck_in_c", str(log))
    wait_for(lambda: lines(log), "the body to start")
    producer.control.revoke(stuck.id, terminate=True)
    assert failure(stuck)[0] == "TaskRevokedError"
    actor = gpu_stats()["actors"][0]
    os.kill(actor["pid"] if victim == "actor" else int(lines(log)[0].split()[1]), signal.SIGKILL)
    assert send("add", 1, 1).get(**GET) == 2
    wait_for(lambda: gpu_stats()["in_flight"] == 0, "the slot to come back")
    assert len(lines(log)) == 1
