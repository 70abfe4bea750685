"""Health tells the truth: what probes hear of a worker that is busy, cut off, hung, or about to end."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from bridge.worker.standalone import free_port
from tests.acceptance.test_doctor import doctor, text_of
from tests.support.services import ROOT, RayCluster, RedisServer, Worker, wait_for

GET = {"timeout": 60}
NAME = f"health@{socket.gethostname()}"


class Watched(Worker):
    """A worker with two slots, a health port, and what `python -m bridge.health` says of it."""

    def __init__(self, folder, env, **options):
        self.port = free_port()
        self.env = {
            **env, "BRIDGE_RUNTIME_DIR": str(folder / "run"), "BRIDGE_HEALTH_ADDRESS": str(self.port),
            "BRIDGE_GPU_SLOTS": "2",
        }  # fmt: skip
        super().__init__(folder, "-c", "1", "-n", "health@%h", "-Q", "health", env=self.env, **options)

    def health(self, *options):
        """Exit code and what was printed."""
        done = subprocess.run(
            [sys.executable, "-m", "bridge.health", *options], env={**os.environ, **self.env}, cwd=ROOT,
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    def account(self):
        return json.loads(self.health("--json")[1])[0]

    def http(self, path):
        """Status and body over HTTP."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def probes(self):
        """Exit codes of a liveness and a readiness probe."""
        return self.health("--live")[0], self.health("--ready")[0]


def why(account):
    assert all(reason["do"] for reason in account["reasons"])
    return "; ".join(reason["what"] for reason in account["reasons"])


def test_busy_hung_and_ending(environment, redis_server, producer, tmp_path):
    redis_server.client.flushall()
    worker = Watched(tmp_path, environment, ready=False)
    try:
        wait_for(lambda: worker.health()[0] != 2, "somebody to answer")
        if " ready." not in worker.output:
            assert worker.probes() == (0, 1), "it starts: alive, and not ready"
        worker.says(" ready.")
        wait_for(lambda: worker.probes() == (0, 0), "both probes to be content")

        # busy: a body that goes on and on, and every slot taken
        gate = tmp_path / "gate"
        results = [producer.send_task("shop.progress", [str(gate)], queue="health")]
        results += [producer.send_task("shop.add", [n, 0], queue="health") for n in range(8)]
        wait_for(lambda: worker.account()["waiting"] >= 1, "all slots to be taken")
        wait_for(lambda: worker.account()["actors"][0]["running"] == "shop.progress", "a beat that has seen the body")
        assert worker.probes() == (0, 0)
        code, said = worker.health("--worker", NAME)
        assert code == 0 and f"{NAME}: ready, 1 of 1 actors ready, 1 running" in said
        status, account = worker.http("/health")
        assert (status, account["state"], account["running"]) == (200, "ready", 1)
        assert account["actors"][0]["state"] == "ready" and account["actors"][0]["generation"] >= 1
        assert [worker.http(path)[0] for path in ("/livez", "/readyz", "/metrics")] == [200, 200, 404]
        assert worker.health("--worker", "another@host")[0] == 2

        # the doctor looks at a cluster whose GPU is held by that actor
        code, found, output = doctor("-A", "tests.apps.shop:app", env=environment)
        assert code == 0 and "not tried: warm actor gpu-0-v" in text_of(found, "OK", "app on a GPU node"), output
        now = worker.account()["actors"][0]
        assert (now["running"], now["generation"]) == ("shop.progress", account["actors"][0]["generation"])

        # its driver is stuck: that is said, and nobody waits for it
        (driver,) = worker.account()["drivers"]
        os.kill(driver["pid"], signal.SIGSTOP)
        wait_for(lambda: worker.account()["drivers"][0]["heard_s"] > 3, "the driver's silence to be seen")
        assert worker.health("--live")[0] == 0
        os.kill(driver["pid"], signal.SIGCONT)
        wait_for(lambda: worker.account()["drivers"][0]["heard_s"] < 3, "the driver to be heard again")

        # hung: its main process does not run at all
        worker.signal(signal.SIGSTOP)
        code, said = worker.health("--live", "--timeout", "0.5")
        assert code == 1 and "does not answer within 0.5 s" in said
        worker.signal(signal.SIGCONT)
        wait_for(lambda: worker.probes() == (0, 0), "it to be well again")

        # ending: it finishes what runs
        worker.signal(signal.SIGTERM)
        wait_for(lambda: worker.account()["state"] == "stopping", "the worker to say that it ends")
        assert worker.probes() == (0, 1)
        assert worker.http("/readyz")[0] == 503 and worker.http("/livez")[0] == 200
        gate.touch()
        assert results[0].get(**GET) == "done"
        assert worker.ends() == 0
        assert worker.health()[0] == 2 and not list((tmp_path / "run").iterdir())
    finally:
        worker.kill_group()
    assert worker.health()[0] == 2
    redis_server.client.flushall()


@pytest.fixture
def services(tmp_path):
    """A Redis and a Ray of the test's own, to take away."""
    redis, ray = RedisServer(tmp_path, password="hidden"), RayCluster(tmp_path)
    yield redis, ray
    ray.stop()
    redis.kill_group()
    redis.client.close()
    shutil.rmtree(ray.folder, ignore_errors=True)


def test_broker_actor_and_cluster_gone(environment, services, tmp_path):
    redis, ray = services
    where = {"CELERY_BROKER_URL": redis.url, "CELERY_RESULT_BACKEND": redis.url, "BRIDGE_RAY_ADDRESS": ray.address}
    worker = Watched(tmp_path, {**environment, **where})
    try:
        wait_for(lambda: worker.probes() == (0, 0), "the worker to be well")

        pid = worker.account()["actors"][0]["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: "no GPU actor is ready" in why(worker.account()), "the actor to be missed")
        assert worker.health("--live")[0] == 0
        wait_for(lambda: worker.probes() == (0, 0), "Ray to bring the actor back")
        assert worker.account()["actors"][0]["pid"] != pid

        redis.kill_group()
        wait_for(lambda: "no connection to the broker" in why(worker.account()), "the broker to be missed")
        assert worker.probes() == (0, 1)
        assert "hidden" not in json.dumps(worker.account())
        again = RedisServer(tmp_path, password="hidden", port=redis.port)
        try:
            wait_for(lambda: worker.probes() == (0, 0), "the worker to come back to its broker")
            ray.stop()
            wait_for(lambda: worker.probes() == (0, 1), "the cluster to be missed")
            assert "driver" in why(worker.account()) or "actor" in why(worker.account())
            worker.kill_group()
            code, said = worker.health()
            assert code == 2 and "no worker of this user runs here" in said, "a killed worker leaves nobody behind"
        finally:
            again.client.close()
            again.kill_group()
    finally:
        worker.kill_group()
