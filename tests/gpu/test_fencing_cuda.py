"""Fencing on a real GPU: the kernels are sick, so each successor's warm-up passes; leaks are counted by CuPy's pool."""

import pickle

import pytest

from actors.actor.breaker import BreakerRules
from actors.actor.entries import Limits
from actors.actor.shell import ActorShell
from actors.contract import Busy, Call, Config, Failed, FailureKind, Pending, Release, TaskCall
from tests.support.services import wait_for

APP = """
import os
import cupy
from celery import Celery

app = Celery("fencedapp")
kept = []

@app.task(name="c.well", gpu=True)
def well():
    return float(cupy.arange(10).sum())

@app.task(name="c.breaks", gpu=True)
def breaks():
    kernel = cupy.RawKernel("extern \\"C\\" __global__ void bad(float* p) { p[1ull << 40] = 1.0f; }", "bad")
    kernel((1,), (1,), (cupy.zeros(1, dtype="float32"),))

@app.task(name="c.leaks", gpu=True)
def leaks(mib):
    kept.append(cupy.zeros(mib << 20, dtype="uint8"))
    return os.getpid()
"""


@pytest.fixture
def shell(tmp_path):
    try:
        import cupy

        assert cupy.cuda.runtime.getDeviceCount() > 0
    except Exception as error:
        pytest.skip(f"no CUDA device here: {type(error).__name__}: {error}")
    (tmp_path / "fencedapp.py").write_text(APP)
    names = ("c.well", "c.breaks", "c.leaks")
    release = Release("gpu", "fencedapp:app", "", (str(tmp_path),), str(tmp_path), (), names, ())
    limits = Limits(65_536, 4096, 0.02, 600.0, 600.0, 5.0, breaker=BreakerRules(pauses_s=(0.5, 600.0)))
    shell = ActorShell(0, limits, on_abandoned=lambda: None)
    shell.hello("test", "", Config(release, "auto", "90%", 30, 65_536, "50%", "64MiB"))
    wait_for(lambda: health(shell).state == "ready", "the executor to be warm", 180)
    yield shell
    shell.close()
    shell._thread.join(30)


def health(shell):
    return shell.health("test", "gpu")


def run(shell, number, name, *args):
    """The outcome of one task, or Busy."""
    token = f"{number}.{health(shell).generation}"
    task = TaskCall(token, f"c.{name}", pickle.dumps((args, {}, {"id": token})), None, None)
    call = Call(f"{number} {name} {token}", "test", "gpu", (task,), 0.0)
    reply = shell.run(call)
    while not isinstance(reply, Busy):
        done = [answer for answer in reply.answers if not isinstance(answer, Pending)]
        if done:
            return done[0]
        reply = shell.collect(call, 1.0)
    return reply


def test_a_gpu_is_fenced_after_three_tasks_and_comes_back_by_itself(shell):
    for number in range(3):
        outcome = run(shell, number, "breaks")
        assert isinstance(outcome, Failed) and outcome.kind is FailureKind.CRASHED, outcome
    fenced = health(shell)
    assert fenced.state == "fenced" and "CUDARuntimeError" in fenced.reason, fenced
    assert isinstance(run(shell, 3, "well"), Busy)
    wait_for(lambda: health(shell).state == "ready", "the probe", 120)
    assert pickle.loads(run(shell, 4, "well").value) == 45.0
    print(f"reason: {fenced.reason}; successor warm in {health(shell).warm_s:.2f} s")


def test_one_poisonous_task_does_not_fence_it(shell):
    for _ in range(3):
        assert run(shell, 7, "breaks").kind is FailureKind.CRASHED
        wait_for(lambda: health(shell).state == "ready", "the successor", 120)
    assert pickle.loads(run(shell, 8, "well").value) == 45.0


def test_what_bodies_leave_on_the_device_is_counted_and_ends_their_executor(shell):
    pids = [pickle.loads(run(shell, number, "leaks", 40).value) for number in range(3)]
    assert pids[0] == pids[1] != pids[2], "64 MiB may stay"
    assert (health(shell).recycled, health(shell).crashes) == (1, 0)
