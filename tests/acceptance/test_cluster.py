"""Bring-up: plain producers, several workers, tokens, foreign versions, clusters without GPUs."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time

import psutil
import pytest

from tests.acceptance.test_startup import run, the_line
from tests.support.heads import kill_all_of
from tests.support.services import ROOT, RayCluster, Worker, inspected, keep_token, wait_for

GET = {"timeout": 60}


@pytest.fixture
def cluster(tmp_path):
    started = []

    def start(**options):
        started.append(RayCluster(tmp_path, **options))
        return started[-1]

    yield start
    for each in started:
        each.stop()
        if each.folder:
            shutil.rmtree(each.folder, ignore_errors=True)


def test_a_producer_in_another_process_that_imports_nothing_of_the_bridge(worker, environment):
    done = subprocess.run(
        [sys.executable, "-m", "tests.producers.plain"], capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"sums": [2 * n for n in range(20)], "chained": 14, "loaded": []}


def test_two_workers_share_one_set_of_actors(worker, environment, producer, send, tmp_path):
    second = Worker(tmp_path, "-c", "1", "-n", "second@%h", env=environment)
    names = [f"shop@{socket.gethostname()}", f"second@{socket.gethostname()}"]
    stats = {name: inspected(producer, name, "stats") for name in names}
    actors = [stats[name]["pool"]["gpu"]["actors"] for name in names]
    assert [len(each) for each in actors] == [1, 1]
    assert actors[0][0]["executor_pid"] == actors[1][0]["executor_pid"]
    assert stats[names[0]]["pool"]["gpu"]["driver"] != stats[names[1]]["pool"]["gpu"]["driver"]
    assert [result.get(**GET) for result in [send("add", n, 0) for n in range(40)]] == list(range(40))
    assert second.stop() == 0


def test_a_cluster_with_a_token_lets_in_who_has_it_and_tells_others(cluster, environment, tmp_path):
    secret = "0123456789abcdef" * 4
    ray = cluster(env={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret})
    (tmp_path / "nowhere").mkdir()
    base = {**environment, "BRIDGE_RAY_ADDRESS": ray.address, "HOME": str(tmp_path / "nowhere")}
    token = keep_token(tmp_path / "home", secret)
    token.chmod(0o640)
    found = Worker(tmp_path, "-c", "1", "-Q", "none", env={**base, "HOME": str(tmp_path / "home")})
    assert "ready on" in found.output
    assert f"other users of this machine can read Ray's token: chmod 600 {token}" in found.output
    assert found.stop() == 0
    code, said, output = run("-A", "tests.apps.shop:app", env=base)
    assert code == 69 and "no token was found" in the_line(said, output)
    code, said, output = run("-A", "tests.apps.shop:app", env={**base, "RAY_AUTH_MODE": "token"})
    assert code == 69 and "no token was found" in the_line(said, output), "Ray would end the process here"
    code, said, output = run("-A", "tests.apps.shop:app", env={**base, "RAY_AUTH_TOKEN": "f" * 64})
    assert code == 69 and "RAY_AUTH_TOKEN was refused" in the_line(said, output)
    assert secret not in output and "f" * 64 not in output
    missing = str(tmp_path / "missing")
    code, said, output = run("-A", "tests.apps.shop:app", env={**base, "RAY_AUTH_TOKEN_PATH": missing})
    assert code == 69 and f"the token file {missing} is empty or cannot be read" in the_line(said, output)


@pytest.fixture(scope="module")
def pair(environment, tmp_path_factory):
    """A cluster with two GPUs and its worker."""
    folder = tmp_path_factory.mktemp("pair")
    ray = RayCluster(folder, gpus=2)
    more = {"BRIDGE_BEAT_S": "0.2", "BRIDGE_HEAD_WAIT_S": "1"}
    env = {**environment, "BRIDGE_RAY_ADDRESS": ray.address, **more}
    yield ray, Worker(folder, "-c", "1", "-Q", "pair", "-n", "pair@%h", env=env)
    ray.stop()
    shutil.rmtree(ray.folder, ignore_errors=True)


def test_gpu_restart_takes_one_actor_at_a_time(pair, producer):
    name = f"pair@{socket.gethostname()}"
    control = producer.control

    def actors():
        return inspected(producer, name, "gpu")["actors"]

    wait_for(lambda: [actor["state"] for actor in actors()] == ["ready"] * 2, "both actors")
    before = {actor["slot"]: actor["pid"] for actor in actors()}
    control.broadcast("gpu_restart", destination=[name], reply=True, timeout=20)
    results, seen = [], []

    def restarted():
        results.append(producer.send_task("shop.add", [len(results), 0], queue="pair"))
        now = actors()
        seen.append(sum(actor["state"] == "ready" for actor in now))
        return all(actor["state"] == "ready" and actor["pid"] != before[actor["slot"]] for actor in now)

    wait_for(restarted, "two new actors")
    assert set(seen) >= {1, 2} and 0 not in seen, "one is always there"
    assert [result.get(**GET) for result in results] == list(range(len(results)))


def test_a_head_that_moves_wants_workers_started_anew_and_nothing_is_lost(pair, worker, producer, tmp_path):
    """The last test of that worker: it goes on asking the address it was started with, and says so."""
    ray, moved = pair
    log = tmp_path / "log"
    next(each for each in psutil.Process(ray.pid).children(True) if each.name() == "gcs_server").suspend()
    due = time.monotonic() + 1.0
    wait_for(lambda: time.monotonic() > due, "a beat of 0.2 s to hang in the middle of a question")
    kill_all_of(ray)
    sent = [producer.send_task("shop.records", [str(log), str(number)], queue="pair") for number in range(3)]
    said = f"no Ray cluster: nothing answers at {ray.address}; GPU tasks wait until there is one; if its head has"
    moved.says(said, 45)  # Ray itself would give up after 60 s
    assert producer.send_task("shop.unmarked", [[1, 2]], queue="pair").get(**GET)[1] == 3
    assert moved.stop() == 0, moved.output[-3000:]
    shop = [f"shop@{socket.gethostname()}"]  # a worker that was started with another head's address
    producer.control.add_consumer("pair", destination=shop, reply=True, timeout=20)
    assert [result.get(**GET) for result in sent] == ["0", "1", "2"]
    assert sorted(log.read_text().split()) == ["0", "1", "2"], "each ran once"
    producer.control.cancel_consumer("pair", destination=shop, reply=True, timeout=20)


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ("'2.59.0', '.'.join(map(str, sys.version_info[:3]))", ("Ray 2.59.0", "Ray 2.60")),
        ("ray.__version__, '3.10.1'", ("Python 3.10.1", "Python 3.1")),
    ],
)
def test_a_cluster_of_other_versions(cluster, environment, versions, words):
    disguise = (
        f"import sys, ray, ray._private.utils as u; u.compute_version_info = lambda: ({versions}); "
        "from ray.scripts.scripts import main; main()"
    )
    ray = cluster(launcher=[sys.executable, "-c", disguise])
    code, said, output = run("-A", "tests.apps.shop:app", env={**environment, "BRIDGE_RAY_ADDRESS": ray.address})
    line = the_line(said, output)
    assert code == 70 and all(word in line for word in words)


def test_a_cluster_without_gpus(cluster, environment):
    ray = cluster(gpus=0)
    code, said, output = run("-A", "tests.apps.shop:app", env={**environment, "BRIDGE_RAY_ADDRESS": ray.address})
    assert code == 71 and "--num-gpus=1" in the_line(said, output)


def test_an_app_that_gpu_nodes_cannot_import(environment, tmp_path):
    (tmp_path / "picky.py").write_text(
        "import sys\n"
        "if 'actors.executor' in ' '.join(sys.orig_argv): raise ImportError('no such library on this node')\n"
        "from celery import Celery\n"
        "app = Celery('picky')\n"
        "@app.task(gpu=True)\n"
        "def task(): pass\n"
    )
    code, said, output = run("-A", "picky", "-Q", "none", env={**environment, "PYTHONPATH": str(tmp_path)})
    assert code == 72 and "no such library on this node" in the_line(said, output)


def test_without_an_address_the_cluster_ray_start_brought_up_on_this_host_is_used(cluster, environment, tmp_path):
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp", ignore_cleanup_errors=True) as here:
        # Instead of Ray's default: nodes that other tests start at the same time write their address there.
        ray = cluster(own_folder=False, env={"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": here})
        env = {key: value for key, value in environment.items() if key != "BRIDGE_RAY_ADDRESS"}
        worker = Worker(tmp_path, "-c", "1", "-Q", "none", env={**env, "HOME": str(tmp_path), "RAY_TMPDIR": here})
        assert f":{ray.port} (Ray" in worker.output
        assert "asks for no token: whoever reaches its ports can run code on its nodes" in worker.output
        assert worker.stop() == 0
