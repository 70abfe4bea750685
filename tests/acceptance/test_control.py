"""Remote control: revoke in every form, inspect, and the commands that change a running worker."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.services import ROOT, Worker, wait_for

GET = {"timeout": 60}
NAME = f"control@{socket.gethostname()}"


def lines(path):
    return Path(path).read_text().split("\n")[:-1] if Path(path).exists() else []


def outcome(result):
    """State and class name of how a task ended."""
    value = result.get(propagate=False, **GET)
    return result.state, type(value).__name__


@pytest.fixture(scope="module")
def worker(environment, redis_server, tmp_path_factory):
    redis_server.client.flushall()
    folder = tmp_path_factory.mktemp("control")
    process = Worker(folder, "-c", "1", "-n", "control@%h", env={**environment, "BRIDGE_GRACE_S": "2"})
    yield process
    assert process.popen.poll() is None, process.output[-5000:]
    assert process.stop() == 0, process.output[-5000:]


@pytest.fixture
def inspect(producer, worker):
    return lambda: producer.control.inspect(destination=[NAME], timeout=20)


@pytest.fixture
def ask(producer, worker):
    """``ask("command", key=value)``: the worker's answer to a remote command."""

    def broadcast(command, **arguments):
        (answer,) = producer.control.broadcast(
            command, arguments=arguments, reply=True, timeout=20, limit=1, destination=[NAME]
        )
        return answer[NAME]

    return broadcast


@pytest.fixture
def hold(send, tmp_path):
    """Keep the only actor busy until the fixture's function is called again."""
    gates = []

    def start():
        gate = tmp_path / f"gate{len(gates)}"
        gates.append(gate)
        result = send("progress", str(gate))
        wait_for(lambda: result.state == "PROGRESS", "the actor to be busy")
        return result, gate

    yield start
    for gate in gates:
        gate.touch()


def test_revoked_while_it_waits_for_a_gpu_it_never_runs(worker, producer, send, hold, inspect, tmp_path):
    blocker, gate = hold()
    waiting = send("records", str(tmp_path / "log"), "ran")
    wait_for(lambda: waiting.id in inspect().query_task(waiting.id)[NAME], "the worker to have it")
    waiting.revoke()
    assert outcome(waiting) == ("REVOKED", "TaskRevokedError")
    gate.touch()
    assert blocker.get(**GET) == "done"
    assert send("add", 1, 1).get(**GET) == 2
    assert "ran" not in lines(tmp_path / "log")
    assert waiting.state == "REVOKED"


def test_terminated_while_it_waits_it_never_runs(worker, send, hold, inspect, tmp_path):
    blocker, gate = hold()
    waiting = [send("records", str(tmp_path / "log"), "ran") for _ in range(2)]
    wait_for(lambda: len(inspect().query_task([r.id for r in waiting])[NAME]) == 2, "the worker to have them")
    for result in waiting:
        result.revoke(terminate=True)
    assert [outcome(result) for result in waiting] == [("REVOKED", "TaskRevokedError")] * 2
    gate.touch()
    assert blocker.get(**GET) == "done"
    assert send("add", 1, 1).get(**GET) == 2
    assert lines(tmp_path / "log") == []


def test_terminated_while_it_runs_and_the_executor_stays_warm(worker, send, tmp_path):
    before = send("birth").get(**GET)
    for number, task in enumerate(["nap", "waits_for_lock", "spins"]):
        log = tmp_path / str(number)
        running = send(task, 100, str(log)) if task == "nap" else send(task, str(log))
        wait_for(lambda log=log: lines(log), f"{task} to run")
        neighbour = send("add", number, 1)
        running.revoke(terminate=True)
        assert outcome(running) == ("REVOKED", "TaskRevokedError"), task
        assert neighbour.get(**GET) == number + 1
        assert "end" not in lines(log)
    assert send("birth").get(**GET) == before, "same pid and same start time"


