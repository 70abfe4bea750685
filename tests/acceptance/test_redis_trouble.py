"""Redis cuts connections, is slow, restarts and loads for a while: running GPU work ends and its result is stored."""

import contextlib
import os
import socket

import pytest
import redis
from celery import Celery

from tests.support.services import RedisServer, Worker, wait_for

GET = {"timeout": 60}
#: Loading takes about four seconds; Redis says LOADING whenever it has read two megabytes more.
LOADS_SLOWLY = ("key-load-delay 40000",)  # microseconds
KEYS, SIZE = 100, 65536


@pytest.fixture
def site(environment, tmp_path):
    """A Redis of its own for broker and results, a worker of the lossy app on it, a client."""

    class Site:
        def __init__(self):
            self.server = RedisServer(tmp_path)
            url = self.server.url
            env = {**environment, "CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}
            self.worker = Worker(tmp_path, "-c", "1", "-n", "trouble@%h", app="tests.apps.lossy:app", env=env)
            self.name = f"trouble@{socket.gethostname()}"
            self.connect()

        def connect(self):
            """A client with connections of its own."""
            self.client = Celery(broker=self.server.url, backend=self.server.url, set_as_current=False)

        def hold(self, name):
            log = tmp_path / name
            result = self.client.send_task("lossy.holds.early", [str(log), str(tmp_path / f"{name}-go")])
            wait_for(log.exists, "the body to run")
            return result.id

        def stored(self, task):
            """The outcome, asked on a connection that nothing has happened to yet."""
            with redis.Redis.from_url(self.server.url) as client:
                return wait_for(lambda: _get(client, task), "the result to be stored")

        def restart(self, **options):
            self.server.client.close()
            self.server.kill_group()
            self.server = RedisServer(tmp_path, port=self.server.port, **options)

    made = Site()
    yield made
    made.worker.kill_group()
    made.client.close()
    made.server.client.close()
    made.server.kill_group()


def _get(client, task):
    with contextlib.suppress(redis.ConnectionError):
        return client.get(f"celery-task-meta-{task}")
    return None


def ends_well(site, running, folder):
    """The body ends, its result is stored, the worker comes back, and nothing ran twice."""
    (folder / "running-go").touch()
    assert b'"SUCCESS"' in site.stored(running)
    wait_for(lambda: site.worker.output.count("Connected to redis") >= 2, "the worker to be back")
    site.connect()
    assert site.client.send_task("lossy.cpu", [7]).get(**GET) == 7
    assert (folder / "running").read_text().count("run") == 1
    assert site.worker.stop() == 0


def test_cut_connections_and_a_slow_redis(site, tmp_path):
    running = site.hold("running")
    for kind in ("normal", "pubsub"):
        site.server.client.execute_command("CLIENT", "KILL", "TYPE", kind)
    site.worker.says("Connection to broker lost")
    site.server.client.execute_command("CLIENT", "PAUSE", 3000, "ALL")
    ends_well(site, running, tmp_path)


def test_a_redis_that_restarts_and_loads(site, tmp_path):
    running = site.hold("running")
    with site.server.client.pipeline() as pipe:
        for number in range(KEYS):
            pipe.set(f"ballast-{number}", os.urandom(SIZE))
        pipe.save()
        pipe.execute()
    site.restart(options=LOADS_SLOWLY, wait=False)
    assert wait_for(lambda: said(site.server.port), "Redis to listen").startswith(b"-LOADING")
    ends_well(site, running, tmp_path)


def said(port):
    """What Redis answers to a PING; nothing while it does not listen. The client library's retries would hide it."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(64)
    return b""
