"""The seed's first two approaches through a real Celery worker and a real Redis: results, errors, deaths, time limits.

They are the baselines of `benchmarks/`, so they have to be good. The third one is this project; other tests run it.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from celery import Celery
from celery.result import AsyncResult

from tests.support.services import PATIENCE_S, ROOT, Process, RedisServer, wait_for

pytestmark = pytest.mark.acceptance

FROM_SEED = ROOT / "examples" / "from_seed"

#: The pool each approach can run under: a child of prefork may start no `multiprocessing` process.
POOLS = {"subprocess_per_call": "prefork", "queue_per_call": "threads"}

#: Stands in for NumPy: an import that never ends, as on a driver that hangs. It leaves its process id.
HUNG_NUMPY = """
import os, pathlib, signal
pathlib.Path(__file__).with_name(f"{os.getpid()}.pid").touch()
while True:
    signal.pause()
"""

#: Long enough to find the child and kill it before it is up; short enough to wait for.
HUNG_CALL_TIMEOUT_S = 5.0


class Worker(NamedTuple):
    """A running worker of one example, and how to send it work."""

    process: Process
    producer: Celery
    queue: str

    def send(self, data: list) -> AsyncResult:
        return self.producer.send_task("tasks.gpu_intensive_task", [data], queue=self.queue)


class Hung(NamedTuple):
    """A worker whose children never get past importing NumPy."""

    worker: Worker
    folder: Path

    def child(self) -> psutil.Process:
        """The child, once it is importing."""
        file = wait_for(lambda: next(self.folder.glob("*.pid"), None), "a child to start")
        return psutil.Process(int(file.stem))


def has_ended(process: psutil.Process) -> bool:
    """Whether it runs no more; whoever adopted it may still have to reap it."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@contextmanager
def running(example: str, redis: RedisServer, queue: str, folder: Path, **env: str) -> Iterator[Worker]:
    """A worker of `example`; the broker's address reaches it by the environment, past the one in its code."""
    env |= {"CELERY_BROKER_URL": redis.url, "CELERY_RESULT_BACKEND": redis.url}
    env |= {"TMPDIR": str(folder)}  # a killed worker leaves its temporary folder behind
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-P", POOLS[example], "-c", "2", "-Q", queue]
    quiet = ["--without-mingle", "--without-gossip"]
    process = Process([*command, *quiet], folder / "worker.log", env=env, cwd=FROM_SEED / example)
    with Celery(broker=redis.url, backend=redis.url, set_as_current=False) as producer:
        try:
            yield Worker(process, producer, queue)
        finally:
            process.kill_group()


@pytest.fixture(scope="module", params=POOLS)
def example(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def worker(example: str, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with running(example, redis_server, example, tmp_path_factory.mktemp(example)) as started:
        yield started
        assert started.process.stop() == 0


@pytest.fixture
def hung(example: str, redis_server: RedisServer, tmp_path: Path) -> Iterator[Hung]:
    (tmp_path / "numpy.py").write_text(HUNG_NUMPY)
    env = {"PYTHONPATH": str(tmp_path), "CALL_TIMEOUT_S": str(HUNG_CALL_TIMEOUT_S)}
    with running(example, redis_server, f"{example}.{tmp_path.name}", tmp_path, **env) as started:
        yield Hung(started, tmp_path)


def failure_of(result: AsyncResult) -> str:
    error = result.get(timeout=PATIENCE_S, propagate=False)
    assert type(error).__name__ == "ChildFailed", error
    return str(error)


def test_many_calls_at_once_get_each_their_own_answer(worker: Worker) -> None:
    sent = [worker.send([float(n), 1.0]) for n in range(6)]
    assert [result.get(timeout=PATIENCE_S) for result in sent] == [n * n + 1.0 for n in range(6)]


def test_an_error_in_the_body_reaches_the_producer_and_the_next_call_works(worker: Worker) -> None:
    assert "ValueError: could not convert string to float: 'seven'" in failure_of(worker.send(["seven"]))
    assert worker.send([7]).get(timeout=PATIENCE_S) == 49.0


def test_no_process_is_left_after_calls(worker: Worker) -> None:
    worker.send([1]).get(timeout=PATIENCE_S)
    family = psutil.Process(worker.process.pid).children(recursive=True)
    calls = [p for p in family if p.status() == psutil.STATUS_ZOMBIE or "compute" in str(p.cmdline())]
    spawned = [p for p in family if "spawn_main" in str(p.cmdline())]
    assert calls + spawned == []


def test_a_killed_child_is_an_error_that_names_the_signal(hung: Hung) -> None:
    result = hung.worker.send([1])
    child = hung.child()
    child.kill()
    assert "ended without an answer: killed by SIGKILL" in failure_of(result)
    assert not child.is_running()  # reaped


def test_a_child_that_hangs_is_killed_when_its_time_is_up(hung: Hung) -> None:
    result = hung.worker.send([1])
    child = hung.child()
    assert f"no answer within {HUNG_CALL_TIMEOUT_S} s: killed" in failure_of(result)
    assert not child.is_running()  # reaped


def test_a_child_does_not_outlive_the_process_that_started_it(hung: Hung) -> None:
    hung.worker.send([1])
    child = hung.child()
    os.kill(child.ppid(), signal.SIGKILL)
    wait_for(lambda: has_ended(child), "the child to end with its parent")