def test_a_list_of_ids_and_the_terminate_command(worker, producer, send, ask, tmp_path):
    first, second = (send("nap", 100, str(tmp_path / name)) for name in ("a", "b"))
    wait_for(lambda: lines(tmp_path / "a"), "the first to run")
    producer.control.revoke([first.id, second.id], terminate=True)
    assert [outcome(result)[0] for result in (first, second)] == ["REVOKED", "REVOKED"]
    third = send("nap", 100, str(tmp_path / "c"))
    wait_for(lambda: lines(tmp_path / "c"), "the third to run")
    assert "terminate: " in ask("terminate", signal="TERM", task_id=[third.id])["ok"]
    assert outcome(third)[0] == "REVOKED"
    assert not lines(tmp_path / "b"), "it was still waiting"


def test_sigusr1_is_a_soft_limit_that_the_body_may_catch(worker, send, tmp_path):
    log = tmp_path / "log"
    running = send("catches_soft_limit", str(log))
    wait_for(lambda: lines(log), "the body to run")
    running.revoke(terminate=True, signal="SIGUSR1")
    wait_for(lambda: lines(log)[-1] == "caught", "SoftTimeLimitExceeded in the body")
    assert send("pid").get(**GET) == int(lines(log)[0])


def test_sigkill_ends_the_executor_at_once_and_no_neighbour(worker, send, tmp_path):
    log = tmp_path / "log"
    running = send("catches_everything", str(log))
    wait_for(lambda: lines(log), "the body to run")
    neighbours = [send("add", n, 0) for n in range(5)]
    running.revoke(terminate=True, signal="SIGKILL")
    assert outcome(running)[0] == "REVOKED"
    assert [result.get(**GET) for result in neighbours] == list(range(5))
    assert send("pid").get(**GET) != int(lines(log)[0])
    assert lines(log) == lines(log)[:1], "it had no chance to notice"


def test_a_body_stuck_in_c_is_killed_after_the_grace_time(worker, send, tmp_path):
    log = tmp_path / "log"
    running = send("stuck_in_c", str(log))
    wait_for(lambda: lines(log), "the body to run")
    neighbours = [send("add", n, 0) for n in range(5)]
    running.revoke(terminate=True)
    assert [result.get(**GET) for result in neighbours] == list(range(5)), "they notice nothing but the pause"
    assert outcome(running)[0] == "REVOKED"
    assert send("pid").get(**GET) != int(lines(log)[0].split()[1])


def test_revoked_by_stamped_header(worker, producer, send, hold, inspect, tmp_path):
    def stamped(name, *args, **stamps):
        signature = producer.signature(f"shop.{name}", args)
        signature.stamp(**stamps)
        return signature.apply_async()

    blocker, gate = hold()
    waiting = stamped("records", str(tmp_path / "log"), "ran", house="seven")
    wait_for(lambda: waiting.id in inspect().query_task(waiting.id)[NAME], "the worker to have it")
    producer.control.revoke_by_stamped_headers({"house": ["seven"]}, destination=[NAME])
    assert outcome(waiting)[0] == "REVOKED"
    gate.touch()
    assert blocker.get(**GET) == "done"
    running = stamped("nap", 100, str(tmp_path / "nap"), house="eight")
    wait_for(lambda: lines(tmp_path / "nap"), "the body to run")
    producer.control.revoke_by_stamped_headers({"house": ["eight"]}, terminate=True, destination=[NAME])
    assert outcome(running)[0] == "REVOKED"
    assert not lines(tmp_path / "log") and "end" not in lines(tmp_path / "nap")


