"""A real executor on a real GPU: warm-up, memory limit, out of memory, fatal errors, cold against warm."""

import pickle
import time

import pytest

from actors.contract import Call, Config, Failed, FailureKind, Pending, Release, Succeeded, TaskCall
from actors.entries import Limits
from actors.shell import ActorShell
from tests.support.services import wait_for

APP = """
import time
import cupy
from celery import Celery
from bridge import array_module, batched

app = Celery("gpuapp")

@app.task(name="g.sum", gpu=True)
def total(n):
    return float(array_module().arange(n, dtype="float64").sum())

@app.task(name="g.module", gpu=True)
def module():
    return array_module().__name__

@app.task(name="g.fill", gpu=True)
def fill(share):
    free, whole = cupy.cuda.runtime.memGetInfo()
    return int(cupy.zeros(int(whole * share), dtype="uint8").nbytes)

@app.task(name="g.out_of_bounds", gpu=True)
def out_of_bounds():
    kernel = cupy.RawKernel("extern \\"C\\" __global__ void bad(float* p) { p[1ull << 40] = 1.0f; }", "bad")
    kernel((1,), (1,), (cupy.zeros(1, dtype="float32"),))

@app.task(name="g.scalars", gpu=True)
def scalars():
    values = cupy.arange(4, dtype="float32")
    return {"scalar": values.sum(), "array": values, "nested": [values.max()]}

@app.task(name="g.squares", gpu=True)
@batched(max_size=64)
def squares(numbers: list[int]) -> list[int]:
    return [int(each) for each in (cupy.asarray(numbers) ** 2).get()]
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    try:
        import cupy

        assert cupy.cuda.runtime.getDeviceCount() > 0
    except Exception as error:
        pytest.skip(f"no CUDA device here: {type(error).__name__}: {error}")
    folder = tmp_path_factory.mktemp("gpuapp")
    (folder / "gpuapp.py").write_text(APP)
    names = tuple(f"g.{name}" for name in ("sum", "module", "fill", "out_of_bounds", "scalars", "squares"))
    release = Release("gpu", "gpuapp:app", "", (str(folder),), str(folder), (), names, ())
    shell = ActorShell(0, Limits(65_536, 4096, 0.02, 600.0, 600.0, 5.0), on_abandoned=lambda: None)
    shell.hello("test", "", Config(release, "cuda", "90%", 30, 65_536, "50%"))
    wait_for(lambda: shell.health("test", "gpu").state == "ready", "the executor to be warm", 180)
    yield shell
    shell.close()


def run(shell, *tasks):
    """Outcomes of tasks sent in one call: (name, args) each."""
    stamp = time.monotonic_ns()
    calls = tuple(
        TaskCall(f"{stamp}.{n}", f"g.{name}", pickle.dumps((args, {}, {"id": f"{stamp}.{n}"})), None, None)
        for n, (name, args) in enumerate(tasks)
    )
    call = Call(str(stamp), "test", "gpu", calls, 0.0)
    reply, found = shell.run(call), {}
    while True:
        found |= {answer.token: answer for answer in reply.answers if not isinstance(answer, Pending)}
        if len(found) == len(calls):
            return [found[task.token] for task in calls]
        reply = shell.collect(call, 1.0)


def value(outcome):
    assert isinstance(outcome, Succeeded), outcome
    return pickle.loads(outcome.value)


def test_bodies_run_on_cupy(shell):
    module, total, scalars = run(shell, ("module", ()), ("sum", (1000,)), ("scalars", ()))
    assert value(module) == "cupy"
    assert value(total) == 499_500.0
    assert value(scalars) == {"scalar": 6.0, "array": [0.0, 1.0, 2.0, 3.0], "nested": [3.0]}


def test_health_names_the_gpu_and_its_memory(shell):
    health = shell.health("test", "gpu")
    assert health.device["kind"] == "cuda" and health.device["memory_bytes"] > 0
    run(shell, ("sum", (10,)))
    assert 0 < shell.health("test", "gpu").memory_used_bytes < health.device["memory_bytes"]


def test_the_first_task_after_warm_up_is_not_cold(shell):
    outcomes = [run(shell, ("sum", (1000,)))[0] for _ in range(20)]
    times = [outcome.run_s for outcome in outcomes]
    print(f"warm kernel: first {times[0] * 1e3:.3f} ms, median {sorted(times)[10] * 1e3:.3f} ms")
    assert all(isinstance(outcome, Succeeded) for outcome in outcomes)


def test_a_batch_is_one_run(shell):
    outcomes = run(shell, *[("squares", (n,)) for n in range(64)])
    assert [value(outcome) for outcome in outcomes] == [n * n for n in range(64)]
    assert {outcome.batch for outcome in outcomes} == {64}


def test_more_memory_than_the_limit_fails_that_task_alone_and_keeps_the_executor(shell):
    before = shell.health("test", "gpu").executor_pid
    first, too_much, after = run(shell, ("sum", (10,)), ("fill", (0.95,)), ("sum", (10,)))
    assert value(first) == value(after) == 45.0
    assert isinstance(too_much, Failed) and too_much.kind is FailureKind.OUT_OF_MEMORY
    assert "Out of memory" in too_much.message
    assert shell.health("test", "gpu").executor_pid == before


def test_memory_is_given_back_so_that_the_next_large_task_fits(shell):
    for _ in range(3):
        assert value(run(shell, ("fill", (0.5,)))[0]) > 0


def test_a_fatal_error_costs_one_task_and_a_warm_successor_follows(shell):
    before = shell.health("test", "gpu")
    first, fatal, after = run(shell, ("sum", (10,)), ("out_of_bounds", ()), ("sum", (10,)))
    assert value(first) == value(after) == 45.0, "neighbours before and after are untouched"
    assert isinstance(fatal, Failed) and fatal.kind is FailureKind.CRASHED
    assert fatal.message.startswith("its CUDA context broke: ")
    health = shell.health("test", "gpu")
    assert health.executor_pid != before.executor_pid and health.crashes == before.crashes + 1
    print(f"successor warm in {health.warm_s:.2f} s")
