"""Redis' visibility time-out, short: nothing runs twice while its worker lives, and comes back soon when it is dead.

The clocks of the workers' hosts are days apart and jump meanwhile.
"""

import json
import os
import signal
import time

import pytest

from tests.support.services import ROOT, Worker, wait_for

GET = {"timeout": 60}
TIMEOUT_S = 3
DAY_S = 86400
QUEUE = "visible"
MESSAGES = {
    "task_default_queue": QUEUE,
    "broker_transport_options": {"visibility_timeout": TIMEOUT_S},
}


@pytest.fixture
def set_clock(tmp_path):
    """``set_clock("a", 60)``: from now on the wall clock of worker `a` is a minute ahead; the file that says so."""

    def write(name, off_s):
        file = tmp_path / f"{name}.clock"
        (tmp_path / "new").write_text(str(off_s))
        return (tmp_path / "new").replace(file)

    return write


@pytest.fixture
def start(environment, redis_server, tmp_path, set_clock):
    """``start("a")`` starts a worker with one slot and one child."""
    redis_server.client.flushall()
    env = {**environment, "CELERY_MESSAGES": json.dumps(MESSAGES), "BRIDGE_GPU_SLOTS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests/support/jumping"), *filter(None, [os.getenv("PYTHONPATH")])])
    started = []

    def start_worker(name, off_s=0):
        options = ("-c", "1", "-n", f"{name}@%h", "--without-mingle", "--without-gossip")
        own = {**env, "TESTS_CLOCK": str(set_clock(name, off_s))}
        started.append(Worker(tmp_path, *options, app="tests.apps.messages:app", env=own, log=f"{name}.log"))
        assert time.strftime("[%Y-%m-%d", time.localtime(time.time() + off_s)) in started[-1].output
        return started[-1]

    yield start_worker
    for worker in started:
        worker.kill_group()


@pytest.fixture
def send(producer):
    return lambda name, *args, **options: producer.send_task(f"messages.{name}", args, queue=QUEUE, **options)


@pytest.fixture
def scores(redis_server):
    """``scores()``: when each unacknowledged message was noted last."""
    return lambda: dict(redis_server.client.zrange("unacked_index", 0, -1, withscores=True))


def lines(path):
    return path.read_text().split("\n")[:-1] if path.exists() else []


def fill(send, scores, tmp_path):
    """What one worker can hold: running and waiting, of both kinds, and one with a countdown."""
    gate, held, waits = (str(tmp_path / name) for name in ("gate", "held", "waits"))
    results = [send(f"{kind}.holds", gate, held, kind) for kind in ("gpu", "cpu")]
    wait_for(lambda: len(lines(tmp_path / "held")) == 2, "both to run")
    results += [send(f"{kind}.notes", waits, kind) for kind in ("gpu", "cpu")]
    results.append(send("cpu.notes", waits, "later", countdown=2 * TIMEOUT_S))
    wait_for(lambda: len(scores()) == 5, "the worker to hold all")
    return results


def test_a_living_worker_keeps_what_it_holds_whatever_the_clocks_say(start, send, scores, set_clock, tmp_path):
    start("first")
    results = fill(send, scores, tmp_path)
    noted = scores()
    other = start("other", DAY_S)
    for off_s in (0, -DAY_S, DAY_S):
        set_clock("first", off_s)
        last = max(scores().values())
        wait_for(lambda: scores() and min(scores().values()) > last + TIMEOUT_S, "all to be noted anew for long")  # noqa: B023
        assert "received" not in other.output
    assert scores().keys() <= noted.keys()
    (tmp_path / "gate").touch()
    assert [result.get(**GET) for result in results] == ["gpu", "cpu", "gpu", "cpu", "later"]
    wait_for(lambda: not scores(), "the acknowledgements")
    assert sorted(lines(tmp_path / "held")) == ["cpu ends", "cpu starts", "gpu ends", "gpu starts"], "each ran once"
    assert sorted(lines(tmp_path / "waits")) == ["cpu", "gpu", "later"]
    assert "received" not in other.output


def test_a_dead_workers_messages_come_back_soon_whatever_the_clocks_say(start, send, scores, set_clock, tmp_path):
    first, other = start("first", DAY_S), start("other")
    set_clock("other", -DAY_S)
    results = [send("cpu.holds", str(tmp_path / "gate"), str(tmp_path / "held"), "it") for _ in range(2)]
    wait_for(lambda: len(lines(tmp_path / "held")) == 2, "both workers to run one")
    first.kill_group()
    killed = time.monotonic()
    (tmp_path / "gate").touch()
    assert [result.get(**GET) for result in results] == ["it", "it"]
    print(f"redelivered and done after {time.monotonic() - killed:.1f} s")
    wait_for(lambda: not scores(), "the acknowledgements")
    assert lines(tmp_path / "held").count("it starts") == 3, "what the dead one ran has run again"
    assert other.stop() == 0


def test_a_worker_that_slept_drops_what_others_have(start, send, scores, redis_server, tmp_path):
    first = start("first")
    results = fill(send, scores, tmp_path)
    os.kill(first.pid, signal.SIGSTOP)
    start("other")
    try:
        wait_for(lambda: redis_server.client.llen(QUEUE) == 0 and len(scores()) == 5 and
                 min(scores().values()) > time.time() - TIMEOUT_S, "the other one to hold all")  # fmt: skip
        wait_for(lambda: lines(tmp_path / "held").count("cpu starts") == 2, "the other one to run the CPU task")
        (tmp_path / "gate").touch()
        assert [result.get(**GET) for result in results] == ["gpu", "cpu", "gpu", "cpu", "later"]
        wait_for(lambda: not scores(), "the acknowledgements")
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.says("it is dropped here")
    assert first.output.count("is another worker's by now") == 5, first.output[-5000:]
    again = [send("cpu.notes", str(tmp_path / "again"), str(number)) for number in range(12)]
    assert [result.get(**GET) for result in again] == [str(number) for number in range(12)]
    assert sorted(lines(tmp_path / "waits")) == ["cpu", "gpu", "later"], "what had not started ran once"
    assert lines(tmp_path / "held").count("gpu starts") == 2, "what ran went on"
    assert first.stop() == 0
    wait_for(lambda: not scores() and not redis_server.client.llen(QUEUE), "nothing to be left")
