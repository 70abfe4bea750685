"""Messages nobody should send, through a real Redis and worker: each costs only itself, and nothing of it is logged."""

import decimal
import json
import subprocess
from pathlib import Path

import pytest
from celery import Celery

from tests.support import hostile
from tests.support.services import RedisServer, Worker, wait_for

GET = {"timeout": 60}
QUEUE = "hostile"
LIMIT = 1 << 20
PASSWORD = "SECRET-password"
#: What worker and driver may grow by, together, over all hostile messages of a test, in bytes.
MOST_GROWTH = 150 << 20


@pytest.fixture(scope="module")
def server(clean_environment, tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"), password=PASSWORD)
    yield server
    server.client.close()
    server.kill_group()


@pytest.fixture(scope="module")
def worker(server, environment, tmp_path_factory):
    env = {
        **environment, "CELERY_BROKER_URL": server.url, "CELERY_RESULT_BACKEND": server.url,
        "CELERY_MESSAGES": json.dumps({"task_default_queue": QUEUE}), "BRIDGE_MAX_BODY_BYTES": str(LIMIT),
    }  # fmt: skip
    process = Worker(tmp_path_factory.mktemp("hostile"), "-c", "1", app="tests.apps.messages:app", env=env)
    yield process
    assert process.popen.poll() is None, process.output[-5000:]
    assert process.stop() == 0, process.output[-5000:]


@pytest.fixture
def app(server, worker):
    with Celery("producer", broker=server.url, backend=server.url, set_as_current=False) as made:
        yield made


@pytest.fixture
def fine(app, worker, server):
    """``fine()``: the worker lives, does a good task of each kind, and holds nothing."""

    def check():
        results = [app.send_task(f"messages.{kind}.same", ["fine"], queue=QUEUE) for kind in ("gpu", "cpu")]
        assert [result.get(**GET) for result in results] == ["fine", "fine"]
        assert worker.popen.poll() is None, worker.output[-5000:]

    yield check
    wait_for(lambda: server.client.llen(QUEUE) == 0, "the queue to be empty")


def memory(worker):
    """Bytes that worker, driver and children hold in memory."""
    pids = subprocess.run(["pgrep", "-g", str(worker.pid)], capture_output=True, text=True).stdout.split()
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids if Path(f"/proc/{pid}").exists()]
    assert len(pages) >= 3
    return sum(pages) * 4096


def send_all(server, worker, fine, messages):
    fine()
    before = memory(worker)
    for number, raw in enumerate(messages):
        server.client.lpush(QUEUE, raw)
        if number % 25 == 24:
            fine()
    fine()
    assert memory(worker) - before < MOST_GROWTH


def says_nothing(server, worker):
    """Neither log nor stored outcomes hold a payload or a password."""
    assert "SECRET" not in worker.output
    for key in server.client.scan_iter("celery-task-meta-*"):
        stored = json.loads(server.client.get(key))
        told = json.dumps([stored["result"], stored["traceback"]])  # ids of parent and group stand beside it, as ever
        assert stored["status"] == "SUCCESS" or "SECRET" not in told, stored


def test_a_short_text_that_means_a_long_number(server, worker, app, fine):
    """`Decimal("1e999999999")` as an int would keep the driver busy for hours."""
    for kind in ("gpu", "cpu"):
        app.send_task(f"messages.{kind}.same", [decimal.Decimal("1e999999999")], queue=QUEUE)
    fine()
    assert worker.output.count("numbers of more than") == 2
    assert app.send_task("messages.gpu.same", [decimal.Decimal("1e400")], queue=QUEUE).get(**GET) == decimal.Decimal(
        "1e400"
    )


def test_what_is_no_message(server, worker, fine):
    send_all(server, worker, fine, hostile.no_messages(QUEUE))
    says_nothing(server, worker)


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_odd_headers(server, worker, fine, kind):
    send_all(server, worker, fine, hostile.odd_headers(QUEUE, f"messages.{kind}.pid"))
    says_nothing(server, worker)


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_odd_bodies(server, worker, fine, tmp_path, kind):
    send_all(server, worker, fine, hostile.odd_bodies(QUEUE, f"messages.{kind}.pid", str(tmp_path / "trap")))
    assert not (tmp_path / "trap").exists()
    says_nothing(server, worker)


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_bodies_beyond_the_limit(server, worker, app, fine, kind):
    fine()
    before, sent = memory(worker), []
    for own, raw in hostile.large_bodies(QUEUE, f"messages.{kind}.same", LIMIT):
        server.client.lpush(QUEUE, raw)
        sent.append(own)
    for own in sent:
        error = app.AsyncResult(own).get(**GET, propagate=False)
        assert type(error).__name__ == "PayloadTooLarge", error
        assert f"messages.{kind}.same" in str(error) and "BRIDGE_MAX_BODY_BYTES" in str(error)
    fine()
    assert memory(worker) - before < MOST_GROWTH
    assert app.send_task(f"messages.{kind}.same", ["x" * (LIMIT // 2)], queue=QUEUE).get(**GET) == "x" * (LIMIT // 2)
    says_nothing(server, worker)


def test_a_lost_connection_tells_no_password(server, worker, fine):
    fine()
    server.client.client_kill_filter(_type="normal", skipme=True)
    worker.says("Connection to broker lost")
    fine()
    says_nothing(server, worker)
