"""`python -m bridge.doctor`: nothing to say against a good set-up, and each fault named with what to do."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.support.services import ROOT, RayCluster, RayNode, RedisServer

NOWHERE = {"BRIDGE_RAY_ADDRESS": "127.0.0.1:1", "BRIDGE_CONNECT_WAIT_S": "0.2"}


def doctor(*arguments, env, cwd=ROOT):
    """Exit code, findings by what they are about, and all that was printed."""
    done = subprocess.run(
        [sys.executable, "-m", "bridge.doctor", *arguments, "--json"], env={**os.environ, **env}, cwd=cwd,
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    found = json.loads(done.stdout) if done.stdout else []
    assert all(bool(each["do"]) is (each["level"] != "OK") for each in found)
    return done.returncode, found, done.stdout + done.stderr


def text_of(found, level, about):
    return "; ".join(each["text"] for each in found if (each["level"], each["about"]) == (level, about))


def test_from_a_cluster_without_gpus_to_a_good_set_up(environment, tmp_path):
    ray = RayCluster(tmp_path, gpus=0)
    env = {**environment, "BRIDGE_RAY_ADDRESS": ray.address, "PYTHONPATH": str(tmp_path)}
    try:
        code, found, _ = doctor("-A", "celery_app", env=env)
        assert code == 1 and "no GPU" in text_of(found, "FAIL", "GPUs")
        node = RayNode(tmp_path, ray)
        try:
            code, found, output = doctor("-A", "celery_app", env=env)
            assert code == 0, output
            assert "imports it and ran kernels on" in text_of(found, "OK", "app on a GPU node")
            assert "no GPU is used" in text_of(found, "WARN", "device"), "a logical GPU is no GPU"
            everything = "versions marks limits acks prefetch broker token cluster GPUs"
            for about in (*everything.split(), "result backend"):
                assert text_of(found, "OK", about), f"{about}\n{output}"
            assert "wait for messages without taking any" in text_of(found, "OK", "broker")

            (tmp_path / "picky.py").write_text(
                "import sys\n"
                "if 'actors.executor' in ' '.join(sys.orig_argv): raise ImportError('no such library on this node')\n"
                "from celery import Celery\n"
                "app = Celery('picky')\n"
                "@app.task(gpu=True)\n"
                "def task(): pass\n"
            )
            code, found, _ = doctor("-A", "picky", env=env)
            assert code == 1 and "no such library" in text_of(found, "FAIL", "app on a GPU node")
        finally:
            node.stop()
    finally:
        ray.stop()
        shutil.rmtree(ray.folder, ignore_errors=True)


def test_wrong_password_no_cluster_and_a_variable_that_breaks_tasks(environment, tmp_path):
    server = RedisServer(tmp_path, password="the-one-password")
    try:
        url = server.url.replace("the-one-password", "another-password")
        (tmp_path / "token").write_text("f" * 64)
        (tmp_path / "token").chmod(0o644)
        env = {
            **environment, **NOWHERE, "CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url, "USE_FAST_LOCALS": "1",
            "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        }  # fmt: skip
        code, found, output = doctor("-A", "celery_app", env=env)
    finally:
        server.client.close()
        server.kill_group()
    assert code == 1
    assert "password" in text_of(found, "FAIL", "broker") and "password" in text_of(found, "FAIL", "result backend")
    assert "nothing answers at 127.0.0.1:1" in text_of(found, "FAIL", "cluster")
    assert "USE_FAST_LOCALS" in text_of(found, "FAIL", "environment")
    assert "can read" in text_of(found, "WARN", "token")
    assert not any(secret in output for secret in ("the-one-password", "another-password", "f" * 64))


def test_careless_settings_of_app_and_redis(environment, tmp_path):
    server = RedisServer(tmp_path)
    (tmp_path / "other").mkdir()
    clustered = RedisServer(tmp_path / "other", options=["cluster-enabled yes"])
    try:
        server.client.config_set("maxmemory-policy", "allkeys-lru")
        server.client.config_set("maxmemory", 100_000_000)
        server.client.execute_command("ACL", "SETUSER", "deaf", "on", "nopass", "~*", "&*", "+@all", "-client")
        broker = server.url.replace("redis://", "redis://deaf:x@")
        env = {
            **environment, **NOWHERE, "CELERY_BROKER_URL": broker, "CELERY_RESULT_BACKEND": server.url,
            "BRIDGE_GPU_TASKS": '["careless.kept", "no.such.*"]', "HOME": str(tmp_path),
        }  # fmt: skip
        code, found, _ = doctor("-A", "tests.apps.careless:app", env=env)
        assert code == 1
        assert "there is none" in text_of(found, "WARN", "token")
        assert "careless.early: acknowledged when it starts" in text_of(found, "WARN", "acks")
        assert "visibility_timeout is 2 s" in text_of(found, "WARN", "limits")
        assert "careless.early: no time limit" in text_of(found, "WARN", "limits")
        assert "worker_prefetch_multiplier = 4" in text_of(found, "WARN", "prefetch")
        assert "clock" not in text_of(found, "WARN", "broker")
        odd = text_of(found, "WARN", "marks")
        for words in (
            "careless.kept: gpu=False",
            "'no.such.*' matches no task",
            "careless.alone: @batched",
            "0.5 to 1",
        ):
            assert words in odd
        assert "maxmemory-policy is allkeys-lru" in text_of(found, "FAIL", "broker")
        assert "nothing on disk" in text_of(found, "WARN", "broker")
        assert "workers take messages by BRPOP" in text_of(found, "WARN", "broker")

        server.client.config_set("maxmemory-policy", "noeviction")
        server.client.config_set("maxmemory", 1)
        (tmp_path / "clock").write_text("-100")
        wrong = {"PYTHONPATH": str(ROOT / "tests/support/jumping"), "TESTS_CLOCK": str(tmp_path / "clock")}
        _, found, _ = doctor(
            "-A", "tests.apps.careless:app", env={**env, **wrong, "CELERY_RESULT_BACKEND": clustered.url}
        )
        assert "takes no writes: OutOfMemoryError" in text_of(found, "FAIL", "broker")
        assert "takes no writes: ClusterDownError" in text_of(found, "FAIL", "result backend")
        assert "is a Redis Cluster" in text_of(found, "FAIL", "result backend")
        assert "its clock is 100 s ahead of this host's" in text_of(found, "WARN", "broker")
    finally:
        for each in (server, clustered):
            each.client.close()
            each.kill_group()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "-A"),
        (("-A", "celery_app", "-c", "4"), 2, "unknown option -c"),
        (("-A", "celery_app", "--standalone"), 2, "--standalone"),
        (("-A", "tests.apps.broken"), 1, "KeyError: 'SHOP_SECRET' (broken.py:5)"),
        (("-A", "tests.apps.mismarked"), 1, "gpu='yes'"),
    ],
)
def test_what_cannot_be_looked_into(environment, arguments, code, words):
    exit_code, _, output = doctor(*arguments, env={**environment, **NOWHERE, "CELERY_BROKER_URL": "memory://"})
    assert exit_code == code and words in output


def test_a_person_reads_one_line_per_finding_and_what_to_do_below(environment):
    done = subprocess.run(
        [sys.executable, "-m", "bridge.doctor", "-A", "tests.apps.broken"], env={**os.environ, **environment}, cwd=ROOT,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and lines[0].startswith("OK   versions: Python 3.")
    assert lines[-2].startswith("FAIL app: ") and lines[-1].startswith("     -> ")
