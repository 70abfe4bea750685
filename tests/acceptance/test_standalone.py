"""``--standalone``: Redis and Ray come up with the worker and go down with it, whichever way it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import redis

from bridge.worker.standalone import free_port
from tests.support.services import ROOT, Worker, wait_for

ROUTED = ROOT / "examples" / "from_seed" / "routed"


def standalone(tmp_path, password=""):
    url = f"redis://{':' + password + '@' if password else ''}127.0.0.1:{free_port()}/0"
    env = {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url, "PYTHONPATH": str(ROUTED)}
    return Worker(tmp_path, "--standalone", "-c", "1", app="tasks", env=env), env


def family(worker):
    return psutil.Process(worker.pid).children(recursive=True)


def all_gone(processes):
    return not [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_seeds_unchanged_producer_and_a_clean_end(tmp_path, number):
    worker, env = standalone(tmp_path)
    assert "starting Redis" in worker.output and "starting a local Ray" in worker.output
    producer = [sys.executable, "producer.py"]
    sent = subprocess.run(producer, cwd=ROUTED, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)
    assert sent.returncode == 0, sent.stderr
    assert "14.0" in sent.stdout
    processes = family(worker)
    assert any("gcs_server" in process.name() for process in processes)
    assert any("redis-server" in process.name() for process in processes)
    folder = next(arg for each in processes for arg in each.cmdline() if "/bridge-" in arg).split("/bridge-")[1]
    folder = Path("/tmp") / f"bridge-{folder.split('/')[0]}"
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    worker.signal(number)
    code = worker.ends()
    if number == signal.SIGTERM:
        assert code == 0
    wait_for(lambda: all_gone(processes), "everything it started to end")
    if number != signal.SIGKILL:
        assert not folder.exists()


def test_redis_keeps_the_password_of_the_apps_url(tmp_path):
    worker, env = standalone(tmp_path, password="right")
    try:
        with pytest.raises(redis.AuthenticationError):
            redis.Redis.from_url(env["CELERY_BROKER_URL"].replace(":right@", "")).ping()
        assert redis.Redis.from_url(env["CELERY_BROKER_URL"]).ping()
        assert "right" not in " ".join(arg for each in family(worker) for arg in each.cmdline())
    finally:
        assert worker.stop() == 0


def test_a_redis_that_answers_at_the_apps_url_is_used_and_left_alone(tmp_path, redis_server):
    env = {"CELERY_BROKER_URL": redis_server.url, "CELERY_RESULT_BACKEND": redis_server.url, "PYTHONPATH": str(ROUTED)}
    worker = Worker(tmp_path, "--standalone", "-c", "1", "-Q", "none", app="tasks", env=env)
    assert "starting Redis" not in worker.output
    assert worker.stop() == 0
    assert redis_server.answers()
