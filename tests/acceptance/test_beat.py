"""Beat sends a GPU task like any other, from inside the worker (`-B`) and from a process of its own."""

import re
import sys

import pytest

from tests.support.services import Process, Worker, wait_for

APP = "tests.apps.periodic:app"
TIMES = 3


def runs(worker):
    """Task ids of the ticks that have run on an actor."""
    return re.findall(r"/GpuDriver-1\] Task periodic\.tick\[([^\]]+)\] succeeded in \S+s: 21", worker.output)


@pytest.mark.parametrize("embedded", [True, False])
def test_a_periodic_gpu_task_runs_again_and_again(environment, redis_server, tmp_path, embedded):
    schedule = f"--schedule={tmp_path / 'schedule'}"
    options = ["-B", schedule] if embedded else []
    worker = Worker(tmp_path, "-c", "1", *options, app=APP, env=environment)
    beat = None
    try:
        if not embedded:
            command = [sys.executable, "-m", "celery", "-A", APP, "beat", "-l", "INFO", schedule]
            beat = Process(command, tmp_path / "beat.log", env=environment)
        wait_for(lambda: len(runs(worker)) >= TIMES, f"{TIMES} runs in\n{worker.output[-3000:]}")
        assert len(set(runs(worker))) == len(runs(worker)), "each is a task of its own, and runs once"
        sender = beat or worker
        assert sender.output.count("Scheduler: Sending due task often (periodic.tick)") >= TIMES
        if beat:
            assert beat.stop() == 0
        assert worker.stop() == 0
    finally:
        for process in (worker, beat):
            if process is not None:
                process.kill_group()
        redis_server.client.delete("periodic")
