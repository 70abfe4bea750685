"""Time limits of task, call and worker, counted from the body's start; and ten thousand tasks with random cancels."""

import random
import socket
from pathlib import Path

import pytest

from tests.support.services import Worker, wait_for

GET = {"timeout": 90}
NAME = f"limits@{socket.gethostname()}"


def lines(path):
    return Path(path).read_text().split("\n")[:-1] if Path(path).exists() else []


def ended(result):
    value = result.get(propagate=False, **GET)
    return value if result.state == "SUCCESS" else type(value).__name__


@pytest.fixture(scope="module")
def worker(environment, redis_server, tmp_path_factory):
    redis_server.client.flushall()
    options = ("-c", "1", "-n", "limits@%h", "--soft-time-limit=2", "--time-limit=6")
    process = Worker(tmp_path_factory.mktemp("limits"), *options, env={**environment, "BRIDGE_GRACE_S": "2"})
    yield process
    assert process.popen.poll() is None, process.output[-5000:]
    assert process.stop() == 0, process.output[-5000:]


def test_a_soft_limit_raises_in_the_body_which_may_catch_it(worker, send, tmp_path):
    before = send("birth").get(**GET)
    caught = send("soft_limited", str(tmp_path / "log"))
    assert caught.get(**GET) == before[0]
    assert ended(send("nap", 100, soft_time_limit=0.3)) == "SoftTimeLimitExceeded", "per call"
    assert ended(send("nap", 100)) == "SoftTimeLimitExceeded", "of the worker"
    assert send("birth").get(**GET) == before, "the same warm process"
    worker.says(f"Soft time limit (0.3s) exceeded for shop.soft_limited[{caught.id}]")


def test_a_hard_limit_ends_the_task_and_frees_the_gpu(worker, send, tmp_path):
    before = send("pid").get(**GET)
    hard = [send("hard_limited"), send("nap", 100, time_limit=0.5, soft_time_limit=50)]
    neighbours = [send("add", n, 0) for n in range(5)]
    assert [ended(result) for result in hard] == ["TimeLimitExceeded"] * 2
    assert [ended(result) for result in neighbours] == list(range(5))
    assert send("pid").get(**GET) != before, "what would not stop ended with its process"
    worker.says(f"Hard time limit (0.5s) exceeded for shop.hard_limited[{hard[0].id}]")


def test_a_body_that_swallows_its_soft_limit_meets_the_hard_one(worker, send, tmp_path):
    log = tmp_path / "log"
    assert ended(send("catches_everything", str(log), soft_time_limit=0.3, time_limit=1.5)) == "TimeLimitExceeded"
    assert "caught SoftTimeLimitExceeded()" in lines(log)


def test_limits_count_from_the_bodys_start_not_while_it_waits(worker, send, tmp_path):
    gate = tmp_path / "gate"
    blocker = send("progress", str(gate), soft_time_limit=50, time_limit=60)
    wait_for(lambda: blocker.state == "PROGRESS", "the actor to be busy")
    waits = [send("nap", 0.1, soft_time_limit=1, time_limit=1.5) for _ in range(3)]
    longer = send("nap", 2.5, soft_time_limit=50)  # longer than any of them may run
    gate.touch()
    assert blocker.get(**GET) == "done"
    after = [send("nap", 0.1, soft_time_limit=1, time_limit=1.5) for _ in range(3)]  # wait behind the long one
    assert [ended(result) for result in [*waits, longer, *after]] == [0.1] * 3 + [2.5] + [0.1] * 3


def test_a_timed_out_task_goes_back_if_it_is_not_to_be_acknowledged(worker, producer, send, tmp_path):
    log = str(tmp_path / "log")
    result = send("slow_once", log)
    assert ended(result) == "TimeLimitExceeded", "Celery says so first, and then gives it back"
    wait_for(lambda: producer.AsyncResult(result.id).state == "SUCCESS", "its second run")
    assert lines(log) == ["run", "run"]


def test_ten_thousand_short_tasks_and_random_cancels(worker, producer, send, tmp_path):
    """No cancel hits another task, no lock stays held, the executor stays the same."""
    numbers = random.Random(7)
    before = send("birth").get(**GET)
    sent, cancelled = [], set()
    for start in range(0, 10_000, 250):
        batch = [send("mixed", start + n, str(tmp_path / "log")) for n in range(250)]
        chosen = numbers.sample(batch, 12)
        for result in chosen:
            cancelled.add(result.id)
        producer.control.revoke([result.id for result in chosen], terminate=True)
        sent += batch
    for number, result in enumerate(sent):
        value = result.get(propagate=False, **GET)
        if result.state != "SUCCESS":
            assert (result.state, result.id in cancelled) == ("REVOKED", True), f"{number}: {value!r}"
        else:
            assert value == number
    assert send("birth").get(**GET) == before
    counted = lines(tmp_path / "log")
    assert len(counted) == len(set(counted)), "no body ran to its end twice"
