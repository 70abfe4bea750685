"""Redis cuts connections, is slow, restarts and loads for a while: running GPU work ends and its result is stored."""

import contextlib
import socket

import pytest
import redis
from celery import Celery

from tests.support.services import RedisServer, Worker, wait_for

GET = {"timeout": 60}
#: Loading each key takes long enough that Redis says LOADING for about three seconds.
LOADS_SLOWLY = ("key-load-delay 1000", "loading-process-events-interval-bytes 1024")
KEYS = 3000


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
            result = self.client.send_task("lossy.holds.late_reject", [str(log), str(tmp_path / f"{name}-go")])
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


def test_cut_connections_and_a_slow_redis(site, tmp_path):
    running = site.hold("running")
    for kind in ("normal", "pubsub"):
        site.server.client.execute_command("CLIENT", "KILL", "TYPE", kind)
    site.worker.says("Connection to broker lost")
    site.server.client.execute_command("CLIENT", "PAUSE", 3000, "ALL")
    (tmp_path / "running-go").touch()
    assert b'"SUCCESS"' in site.stored(running)
    wait_for(lambda: site.worker.output.count("Connected to redis") >= 2, "the worker to be back")
    site.connect()
    assert site.client.send_task("lossy.cpu", [7]).get(**GET) == 7
    assert (tmp_path / "running").read_text().count("run") == 1
    assert site.worker.stop() == 0


def test_a_redis_that_restarts_and_loads(site, tmp_path):
    running = site.hold("running")
    with site.server.client.pipeline() as pipe:
        for number in range(KEYS):
            pipe.set(f"ballast-{number}", "x")
        pipe.save()
        pipe.execute()
    site.restart(options=LOADS_SLOWLY, wait=False)
    seen = wait_for(lambda: _trouble(site.server.client), "Redis to listen")
    assert seen == "BusyLoadingError", "it says LOADING, or this test tests nothing"
    (tmp_path / "running-go").touch()
    assert b'"SUCCESS"' in site.stored(running)
    wait_for(lambda: site.worker.output.count("Connected to redis") >= 2, "the worker to be back")
    site.connect()
    assert site.client.send_task("lossy.cpu", [7]).get(**GET) == 7
    assert (tmp_path / "running").read_text().count("run") == 1
    assert site.worker.stop() == 0


def _trouble(client):
    """What Redis answers with; nothing while it does not listen."""
    try:
        client.ping()
    except redis.BusyLoadingError as error:
        return type(error).__name__
    except redis.ConnectionError:
        return ""
    return "none"
