"""SIGTERM drains, Ctrl-C twice stops, actors stay warm for the next worker; the same from plain `celery worker`."""

import signal
import sys
from pathlib import Path

import pytest

from tests.support.services import Worker, wait_for

GET = {"timeout": 90}


def lines(path):
    return path.read_text().split("\n")[:-1] if path.exists() else []


@pytest.fixture
def start(environment, redis_server, tmp_path):
    redis_server.client.flushall()  # what the test before has left in the broker would run first
    started = []

    def start_worker(*options, env=None, **kwargs):
        process = Worker(tmp_path, "-c", "1", *options, env={**environment, **(env or {})}, **kwargs)
        started.append(process)
        return process

    yield start_worker
    for process in started:
        process.kill_group()


def test_sigterm_drains_both_kinds_and_exits_0(start, send, tmp_path):
    worker = start()
    gpu = send("nap", 2, kwargs={"path": str(tmp_path / "gpu")})
    more = [send("add", n, 0) for n in range(3)]
    cpu = send("double", 21)
    wait_for(lambda: lines(tmp_path / "gpu"), "the body to start")
    assert worker.stop() == 0
    assert lines(tmp_path / "gpu")[-1] == "end"
    assert gpu.state == "SUCCESS", "finished and stored before the worker ended"
    assert cpu.get(**GET) == 42
    again = start(log="again.log")  # what the first had not taken is there for the next
    assert [result.get(**GET) for result in more] == [0, 1, 2]
    assert again.stop() == 0


def test_the_next_worker_finds_the_warm_actor(start, send):
    worker = start()
    before = send("pid").get(**GET)
    assert worker.stop() == 0
    again = start(log="again.log")
    assert send("pid").get(**GET) == before
    assert again.stop() == 0


@pytest.mark.parametrize("task", ["nap", "stuck_in_c"])
def test_ctrl_c_twice_stops_without_waiting_for_the_body(start, send, tmp_path, task):
    worker = start(env={"BRIDGE_GRACE_S": "1"})
    log = tmp_path / "gpu"
    send("nap", 50, kwargs={"path": str(log)}) if task == "nap" else send("stuck_in_c", str(log))
    wait_for(lambda: lines(log), "the body to start")
    worker.signal(signal.SIGINT)
    worker.says("Warm shutdown")
    worker.signal(signal.SIGINT)
    worker.ends(30)
    assert "end" not in lines(log)
    executor = int(lines(log)[0].split()[1])
    if task == "stuck_in_c":
        wait_for(lambda: not Path(f"/proc/{executor}").exists(), "the stuck executor to be ended")


def test_sigkill_of_the_worker_loses_nothing(start, send, redis_server, tmp_path):
    worker = start()
    log = tmp_path / "gpu"
    send("nap", 3, kwargs={"path": str(log)})
    wait_for(lambda: lines(log), "the body to start")
    waiting = [send("records", str(tmp_path / "others"), str(n)) for n in range(5)]
    wait_for(lambda: redis_server.client.hlen("unacked") == 6, "all messages to be in the worker")
    worker.kill_group()
    unacked = redis_server.client.hgetall("unacked")
    assert len(unacked) == 6, "unacknowledged messages stay in the broker"
    assert "end" not in lines(log), "the body had not ended when its worker died"
    # give them back at once, as the visibility time-out would after an hour
    from kombu import Connection

    with Connection(redis_server.url) as connection:
        connection.default_channel.qos.restore_unacked_once = lambda *_, **__: None
        for tag in unacked:
            connection.default_channel.qos.restore_by_tag(tag.decode())
    start(log="again.log")
    assert [result.get(**GET) for result in waiting] == [str(n) for n in range(5)]
    wait_for(lambda: "end" in lines(log), "the interrupted task to run again")


def test_plain_celery_worker_with_the_pool_setting(start, send, environment, tmp_path):
    (tmp_path / "oldapp.py").write_text(
        "from celery import Celery\n"
        "import os\n"
        "app = Celery('oldapp')\n"
        "app.conf.worker_pool = 'bridge.pool:HybridPool'\n"
        "@app.task(name='old.gpu')\n"
        "def gpu(): return os.getpid()\n"
        "@app.task(name='old.cpu')\n"
        "def cpu(): return os.getpid()\n"
    )
    env = {"BRIDGE_GPU_TASKS": '["old.g*"]', "PYTHONPATH": str(tmp_path)}
    worker = start("-Q", "old", app="oldapp", env=env, command=[sys.executable, "-m", "celery"])
    worker.says("[gpu tasks]")
    assert "old.gpu (BRIDGE_GPU_TASKS)" in worker.output
    from celery import Celery

    client = Celery(broker=environment["CELERY_BROKER_URL"], backend=environment["CELERY_RESULT_BACKEND"])
    gpu = client.send_task("old.gpu", queue="old").get(**GET)
    cpu = client.send_task("old.cpu", queue="old").get(**GET)
    client.close()
    assert gpu != cpu
    assert f"executor pid {gpu}" in worker.output
    assert worker.stop() == 0
