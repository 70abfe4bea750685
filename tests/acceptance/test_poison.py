"""Poisoned tasks: counted over workers, kept as dead letters, replayed. Real kills, real Redis, the real commands."""

import json
import os
import subprocess
import sys
import uuid
from collections import Counter

import pytest

from tests.support.services import ROOT, RedisServer, Worker, wait_for

GET = {"timeout": 90}
APP = "tests.apps.shop:app"


def lines(path):
    return path.read_text().split("\n")[:-1] if path.exists() else []


@pytest.fixture(scope="module")
def poison(environment, redis_server):
    """``poison(folder, queue)`` starts a worker on a queue of its own."""
    redis_server.client.flushall()
    started = []

    def start(folder, queue, **env):
        worker = Worker(
            folder, "-c", "1", "-n", f"{queue}@%h", "-Q", queue, env={**environment, **env}, log=f"{len(started)}.log"
        )
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.kill_group()


@pytest.fixture(scope="module")
def dead(environment):
    """``dead("list")`` runs `python -m bridge.dead`: exit code, what it printed, what it complained of."""

    def run(*words, app=APP, **env):
        command = [sys.executable, "-m", "bridge.dead", *(["-A", app] if app else []), *words]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment, **env}, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    return run


def redeliver(producer, redis_server):
    """What kombu does with messages of a worker that is gone, without waiting for the visibility time-out."""
    with producer.connection_for_write() as connection:
        channel = connection.default_channel
        for tag in redis_server.client.hkeys("unacked"):
            channel.qos.restore_by_tag(tag.decode())


def poisoned(result):
    error = result.get(propagate=False, **GET)
    assert type(error).__name__ == "TaskPoisoned", repr(error)
    return error


def test_one_crash_for_each_worker_then_replayed_when_the_fault_is_gone(poison, dead, producer, redis_server, tmp_path):
    log, gate, cure, others = (tmp_path / name for name in ("log", "gate", "cure", "others"))

    def neighbours(first):
        names = [str(n) for n in range(first, first + 5)]
        return [producer.send_task("shop.records", [str(others), name], queue="poison") for name in names]

    first = poison(tmp_path, "poison")
    around = neighbours(0)
    sent = producer.send_task("shop.dies_when_told", [str(log), str(gate), str(cure)], queue="poison", priority=3)
    wait_for(lambda: len(lines(log)) == 1, "the first run")
    gate.touch()
    first.says("crash 1 of 2")
    wait_for(lambda: len(lines(log)) == 2, "the second run")
    first.kill_group()
    redeliver(producer, redis_server)

    second = poison(tmp_path, "poison")
    around += neighbours(5)
    wait_for(lambda: len(lines(log)) == 3, "the run at the second worker")
    gate.touch()
    error = poisoned(sent)
    assert list(error.args) == ["shop.dies_when_told", 2, "signal 9 (SIGKILL)"]
    second.says("crash 2 of 2")
    assert [result.get(**GET) for result in around] == [str(n) for n in range(10)]
    ran = Counter(lines(others))
    assert set(ran) == {str(n) for n in range(10)}
    assert len(lines(log)) == 3

    code, out, _ = dead("list")
    assert code == 0 and sent.id in out and "shop.dies_when_told" in out and "poison" in out
    assert str(log) not in out, "no payload in a list"
    (letter,) = json.loads(dead("list", "--json")[1])
    assert (letter["id"], letter["crashes"], letter["queue"]) == (sent.id, 2, "poison")
    code, out, _ = dead("show", sent.id[:8])
    assert code == 0 and out.count("signal 9 (SIGKILL)") >= 2 and "poison@" in out and str(log) not in out
    code, out, _ = dead("show", "--payload", sent.id)
    assert code == 0 and str(log) in out

    cure.touch()
    before = second.output.count(sent.id)
    code, out, err = dead("replay", sent.id)
    assert (code, err) == (0, "") and "sent to poison" in out
    again = wait_for(lambda: [r] if (r := producer.AsyncResult(sent.id)).state == "SUCCESS" else [], "its success")
    assert again[0].result == "survived" and second.output.count(sent.id) > before and len(lines(log)) == 4
    assert json.loads(dead("list", "--json")[1]) == []
    assert [key for key in redis_server.client.keys("*") if b"crashes" in key or b"dead-letter" in key] == []
    assert second.stop() == 0


