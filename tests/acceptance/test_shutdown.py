"""SIGTERM drains, Ctrl-C twice stops, actors stay warm for the next worker; the same from plain `celery worker`."""

import os
import signal
import sys
from pathlib import Path

import pytest
from celery import Celery

from tests.support.promise import forget_results
from tests.support.services import RedisServer, Worker, wait_for

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
    worker.says("Task shop.double[")
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


def test_a_warm_shutdown_gives_back_what_waits_for_a_gpu(start, send, producer, redis_server, tmp_path):
    """Celery finishes what runs; a GPU backlog must not hold the worker for slots times run time."""
    worker = start()
    running = send("nap", 2, kwargs={"path": str(tmp_path / "gpu")})
    wait_for(lambda: lines(tmp_path / "gpu"), "the body to start")
    waiting = [send("nap", 2, kwargs={"path": str(tmp_path / "others")}) for _ in range(8)]
    later = send("nap", 0, kwargs={"path": str(tmp_path / "later")}, countdown=1)  # due while the worker drains
    wait_for(lambda: worker.output.count("Task shop.nap[") == 10, "the worker to have them")
    assert worker.stop() == 0
    assert running.get(**GET) == 2
    assert not lines(tmp_path / "others") and not lines(tmp_path / "later")
    assert redis_server.client.llen("celery") == 9 and not redis_server.client.hlen("unacked"), "all are given back"
    again = start(log="again.log")
    assert later.get(**GET) == 0
    for result in waiting:
        result.revoke(terminate=True)
    assert again.stop() == 0


def soft(timeout_s, **more):
    """An environment with Celery's soft shutdown, through the app's own settings."""
    return {"SHOP_SOFT_SHUTDOWN_S": str(timeout_s), **more}


def test_soft_shutdown_lets_short_tasks_finish_and_gives_long_ones_back(start, send, tmp_path):
    worker = start(env=soft(3))
    short = send("nap", 1, kwargs={"path": str(tmp_path / "short")})
    long_one = send("nap", 100, kwargs={"path": str(tmp_path / "long")})
    wait_for(lambda: lines(tmp_path / "short"), "the first body to start")
    worker.says(f"Task shop.nap[{long_one.id}] received")
    worker.signal(signal.SIGQUIT)
    worker.says("Initiating Soft Shutdown, terminating in 3")
    worker.ends()
    assert short.get(**GET) == 1
    assert lines(tmp_path / "short")[-1] == "end" and len(lines(tmp_path / "short")) == 2, "acknowledged, not run again"
    assert len(lines(tmp_path / "long")) == 1
    again = start(log="again.log")
    wait_for(lambda: len(lines(tmp_path / "long")) == 2, "the long one to run again")
    long_one.revoke(terminate=True)
    send("add", 1, 1).get(**GET)
    assert len(lines(tmp_path / "short")) == 2
    assert again.stop() == 0


@pytest.mark.parametrize(("number", "env"), [(signal.SIGQUIT, {}), (signal.SIGTERM, {"REMAP_SIGTERM": "SIGQUIT"})])
def test_cold_shutdown_ends_what_runs_at_once_and_gives_it_back(start, send, redis_server, tmp_path, number, env):
    worker = start(env=env)
    before = send("birth").get(**GET)
    running = send("nap", 100, kwargs={"path": str(tmp_path / "gpu")})
    waiting = send("records", str(tmp_path / "others"), "ran")
    wait_for(lambda: lines(tmp_path / "gpu"), "the body to start")
    worker.says(f"Task shop.records[{waiting.id}] received")
    worker.signal(number)
    worker.says("Cold shutdown")
    worker.ends(30)
    assert lines(tmp_path / "gpu") == [f"start {before[0]}"] and not lines(tmp_path / "others")
    again = start(log="again.log")
    assert waiting.get(**GET) == "ran"
    wait_for(lambda: len(lines(tmp_path / "gpu")) == 2, "the cancelled one to run again")
    running.revoke(terminate=True)
    assert send("birth").get(**GET) == before, "the executor has stayed warm over all of it"
    assert again.stop() == 0


def test_hard_shutdown_ends_the_worker_even_if_nothing_else_does(start, send, tmp_path):
    worker = start(env=soft(60, BRIDGE_GRACE_S="60"))
    send("stuck_in_c", str(tmp_path / "gpu"))
    wait_for(lambda: lines(tmp_path / "gpu"), "the body to start")
    worker.signal(signal.SIGQUIT)
    worker.says("Initiating Soft Shutdown")
    worker.signal(signal.SIGQUIT)
    worker.says("Waiting gracefully for cold shutdown to complete")
    worker.signal(signal.SIGQUIT)
    worker.ends(30)
    executor = int(lines(tmp_path / "gpu")[0].split()[1])
    os.kill(executor, signal.SIGKILL)  # with its long grace time it would hold the actor for the tests that follow


def test_the_broker_goes_and_comes_back(start, redis_server, tmp_path):
    """What runs goes on, its result is stored once; what waited comes again, and once only."""
    server = RedisServer(tmp_path)
    port = server.port
    url = {"CELERY_BROKER_URL": server.url}  # the result backend stays where it is
    client = Celery(broker=server.url, backend=redis_server.url, set_as_current=False)
    try:
        worker = start(env=url)
        running = client.send_task("shop.nap", [4, str(tmp_path / "gpu")])
        wait_for(lambda: lines(tmp_path / "gpu"), "the body to start")
        waiting = [client.send_task("shop.records", [str(tmp_path / "others"), str(n)]) for n in range(5)]
        wait_for(lambda: worker.output.count("Task shop.records[") == 5, "the worker to have them")
        server.client.close()
        server.kill_group()
        worker.says("Connection to broker lost")
        server = RedisServer(tmp_path, port=port)  # it has saved nothing: what is sent again is sent by us
        wait_for(lambda: worker.output.count("Connected to redis") >= 2, "the worker to be back")
        again = client.send_task("shop.add", [1, 2])
        assert again.get(**GET) == 3
        assert running.get(**GET) == 4
        assert lines(tmp_path / "gpu")[-1] == "end" and len(lines(tmp_path / "gpu")) == 2
        assert not lines(tmp_path / "others"), "dropped with their connection: only the broker may send them again"
        assert all(result.state == "PENDING" for result in waiting)
        assert worker.stop() == 0
    finally:
        forget_results(client)
        client.close()
        server.client.close()
        server.kill_group()


def test_sigkill_of_the_worker_loses_nothing(start, send, redis_server, tmp_path):
    worker = start()
    log = tmp_path / "gpu"
    send("nap", 3, kwargs={"path": str(log)})
    wait_for(lambda: lines(log), "the body to start")
    waiting = [send("records", str(tmp_path / "others"), str(n)) for n in range(5)]
    wait_for(lambda: redis_server.client.hlen("unacked") == 6, "all messages to be in the worker")
    os.kill(worker.pid, signal.SIGSTOP)  # as good as dead, and Redis does not know
    waiting.append(send("records", str(tmp_path / "others"), "5"))
    assert redis_server.client.llen("celery") == 1, "a message was handed to a process that may be dead"
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
    assert [result.get(**GET) for result in waiting] == [str(n) for n in range(6)]
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
    client = Celery(broker=environment["CELERY_BROKER_URL"], backend=environment["CELERY_RESULT_BACKEND"])
    gpu = client.send_task("old.gpu", queue="old").get(**GET)
    cpu = client.send_task("old.cpu", queue="old").get(**GET)
    client.close()
    assert gpu != cpu
    assert f"executor pid {gpu}" in worker.output
    assert worker.stop() == 0