def test_inspect_tells_waiting_from_running_and_scheduled(worker, producer, send, hold, inspect):
    blocker, gate = hold()
    waiting = send("add", 1, 2, shadow="shop.pretty")
    later = send("add", 3, 4, countdown=3600)
    wait_for(lambda: set(inspect().query_task([waiting.id, later.id])[NAME]) == {waiting.id, later.id}, "both")
    (active,) = inspect().active()[NAME]
    stats = inspect().stats()[NAME]
    assert active["id"] == blocker.id and active["name"] == active["type"] == "shop.progress"
    assert active["args"] == [str(gate)] and active["time_start"] and not active["acknowledged"]
    assert active["worker_pid"] == stats["pool"]["gpu"]["driver"]
    reserved = {task["id"]: task for task in inspect().reserved()[NAME]}
    assert reserved[waiting.id]["name"] == "shop.pretty" and reserved[waiting.id]["type"] == "shop.add"
    assert [task["request"]["id"] for task in inspect().scheduled()[NAME]] == [later.id]
    states = {key: value[0] for key, value in inspect().query_task([blocker.id, waiting.id, later.id])[NAME].items()}
    assert states == {blocker.id: "active", waiting.id: "reserved", later.id: "scheduled"}
    gpu = stats["pool"]["gpu"]
    assert (gpu["in_flight"], gpu["running"], gpu["slots"]) == (2, 1, 48)
    producer.control.revoke(later.id)
    gate.touch()
    assert waiting.get(**GET) == 3


def test_inspect_knows_the_rest(worker, inspect):
    assert "shop.add" in inspect().registered()[NAME]
    assert inspect().ping()[NAME] == {"ok": "pong"}
    assert "celery:" in inspect().report()[NAME]["ok"]
    assert inspect().conf()[NAME]["task_acks_late"] is True
    assert [queue["name"] for queue in inspect().active_queues()[NAME]] == ["celery"]
    assert inspect().stats()[NAME]["total"]["shop.add"] >= 1


def test_inspect_gpu_from_the_command_line(worker, environment, hold, send):
    blocker, gate = hold()
    celery = [sys.executable, "-m", "celery", "-b", environment["CELERY_BROKER_URL"]]  # an app that knows no bridge
    command = [*celery, "inspect", "gpu", "-d", NAME, "--json"]
    wait_for(lambda: '"running": "shop.progress"' in _said(command, environment), "a beat that has seen the body", 30)
    said = _said([*celery, "gpu", "-d", NAME, "--json"], environment)
    for part in ('"state": "ready"', '"memory_total_bytes"', '"device"', '"executor_pid"', '"slots": 48'):
        assert part in said
    gate.touch()
    assert blocker.get(**GET) == "done"


def _said(command, environment):
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_gpu_restart_replaces_actors_and_loses_nothing(worker, producer, send, ask, gpu_stats, hold):
    before = gpu_stats()["actors"][0]
    blocker, gate = hold()
    waiting = [send("add", n, 0) for n in range(20)]
    assert "one at a time" in ask("gpu_restart")["ok"]
    wait_for(lambda: gpu_stats()["actors"][0]["state"] == "draining", "the actor to take no new calls")
    waiting += [send("add", n, 0) for n in range(20)]
    gate.touch()
    assert blocker.get(**GET) == "done", "what runs is finished"
    assert [result.get(**GET) for result in waiting] == list(range(20)) * 2
    after = wait_for(lambda: next((a for a in gpu_stats()["actors"] if a["state"] == "ready"), None), "the new actor")
    assert after["pid"] != before["pid"] and after["executor_pid"] != before["executor_pid"]


@pytest.fixture
def gpu_stats(inspect):
    return lambda: inspect().stats()[NAME]["pool"]["gpu"]


def test_time_limit_changes_for_tasks_that_start_later(worker, producer, send):
    producer.control.time_limit("shop.nap", hard=1, destination=[NAME], reply=True, timeout=20)
    assert outcome(send("nap", 100)) == ("FAILURE", "TimeLimitExceeded")
    producer.control.time_limit("shop.nap", hard=None, soft=1, destination=[NAME], reply=True, timeout=20)
    assert outcome(send("nap", 100)) == ("FAILURE", "SoftTimeLimitExceeded")
    producer.control.time_limit("shop.nap", destination=[NAME], reply=True, timeout=20)
    assert send("nap", 1.5).get(**GET) == 1.5


