"""Options of `celery worker`, as a user of Celery knows them."""

import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from tests.support.services import ROOT, Worker, inspected, wait_for

GET = {"timeout": 60}


@pytest.fixture
def start(environment, tmp_path):
    started = []

    def start_worker(*options, env=None, **kwargs):
        process = Worker(tmp_path, *options, env={**environment, **(env or {})}, **kwargs)
        started.append(process)
        return process

    yield start_worker
    for process in started:
        process.kill_group()


def test_name_events_beat_autoscale_recycling_pidfile(start, send, producer, tmp_path):
    name = f"many@{socket.gethostname()}"
    worker = start(
        "-n", "many@%h", "-E", "-B", "-s", str(tmp_path / "beat"), "--autoscale=3,1", "--max-tasks-per-child=2",
        f"--pidfile={tmp_path / 'pid'}", "-Q", "celery,other", "--time-limit=50", "--prefetch-multiplier=2",
    )  # fmt: skip
    assert int((tmp_path / "pid").read_text()) == worker.pid
    assert "task events: ON" in worker.output and "other" in worker.output
    worker.says("beat: Starting")
    pids = {send("where").get(**GET) for _ in range(6)}
    assert len(pids) >= 3, "a child is replaced after two tasks"
    assert send("pid", queue="other").get(**GET) not in pids
    before = inspected(producer, name, "stats")["autoscaler"]
    naps = [send("nap", 0.2) for _ in range(10)]
    [result.get(**GET) for result in naps]
    after = inspected(producer, name, "stats")["autoscaler"]
    assert after["current"] == before["current"] < 3, "GPU tasks must not start children"
    assert worker.stop() == 0
    assert not (tmp_path / "pid").exists()


def test_worker_wide_time_limit_holds_for_gpu_tasks(start, send):
    worker = start("-c", "1", "--time-limit=1")
    with pytest.raises(Exception) as caught:
        send("nap", 30).get(**GET)
    assert type(caught.value).__name__ == "TimeLimitExceeded"
    assert send("add", 1, 1).get(**GET) == 2
    assert worker.stop() == 0


def test_disable_prefetch_counts_each_kind(start, send, tmp_path):
    worker = start("-c", "1", "--disable-prefetch")
    gpu = [send("nap", 0.5, kwargs={"path": str(tmp_path / str(n))}) for n in range(4)]
    wait_for(lambda: worker.output.count("shop.nap") >= 4, "GPU tasks beyond the number of children to be taken")
    assert send("double", 4).get(**GET) == 8
    assert [result.get(**GET) for result in gpu] == [0.5] * 4
    assert worker.stop() == 0


def test_children_that_are_spawned_instead_of_forked(start, send):
    worker = start("-c", "1", "--pool-start-method", "spawn")
    assert send("add", 20, 1).get(**GET) == 21
    assert send("double", 21).get(**GET) == 42
    assert worker.stop() == 0


def test_detach(environment, send, tmp_path):
    pidfile, log = tmp_path / "pid", tmp_path / "log"
    options = ["-D", "-c", "1", "-l", "INFO", f"--pidfile={pidfile}", f"--logfile={log}", "-n", "far@%h"]
    done = subprocess.run(
        [sys.executable, "-m", "bridge.worker", "-A", "tests.apps.shop:app", *options],
        env={**os.environ, **environment}, cwd=ROOT, timeout=60, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wait_for(lambda: pidfile.exists() and pidfile.read_text().strip(), "the detached worker's pid")
    worker = psutil.Process(int(pidfile.read_text()))
    try:
        assert send("add", 3, 4).get(**GET) == 7
        assert send("pid").get(**GET) != worker.pid
    finally:
        worker.terminate()
        worker.wait(60)
    assert "Traceback" not in log.read_text()


def test_sighup_restarts_the_worker_with_its_pool(start, send):
    worker = start("-c", "1")
    assert send("add", 1, 2).get(**GET) == 3
    worker.signal(signal.SIGHUP)
    wait_for(lambda: worker.output.count(" ready.") == 2, "the worker to come up again")
    assert worker.output.count("[gpu tasks]") == 2
    assert send("add", 2, 3).get(**GET) == 5
    assert worker.stop() == 0


def test_a_plain_worker_without_the_bridge_warns_and_runs_bodies_itself(start, send):
    worker = start("-c", "1", "-P", "solo", command=[sys.executable, "-m", "celery"])
    worker.says("will run in this worker itself, on NumPy")
    assert send("add", 5, 6).get(**GET) == 11
    assert send("pid").get(**GET) == worker.pid
    assert worker.stop() == 0


def test_eager_and_direct_calls_need_no_cluster():
    code = (
        "import sys; from tests.apps.shop import app, add, squares, arrays; app.conf.task_always_eager = True; "
        "assert add.delay(1, 2).get() == 3; assert add(1, 2) == 3; assert squares(3) == 9; "
        "assert squares.delay(4).get() == 16; "
        "assert add.apply((2, 2)).get() == 4; assert not {'ray', 'cupy'} & set(sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("BRIDGE_", "CELERY_"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
