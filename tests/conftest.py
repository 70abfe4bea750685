"""Services once per session, tiers marked by folder, a clean environment for every test."""

import os
import secrets
import shutil
import socket
from pathlib import Path

import pytest

from tests.support.services import RayCluster, RedisServer, Worker, inspected, keep_token

TIERS = ("unit", "integration", "acceptance", "gpu")
NAMESPACE = "tests"


def pytest_collection_modifyitems(items):
    for item in items:
        tier = Path(item.fspath).relative_to(Path(__file__).parent).parts[0]
        if tier in TIERS:
            item.add_marker(getattr(pytest.mark, tier))


@pytest.fixture(scope="session", autouse=True)
def clean_environment(tmp_path_factory):
    """No BRIDGE_*, CELERY_* or RAY_* variable of the machine, and a home with a Ray token: clusters ask for it."""
    for name in list(os.environ):
        if name.startswith(("BRIDGE_", "CELERY_", "RAY_")):
            del os.environ[name]
    home = tmp_path_factory.mktemp("home")
    os.environ["HOME"] = str(home)
    keep_token(home, secrets.token_hex(32))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["BRIDGE_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("run"))  # no worker of another run is asked


@pytest.fixture(autouse=True)
def no_token_mode_stays():
    """A test that joins a cluster in this process turns tokens on for it; a worker of the next may have none."""
    yield
    os.environ.pop("RAY_AUTH_MODE", None)


@pytest.fixture(scope="module", autouse=True)
def no_worker_stays():
    """A test that fails may leave its worker behind, which would load the machine under all that follow."""
    yield
    for each in Worker.started:
        if each.popen.poll() is None:
            each.kill_group()
    Worker.started.clear()


@pytest.fixture(scope="session")
def redis_server(clean_environment, tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.client.close()
    server.kill_group()


@pytest.fixture(scope="session")
def ray_cluster(clean_environment, tmp_path_factory):
    cluster = RayCluster(tmp_path_factory.mktemp("ray"))
    yield cluster
    cluster.stop()
    shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def environment(redis_server, ray_cluster):
    """What a worker of the tests is started with."""
    return {
        "CELERY_BROKER_URL": redis_server.url,
        "CELERY_RESULT_BACKEND": redis_server.url,
        "BRIDGE_RAY_ADDRESS": ray_cluster.address,
        "BRIDGE_NAMESPACE": NAMESPACE,
        "BRIDGE_BEAT_S": "0.5",
    }


@pytest.fixture(scope="module")
def worker(environment, tmp_path_factory):
    """One worker per test module, on the queues of the shop app; it must survive every test of the module."""
    process = Worker(tmp_path_factory.mktemp("worker"), "-c", "2", "-n", "shop@%h", env=environment)
    yield process
    assert process.popen.poll() is None, f"the worker ended ({process.popen.returncode}):\n{process.output[-5000:]}"
    assert process.stop() == 0, process.output[-5000:]


@pytest.fixture(scope="session")
def producer(redis_server):
    """A plain Celery client that knows task names and nothing else."""
    from celery import Celery

    app = Celery("producer", broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    yield app
    app.close()


@pytest.fixture
def send(producer):
    """``send("add", 1, 2)`` sends ``shop.add``; the AsyncResult."""

    def send_task(name, *args, **options):
        return producer.send_task(f"shop.{name}", args, options.pop("kwargs", None), **options)

    return send_task


@pytest.fixture
def gpu_stats(producer, worker):
    """The [gpu] part of `inspect stats` of the module's worker, read now."""

    name = f"shop@{socket.gethostname()}"

    def read():
        return inspected(producer, name, "stats")["pool"]["gpu"]

    return read
