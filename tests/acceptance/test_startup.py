"""What a person sees at start: the banner, and for each start-up error one line and an exit code of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.services import ROOT, RedisServer, Worker, wait_for

BRIDGE = [sys.executable, "-m", "bridge.worker"]


def run(*arguments, env=None, cwd=ROOT, timeout=120):
    done = subprocess.run(
        [*BRIDGE, *arguments], capture_output=True, text=True, timeout=timeout, cwd=cwd,
        env={**os.environ, "BRIDGE_CONNECT_WAIT_S": "1", **(env or {})}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("bridge: ") and "…" not in line]
    return done.returncode, said, done.stdout + done.stderr


def the_line(said, output):
    assert len(said) == 1, f"one line, please:\n{output}"
    assert "Traceback" not in output, output
    return said[0]


def test_help_lists_our_options_and_celerys():
    code, _, output = run("--help")
    assert code == 0
    for word in ("--standalone", "BRIDGE_GPU_TASKS", "BRIDGE_RAY_ADDRESS", "Usage: celery worker", "--concurrency"):
        assert word in output


def test_version():
    code, _, output = run("--version")
    assert code == 0
    assert "celery-gpu-bridge 0.1.0, celery 5.7" in output and "ray 2.60" in output


def test_the_banner_tells_what_a_person_needs(environment, tmp_path):
    worker = Worker(tmp_path, "-c", "1", env=environment)
    banner = worker.output
    assert worker.stop() == 0
    for text in (
        f".> cluster:     {environment['BRIDGE_RAY_ADDRESS']} (Ray 2.60",
        "1 GPU",
        "*** NO GPU IS USED ***",
        ".> slots:       48",
        ".> actor 0:     ready on",
        "shop.squares (batches of up to 16)",
    ):
        assert text in banner, f"{text!r} is not in\n{banner}"
    assert "shop.double" not in banner.partition("[gpu tasks]")[2].partition("[")[0]


def test_quiet_means_no_banner(environment, tmp_path):
    worker = Worker(tmp_path, "-c", "1", "-q", "-Q", "none", env=environment)
    assert worker.stop() == 0
    assert "[gpu" not in worker.output and "[config]" not in worker.output


@pytest.mark.parametrize(
    ("arguments", "env", "code", "words"),
    [
        ((), {}, 65, "-A"),
        (("-A", "no.such.app"), {}, 65, "no module named 'no'"),
        (("-A", "tests.apps.broken"), {}, 65, "KeyError: 'SHOP_SECRET' (broken.py:5)"),
        (("-A", "tests.apps.shop:nothing"), {}, 65, "tests.apps.shop"),
        (("-A", "tests.apps.shop:app", "-P", "threads"), {}, 64, "-P/--pool"),
        (("-A", "tests.apps.shop:app", "--standalone", "-D"), {}, 64, "--detach"),
        (("-A", "tests.apps.shop:app"), {"BRIDGE_GPU_TASKS": "shop.*"}, 64, "BRIDGE_GPU_TASKS"),
        (("-A", "tests.apps.shop:app"), {"BRIDGE_DEVICE": "tpu"}, 64, "BRIDGE_DEVICE"),
        (("-A", "tests.apps.shop:app"), {"BRIDGE_GPU_SLOTS": "0"}, 64, "BRIDGE_GPU_SLOTS"),
        (("-A", "tests.apps.mismarked"), {}, 64, "gpu='yes'"),
        (("-A", "tests.apps.shop:app"), {"CELERY_BROKER_URL": "redis://:hush-word@127.0.0.1:1/0"}, 66, "127.0.0.1:1"),
        (("-A", "tests.apps.shop:app"), {"BRIDGE_RAY_ADDRESS": "127.0.0.1:1"}, 68, "ray start --head"),
        (("-A", "tests.apps.shop:app"), {"CELERY_BROKER_URL": "memory://"}, 67, "Redis or RabbitMQ"),
    ],
)
def test_a_start_up_error_is_one_line_with_its_own_exit_code(environment, arguments, env, code, words):
    base = {key: value for key, value in environment.items() if key.startswith("CELERY") or key == "BRIDGE_RAY_ADDRESS"}
    exit_code, said, output = run(*arguments, env={**base, **env})
    line = the_line(said, output)
    assert words in line, line
    assert exit_code == code, output
    assert "hush-word" not in output


def test_a_wrong_redis_password(environment, tmp_path):
    server = RedisServer(tmp_path, password="right")
    try:
        url = server.url.replace("right", "wrong")
        code, said, output = run("-A", "tests.apps.shop:app", env={**environment, "CELERY_BROKER_URL": url})
    finally:
        server.client.close()
        server.kill_group()
    assert code == 66 and "password" in the_line(said, output)
    assert "wrong@" not in output


def test_a_result_backend_that_does_not_answer_is_said_and_tasks_run(environment, producer, tmp_path):
    env = {**environment, "CELERY_RESULT_BACKEND": "redis://:hush-word@127.0.0.1:1/0"}
    worker = Worker(tmp_path, "-c", "1", "-Q", "lonely", env=env)
    assert "bridge: warning: the result backend redis://:**@127.0.0.1:1/0 does not answer" in worker.output
    log = tmp_path / "log"
    producer.send_task("shop.records", [str(log), "ran"], queue="lonely", ignore_result=True)
    wait_for(log.exists, "the GPU task to run")
    assert worker.stop() == 0
    assert "hush-word" not in worker.output


def test_cuda_demanded_where_there_is_none(environment, tmp_path):
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    env = {**environment, "BRIDGE_DEVICE": "cuda", "BRIDGE_RELEASE": "cuda-demanded"}
    code, said, output = run("-A", "tests.apps.shop:app", env=env)
    assert code == 72 and "driver" in the_line(said, output)


def test_no_ray_cluster_on_this_host(environment):
    env = {key: value for key, value in environment.items() if key != "BRIDGE_RAY_ADDRESS"}
    code, said, output = run("-A", "tests.apps.shop:app", env={**env, "RAY_ADDRESS": "127.0.0.1:1"})
    assert code == 68 and "ray start --head" in the_line(said, output)


def test_plain_celery_worker_with_the_pool_says_the_same(environment, tmp_path):
    (tmp_path / "oldapp.py").write_text(
        "from celery import Celery\n"
        "app = Celery('oldapp')\n"
        "app.conf.worker_pool = 'bridge.pool:HybridPool'\n"
        "app.conf.broker_connection_retry_on_startup = True\n"
        "@app.task(gpu=True)\n"
        "def marked(): pass\n"
    )
    env = {**os.environ, **environment, "BRIDGE_RAY_ADDRESS": "127.0.0.1:1", "BRIDGE_CONNECT_WAIT_S": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "oldapp", "worker", "-c", "1"], cwd=tmp_path, env=env, timeout=60,
        capture_output=True, text=True,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("bridge: ") and "…" not in line]
    assert done.returncode == 68 and "ray start --head" in the_line(said, done.stdout + done.stderr)
