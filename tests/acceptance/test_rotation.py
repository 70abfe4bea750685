"""A Redis password is changed under a running system: docs/security.md, step by step; no task is lost."""

import os
import signal
import socket

import pytest
from celery import Celery

from tests.support.services import RedisServer, Worker, inspected, wait_for

GET = {"timeout": 60}
USER = "shop"


@pytest.fixture
def server(tmp_path):
    """A Redis with a user of its own for workers and producers."""
    server = RedisServer(tmp_path)
    server.client.execute_command("ACL", "SETUSER", USER, "on", ">old-word", "~*", "&*", "+@all")
    yield server
    server.client.close()
    server.kill_group()


def published(client):
    """Whether a body could send a task, and that one ran."""
    result = client.send_task("lossy.publishes", [7])
    other = result.get(**GET, propagate=False)
    return result.successful() and client.AsyncResult(other).get(**GET) == 7


def test_the_password_of_redis_is_changed_and_nothing_is_lost(server, environment, tmp_path):
    client, started = Celery(broker=server.url, backend=server.url, set_as_current=False), []

    def acl(change):
        server.client.execute_command("ACL", "SETUSER", USER, change)

    def start(name, word):
        url = server.url.replace("://", f"://{USER}:{word}@")
        env = {**environment, "CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url, "BRIDGE_RELEASE": "rotation"}
        options = ("-c", "1", "-n", f"{name}@%h", "--without-mingle")
        started.append(Worker(tmp_path, *options, app="tests.apps.lossy:app", env=env, log=f"{name}.log"))
        return started[-1]

    def gpu():
        return inspected(client, f"second@{socket.gethostname()}", "gpu")

    def hold(name):
        result = client.send_task("lossy.holds.late", [str(tmp_path / name), str(tmp_path / f"{name}-go")])
        wait_for((tmp_path / name).exists, "the body to run")
        return result

    def cut(worker):
        before = worker.output.count("Connected to redis")
        server.client.execute_command("CLIENT", "KILL", "USER", USER)
        wait_for(lambda: worker.output.count("Connected to redis") > before, "the worker to be back")

    try:
        first = start("first", "old-word")
        acl(">new-word")
        cut(first)  # it logs in again, with the old one
        running = hold("running")
        waiting = [client.send_task("lossy.holds.late", [str(tmp_path / str(n)), str(tmp_path / "running-go")])
                   for n in range(5)]  # fmt: skip
        second = start("second", "new-word")
        first.signal(signal.SIGTERM)
        first.says("Warm shutdown")
        (tmp_path / "running-go").touch()
        assert first.ends() == 0, first.output[-3000:]
        assert [result.get(**GET) for result in [running, *waiting]] == ["done"] * 6
        assert (tmp_path / "running").read_text().count("run") == 1
        acl("<old-word")
        cut(second)  # nobody goes on with what was opened by the old one
        assert client.send_task("lossy.cpu", [1]).get(**GET) == 1
        with pytest.raises(Exception, match="invalid username-password"):
            client.send_task("lossy.publishes", [7]).get(**GET)  # a warm executor has what it was started with
        os.kill(gpu()["actors"][0]["executor_pid"], signal.SIGKILL)  # as `control gpu_restart`, but soon over
        wait_for(lambda: published(client), "a new executor")
        wait_for(lambda: gpu()["in_flight"] == 0, "all to be over: a result is stored before its message goes")
        assert second.stop() == 0, second.output[-3000:]
        assert not [word for word in ("old-word", "new-word") if word in first.output + second.output]
    finally:
        client.close()
        for each in started:
            each.kill_group()