def test_pool_grow_and_shrink_are_about_children(worker, producer, send, inspect):
    def children():
        return len(inspect().stats()[NAME]["pool"]["processes"])

    def used():
        results = [send("unmarked", [1, n]) for n in range(6)]
        pids.update(result.get(**GET)[0] for result in results)
        return len(pids) == 3

    producer.control.pool_grow(2, destination=[NAME], reply=True, timeout=20)
    wait_for(lambda: children() == 3, "two more children")
    pids = set()
    wait_for(used, "each to run something: one that still starts would not hear that it is to end")
    assert inspect().stats()[NAME]["pool"]["gpu"]["slots"] == 48
    assert [result.get(**GET) for result in [send("add", 1, n) for n in range(9)]] == [1 + n for n in range(9)]
    producer.control.pool_shrink(2, destination=[NAME], reply=True, timeout=20)
    wait_for(lambda: children() == 1, "two children to end")
    assert send("double", 4).get(**GET) == 8


def test_queues_come_and_go(worker, producer, send, redis_server):
    producer.control.add_consumer("extra", destination=[NAME], reply=True, timeout=20)
    assert send("add", 1, 1, queue="extra").get(**GET) == 2
    producer.control.cancel_consumer("extra", destination=[NAME], reply=True, timeout=20)
    waits = send("add", 2, 2, queue="extra")
    assert send("add", 3, 3).get(**GET) == 6
    assert waits.state == "PENDING" and redis_server.client.llen("extra") == 1
    redis_server.client.delete("extra")


def test_rate_limit(worker, producer, send, redis_server, tmp_path):
    assert producer.control.rate_limit("shop.records", "1/h", destination=[NAME], reply=True, timeout=20)
    results = [send("records", str(tmp_path / "log"), str(n)) for n in range(3)]
    assert results[0].get(**GET) == "0"

    def held():
        texts = b"".join(redis_server.client.hvals("unacked"))
        return all(result.id.encode() in texts for result in results[1:])

    wait_for(held, "the others to be in the worker")
    assert send("add", 1, 1).get(**GET) == 2, "other tasks pass"
    assert lines(tmp_path / "log") == ["0"]
    producer.control.revoke([result.id for result in results[1:]])
    producer.control.rate_limit("shop.records", "0", destination=[NAME], reply=True, timeout=20)
    assert send("records", str(tmp_path / "log"), "free").get(**GET) == "free"
    assert lines(tmp_path / "log") == ["0", "free"]


def test_shutdown_autoscale_and_pool_restart(environment, producer, send, tmp_path):
    name = f"second@{socket.gethostname()}"
    options = ("-n", "second@%h", "-Q", "second", "--autoscale=2,1")
    process = Worker(tmp_path, *options, app="tests.apps.restartable:app", env=environment)
    try:
        inspect = producer.control.inspect(destination=[name], timeout=20)
        wait_for(producer.control.inspect(destination=[name], timeout=1).ping, "the worker to hear broadcasts")
        producer.control.autoscale(5, 3, destination=[name], reply=True, timeout=20)
        assert inspect.stats()[name]["autoscaler"] == {"max": 5, "min": 3, "current": 3, "qty": 0}
        before = inspect.stats()[name]["pool"]["gpu"]["driver"]
        gate = tmp_path / "gate"
        running = send("progress", str(gate), queue="second")
        wait_for(lambda: running.state == "PROGRESS", "the body to run")
        waiting = [send("add", n, 0, queue="second") for n in range(10)]
        wait_for(lambda: inspect.stats()[name]["pool"]["gpu"]["in_flight"] == 11, "the worker to have them")
        producer.control.pool_restart(destination=[name], reply=True, timeout=20)
        meanwhile = send("add", 1, 2, queue="second")
        assert send("double", 2, queue="second").get(**GET) == 4
        gate.touch()
        assert running.get(**GET) == "done", "what runs is finished"
        assert [result.get(**GET) for result in waiting] == list(range(10))
        assert meanwhile.get(**GET) == 3
        assert inspect.stats()[name]["pool"]["gpu"]["driver"] != before
        producer.control.shutdown(destination=[name])
        assert process.ends() == 0
    finally:
        process.kill_group()
