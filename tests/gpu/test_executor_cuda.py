"""A real executor on a real GPU: warm-up, memory limit, out of memory, fatal errors, cold against warm."""

import pickle
import time

import pytest

from actors.actor.entries import Limits
from actors.actor.shell import ActorShell
from actors.contract import Call, Config, Failed, FailureKind, Pending, Release, Succeeded, TaskCall
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

FATAL = {
    "trap": "asm(\\"trap;\\");",
    "misaligned": "*(volatile int*)((char*)p + 1) = 1;",
    "null": "*(volatile float*)nullptr = 1.0f;",
}

@app.task(name="g.breaks", gpu=True)
def breaks(how):
    kernel = cupy.RawKernel('extern "C" __global__ void bad(float* p) { ' + FATAL[how] + " }", "bad")
    kernel((1,), (1,), (cupy.zeros(4, dtype="float32"),))

@app.task(name="g.spins", gpu=True)
def spins(path):
    kernel = cupy.RawKernel(
        'extern "C" __global__ void spin(volatile float* p) { while (p[0] == 0.0f); }', "spin"
    )
    kernel((1,), (1,), (cupy.zeros(1, dtype="float32"),))
    open(path, "w").close()
    cupy.cuda.get_current_stream().synchronize()

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
    tasks = ("sum", "module", "fill", "out_of_bounds", "scalars", "squares", "breaks", "spins")
    names = tuple(f"g.{name}" for name in tasks)
    release = Release("gpu", "gpuapp:app", "", (str(folder),), str(folder), (), names, ())
    shell = ActorShell(0, Limits(65_536, 4096, 0.02, 600.0, 600.0, 5.0), on_abandoned=lambda: None)
    shell.hello("test", "", Config(release, "cuda", "90%", 30, 65_536, "50%"))
    wait_for(lambda: shell.health("test", "gpu").state == "ready", "the executor to be warm", 180)
    yield shell
    shell.close()


def call_of(*tasks, hard_limit_s=None):
    """One call of tasks, (name, args) each."""
    stamp = time.monotonic_ns()
    calls = tuple(
        TaskCall(f"{stamp}.{n}", f"g.{name}", pickle.dumps((args, {}, {"id": f"{stamp}.{n}"})), None, hard_limit_s)
        for n, (name, args) in enumerate(tasks)
    )
    return Call(str(stamp), "test", "gpu", calls, 0.0)


def outcomes_of(shell, call, reply):
    """Wait for all outcomes of a call, in order."""
    found = {}
    while True:
        found |= {answer.token: answer for answer in reply.answers if not isinstance(answer, Pending)}
        if len(found) == len(call.tasks):
            return [found[task.token] for task in call.tasks]
        reply = shell.collect(call, 1.0)


def run(shell, *tasks, **limits):
    """Outcomes of tasks sent in one call: (name, args) each."""
    call = call_of(*tasks, **limits)
    return outcomes_of(shell, call, shell.run(call))


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


@pytest.mark.parametrize("how", ["trap", "misaligned", "null"])
def test_every_way_a_kernel_can_break_the_context_is_told_from_an_error(shell, how):
    before = shell.health("test", "gpu")
    first, fatal, after = run(shell, ("sum", (10,)), ("breaks", (how,)), ("sum", (10,)))
    assert value(first) == value(after) == 45.0
    assert isinstance(fatal, Failed) and fatal.kind is FailureKind.CRASHED, fatal
    assert fatal.message.startswith("its CUDA context broke: "), fatal
    assert shell.health("test", "gpu").executor_pid != before.executor_pid


def test_a_kernel_that_never_ends_is_ended_by_the_hard_limit_and_the_gpu_is_free_again(shell, tmp_path):
    used = run(shell, ("sum", (10,))) and shell.health("test", "gpu").memory_used_bytes
    hung, after = run(shell, ("spins", (str(tmp_path / "a"),)), ("sum", (10,)), hard_limit_s=2.0)
    assert isinstance(hung, Failed) and hung.kind is FailureKind.HARD_LIMIT
    assert value(after) == 45.0

    def is_free():
        run(shell, ("sum", (10,)))  # memory is told of after calls, from time to time
        return shell.health("test", "gpu").memory_used_bytes <= 1.2 * used

    wait_for(is_free, "the dead executor's memory", 30)


def test_a_kernel_that_never_ends_is_ended_by_cancellation_after_the_grace_time(shell, tmp_path):
    call = call_of(("spins", (str(tmp_path / "b"),)), ("sum", (10,)))
    reply = shell.run(call)
    wait_for((tmp_path / "b").exists, "the kernel to be launched", 60)
    shell.cancel(call.id, [call.tasks[0].token])
    hung, after = outcomes_of(shell, call, reply)
    assert isinstance(hung, Failed) and hung.kind is FailureKind.CANCELLED
    assert value(after) == 45.0
