"""A user's own tests of GPU tasks: without cluster, GPU, broker or bridge process, and nothing of them is imported."""

import os
import subprocess
import sys

SHOP = """
from celery import Celery, shared_task
from pydantic import BaseModel

from bridge import Gpu, array_module, batched, resident

app = Celery("shop", broker="memory://", backend="cache+memory://")
app.conf.update(worker_pool="bridge.pool:HybridPool", broker_transport_options={"polling_interval": 0.02})


class Point(BaseModel):
    x: float
    y: float


@app.task(gpu=Gpu(max_crashes=1))
def norm(values: list[float]) -> float:
    return float(array_module().linalg.norm(array_module().asarray(values)))


@app.task(gpu=True)
@batched(max_size=8)
def double(values: list[float]) -> list[float]:
    return [ValueError("negative") if value < 0 else value * 2 for value in values]


@resident
def table():
    return array_module().arange(10) * 10


@app.task(gpu=True)
def look_up(index: int) -> int:
    return int(table()[index])


@app.task(gpu=True, bind=True, max_retries=3)
def stubborn(self, until):
    if self.request.retries < until:
        raise self.retry(countdown=0)
    return [self.request.retries, self.request.is_eager]


@app.task(gpu=True, autoretry_for=(ZeroDivisionError,), max_retries=1, default_retry_delay=0)
def divide(a, b):
    return a / b


@app.task(gpu=True, pydantic=True)
def mirror(point: Point) -> Point:
    return Point(x=-point.x, y=-point.y)


@app.task
def add(a, b):
    return a + b


@shared_task(gpu=True)
def total(values: list[float]) -> float:
    return float(array_module().asarray(values).sum())
"""

CONFTEST = """
import sys

import pytest

pytest_plugins = ("celery.contrib.pytest",)


@pytest.fixture(scope="session")
def celery_config():
    return {"broker_transport_options": {"polling_interval": 0.02}}


@pytest.fixture(scope="session")
def celery_includes():
    return ["shop"]


def pytest_sessionfinish(session):
    loaded = {name.partition(".")[0] for name in sys.modules}
    print("\\nLOADED", sorted(loaded & {"numpy", "celery", "ray", "cupy"}))
"""

TEST_SHOP = """
import os

import pytest
from celery import chord, group
from celery.contrib.testing.worker import start_worker

import shop


def test_called_directly():
    assert shop.norm([3, 4]) == 5.0
    assert shop.double(4.0) == 8.0
    assert shop.look_up(3) == 30
    assert shop.mirror({"x": 1, "y": 2}) == {"x": -1, "y": -2}


def test_apply():
    assert shop.norm.apply(([3, 4],)).get() == 5.0
    assert shop.double.apply((4.0,)).get() == 8.0
    assert shop.stubborn.apply((2,)).get() == [2, True]
    assert shop.mirror.apply(({"x": 1, "y": 2},)).get() == {"x": -1, "y": -2}
    assert isinstance(shop.divide.apply((1, 0)).result, ZeroDivisionError)
    assert isinstance(shop.double.apply((-1.0,)).result, ValueError)


@pytest.fixture
def eager():
    shop.app.conf.task_always_eager = True
    yield
    shop.app.conf.task_always_eager = False


def test_always_eager(eager):
    assert shop.look_up.delay(4).get() == 40
    assert (shop.norm.s([3, 4]) | shop.double.s() | shop.add.s(1)).delay().get() == 11.0
    assert chord([shop.norm.s([3, 4]), shop.norm.s([6, 8])])(shop.total.s()).get() == 15.0


def test_celery_worker_fixture(celery_app, celery_worker):
    @celery_app.task(gpu=True)
    def here(value: int):
        return [value + 1, os.getpid()]

    celery_worker.reload()
    assert here.delay(1).get(timeout=10) == [2, os.getpid()]
    assert shop.total.delay([1, 2]).get(timeout=10) == 3.0


def test_celery_session_worker_fixture(celery_session_app, celery_session_worker):
    assert group(shop.total.s([1, n]) for n in range(3)).delay().get(timeout=10) == [1.0, 2.0, 3.0]


def test_a_worker_of_the_projects_own_app():
    with start_worker(shop.app, perform_ping_check=False):
        assert shop.norm.delay([3, 4]).get(timeout=10) == 5.0
        assert shop.stubborn.delay(1).get(timeout=10) == [1, False]
        with pytest.raises(ValueError, match="negative"):
            shop.double.delay(-1.0).get(timeout=10)
"""


def test_a_users_own_tests_pass_on_a_laptop(tmp_path):
    for name, text in {"shop.py": SHOP, "conftest.py": CONFTEST, "test_shop.py": TEST_SHOP}.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    env = {**os.environ, "BRIDGE_RAY_ADDRESS": "192.0.2.1:1"}  # nobody is there, and nobody asks
    done = subprocess.run(command, env=env, cwd=tmp_path, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 6 passed" in done.stdout
    assert "LOADED ['celery', 'numpy']" in done.stdout, "neither ray nor cupy"