def test_a_task_known_as_poisoned_does_not_run_again_when_it_is_redelivered(
    poison, dead, producer, redis_server, tmp_path
):
    worker = poison(tmp_path, "known")
    log, client = tmp_path / "log", redis_server.client
    sent = producer.send_task("shop.segfaults", [str(log)], queue="known")
    poisoned(sent)
    assert len(lines(log)) == 2
    again = deliver_again(producer, client, "shop.segfaults", [str(log)], sent.id, "known")
    wait_for(lambda: worker.output.count("raised unexpected: TaskPoisoned") == 2, "the second end")
    other = deliver_again(producer, client, "shop.add", [1, 2], str(uuid.uuid4()), "known")
    assert other.get(**GET) == 3, "a redelivered task without a crash runs"
    assert again.id == sent.id and len(lines(log)) == 2
    code, out, _ = dead("drop", "--all")
    assert (code, out) == (0, f"{sent.id}: dropped\n")
    deliver_again(producer, client, "shop.segfaults", [str(log)], sent.id, "known")
    wait_for(lambda: len(lines(log)) == 4, "both runs of a task that begins at no crash")
    wait_for(lambda: worker.output.count("raised unexpected: TaskPoisoned") == 3, "the third end")
    assert dead("drop", sent.id)[0] == 0
    assert worker.stop() == 0


def deliver_again(producer, client, task, args, task_id, queue):
    """Send a message marked as one that the broker delivers once more."""
    result = producer.send_task(task, args, queue="nobody", task_id=task_id)
    message = json.loads(client.lpop("nobody"))
    message["properties"]["delivery_info"] |= {"redelivered": True, "routing_key": queue}
    client.lpush(queue, json.dumps(message))
    return result


def test_crashes_count_in_the_driver_and_letters_wait_there_while_redis_is_away(poison, dead, producer, tmp_path):
    backend = RedisServer(tmp_path)
    worker = poison(tmp_path, "away", CELERY_RESULT_BACKEND=backend.url)
    log, others = tmp_path / "log", tmp_path / "others"
    backend.kill_group()
    sent = producer.send_task("shop.segfaults", [str(log)], queue="away", ignore_result=True)
    producer.send_task("shop.records", [str(others), "ran"], queue="away", ignore_result=True)
    worker.says("TaskPoisoned")
    wait_for(lambda: lines(others) == ["ran"], "the neighbour")
    assert "crash 2 of 2" in worker.output and len(lines(log)) == 2
    assert "Redis did not take the dead letter of" in worker.output
    assert "secret" not in worker.output
    backend = RedisServer(tmp_path, port=backend.port)
    worker.says(f"Redis has taken the dead letter of {sent.id} now")
    assert sent.id in dead("list", CELERY_RESULT_BACKEND=backend.url)[1]
    backend.client.close()
    backend.kill_group()
    assert worker.stop() == 0


def test_autoretry_does_not_take_a_poisoned_task(poison, dead, producer, tmp_path):
    worker = poison(tmp_path, "auto")
    log = tmp_path / "log"
    sent = producer.send_task("shop.autoretries_a_crash", [str(log)], queue="auto")
    poisoned(sent)
    assert len(lines(log)) == 2
    assert dead("drop", sent.id)[0] == 0
    assert worker.stop() == 0


@pytest.mark.parametrize(
    ("words", "env", "code", "text"),
    [
        (["show", "4f1c"], {}, 3, "no dead letter of 4f1c"),
        (["list"], {"CELERY_RESULT_BACKEND": "redis://127.0.0.1:1/0"}, 66, "Redis does not answer"),
        (
            ["list"],
            {"CELERY_BROKER_URL": "memory://", "CELERY_RESULT_BACKEND": "cache+memory://"},
            64,
            "has Redis neither",
        ),
        (["list"], {"BRIDGE_DEAD_LETTERS": "-1"}, 64, "BRIDGE_DEAD_LETTERS"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(dead, words, env, code, text):
    got, out, err = dead(*words, **env)
    assert (got, out) == (code, "") and text in err and err.startswith("bridge.dead: ") and err.count("\n") == 1


def test_an_app_is_needed_and_help_explains(dead):
    code, _, err = dead("list", app="")
    assert code == 65 and "-A" in err
    code, out, _ = dead("--help")
    assert code == 0 and "TaskPoisoned" in out and "exit codes" in out
