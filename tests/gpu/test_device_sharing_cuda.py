"""What tasks share on a real GPU: pinned copies, bytes of residents, admission, and bodies at once on streams."""

import gc
import pickle
import time

import numpy
import pytest

from actors.actor.entries import Limits
from actors.actor.shell import ActorShell
from actors.contract import Call, Config, Failed, FailureKind, Pending, Release, Succeeded, TaskCall
from actors.executor import device, pinned, residents
from actors.executor.device import open_device, to_device, to_host
from actors.executor.residents import Residents, resident
from tests.support.services import wait_for

MIB = 1 << 20

APP = """
import cupy
from celery import Celery
from bridge import Gpu, resident, to_device, to_host

app = Celery("sharingapp")

@resident
def model(name):
    return cupy.zeros(256 << 20, dtype="uint8")

# Waits for a flag that only a kernel launched later sets; gives up, so that a failing test ends.
WAIT = cupy.RawKernel('''extern "C" __global__ void wait_for(volatile int* flag, int* seen) {
    long long begun = clock64();
    while (*flag == 0 && clock64() - begun < 10000000000LL) { }
    *seen = *flag;
}''', "wait_for")
SET = cupy.RawKernel('''extern "C" __global__ void set(volatile int* flag, int* seen) {
    *flag = 1; *seen = 1;
}''', "set")

@resident
def flags():
    flags, seen = cupy.zeros(16, dtype="int32"), cupy.zeros(1, dtype="int32")
    for kernel in (SET, WAIT):  # loaded now: loading one may wait for those that run
        kernel((1,), (1,), (flags[15:], seen))
    return flags

@app.task(name="g.meet", gpu=Gpu(streams=2))
def meet(what, number):
    flag, seen = flags()[number:], cupy.zeros(1, dtype="int32")
    (WAIT if what == "wait" else SET)((1,), (1,), (flag, seen))
    return seen

@app.task(name="g.double", gpu=Gpu(streams=4))
def double(size, number):
    import numpy
    values = to_device(numpy.full(size, number, dtype="float32"))
    return [float(each) for each in to_host(values * 2)[[0, size // 2, -1]]]

@app.task(name="g.out_of_bounds", gpu=Gpu(streams=4))
def out_of_bounds(is_bad):
    kernel = cupy.RawKernel("extern \\"C\\" __global__ void bad(float* p) { p[1ull << 40] = 1.0f; }", "bad")
    if is_bad:
        kernel((1,), (1,), (cupy.zeros(1, dtype="float32"),))

@app.task(name="g.use", gpu=True)
def use(name):
    return int(model(name).nbytes)

@app.task(name="g.most", gpu=Gpu(memory="1TiB"))
def most():
    return "started"

@app.task(name="g.fail", gpu=True)
def fail():
    held = cupy.zeros(256 << 20, dtype="uint8")
    raise KeyError(str(held.nbytes))

@app.task(name="g.used", gpu=True)
def used():
    return int(cupy.get_default_memory_pool().used_bytes())
"""


@pytest.fixture(scope="module", autouse=True)
def gpu():
    """The GPU in this process, for what needs no executor."""
    try:
        import cupy

        assert cupy.cuda.runtime.getDeviceCount() > 0
    except Exception as error:
        pytest.skip(f"no CUDA device here: {type(error).__name__}: {error}")
    before = device._current
    yield open_device("cuda", "90%")
    device._current = before


# ---- copies


@pytest.mark.parametrize("size", [MIB - 1, MIB, pinned.SLAB_BYTES - 1, pinned.SLAB_BYTES + 1, 300 * MIB + 5])
@pytest.mark.parametrize("on_stream", [False, True])
def test_what_goes_to_the_device_comes_back(gpu, size, on_stream):
    values = numpy.random.default_rng(size).integers(0, 255, size, dtype="uint8")
    stream = gpu.streams(1)[0]
    if on_stream:
        stream.__enter__()
    try:
        there = to_device(values)
        assert type(there).__module__.startswith("cupy")
        assert numpy.array_equal(to_host(there + 1), values + 1)
        assert numpy.array_equal(to_host(there), values)
    finally:
        if on_stream:
            stream.__exit__(None, None, None)


@pytest.mark.parametrize("dtype", ["bool", "int16", "float16", "float64", "complex128"])
def test_shapes_types_and_layouts_are_kept(dtype):
    values = (numpy.arange(2_000_000) % 2).astype(dtype).reshape(100, 200, 100)
    for each in (values, values.transpose(2, 0, 1), values[::2, ::-1]):
        back = to_host(to_device(each))
        assert back.dtype == each.dtype and numpy.array_equal(back, each)
        assert numpy.array_equal(to_host(to_device(values).transpose(2, 0, 1)), values.transpose(2, 0, 1))


def test_the_source_may_change_at_once():
    for _ in range(20):
        values = numpy.ones(40 * MIB, "uint8")
        there = to_device(values)
        values[:] = 7
        assert int(there.min()) == int(there.max()) == 1


def test_pinned_memory_is_bounded(gpu):
    for _ in range(10):
        to_host(to_device(numpy.ones(200 * MIB, "uint8")))
    assert gpu._copies._made <= pinned.SLABS


# ---- residents and memory


@pytest.fixture
def shared(monkeypatch):
    monkeypatch.setattr(residents, "_registry", [])
    monkeypatch.setattr(residents, "shared", Residents())
    return residents.shared


def test_bytes_of_a_resident_are_what_it_takes_of_the_pool(gpu, shared):
    class Hidden:
        __slots__ = ("array",)

    @resident
    def model():
        hidden = Hidden()
        hidden.array = gpu.xp.zeros(100 * MIB, dtype="uint8")
        return hidden

    model()
    (size,) = shared.sizes().values()
    assert 100 * MIB <= size < 102 * MIB


def test_what_goes_gives_its_memory_back(gpu, shared):
    @resident
    def model(number):
        return gpu.xp.zeros(512 * MIB, dtype="uint8")

    gc.collect()
    gpu.free()
    before = gpu.memory(0).free
    model(1)
    assert gpu.memory(0).free <= before - 500 * MIB
    shared.limit_bytes = 600 * MIB
    model(2)
    assert len(shared.sizes()) == 1
    assert gpu.memory(0).used <= gpu.memory(0).total
    shared.evict(())
    assert gpu.memory(0).free >= before - 16 * MIB


def test_unused_memory_of_the_pool_counts_as_free(gpu):
    gpu.free()
    before = gpu.memory(0).free
    del_me = gpu.xp.zeros(512 * MIB, dtype="uint8")
    held = gpu.memory(0).free
    del del_me
    assert held <= before - 500 * MIB
    assert gpu.memory(0).free >= before - 16 * MIB


# ---- with an executor


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharingapp")
    (folder / "sharingapp.py").write_text(APP)
    names = tuple(f"g.{name}" for name in ("meet", "double", "out_of_bounds", "use", "most", "fail", "used"))
    release = Release("gpu", "sharingapp:app", "", (str(folder),), str(folder), (), names, ())
    shell = ActorShell(0, Limits(65_536, 4096, 0.02, 600.0, 600.0, 5.0), on_abandoned=lambda: None)
    shell.hello("test", "", Config(release, "cuda", "90%", 30, 65_536, "600MiB"))
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


def test_bodies_on_streams_are_on_the_device_at_once(shell):
    """The first one's kernel ends only when the second one's has run."""
    run(shell, ("meet", ("set", 1)), ("meet", ("set", 1)))  # both streams have memory now: to get some may wait, too
    assert [value(each) for each in run(shell, ("meet", ("wait", 0)), ("meet", ("set", 0)))] == [[1], [1]]


def test_values_of_bodies_on_streams_are_their_own(shell):
    outcomes = run(shell, *[("double", (5_000_000, number)) for number in range(12)])
    assert [value(each) for each in outcomes] == [[2.0 * number] * 3 for number in range(12)]


def test_a_fatal_error_on_a_stream_ends_the_executor_and_makes_suspects(shell):
    before = shell.health("test", "gpu").executor_pid
    outcomes = run(shell, ("out_of_bounds", (False,)), ("out_of_bounds", (True,)), ("out_of_bounds", (False,)))
    first, *others = outcomes  # the first may have ended on its stream before the second's kernel went wrong
    assert isinstance(first, Succeeded) or first.kind is FailureKind.SUSPECT
    assert [each.kind for each in others] == [FailureKind.SUSPECT] * 2
    assert others[0].message.startswith("its CUDA context broke: ")
    wait_for(lambda: shell.health("test", "gpu").state == "ready", "the successor", 180)
    assert shell.health("test", "gpu").executor_pid != before


def test_residents_are_told_and_go_within_the_budget(shell):
    run(shell, ("use", ("a",)), ("use", ("b",)))
    wait_for(lambda: len(shell.health("test", "gpu").residents) == 3, "news of the residents")
    health = shell.health("test", "gpu")
    assert health.residents["sharingapp.model('a')"] >= 256 * MIB
    assert "g.use" in health.warm_for
    run(shell, ("use", ("c",)))
    wait_for(lambda: "sharingapp.model('c')" in shell.health("test", "gpu").residents, "news of the eviction")
    assert "sharingapp.model('a')" not in shell.health("test", "gpu").residents


def test_a_body_starts_only_when_so_much_is_free(shell):
    (refused,) = run(shell, ("most", ()))
    assert isinstance(refused, Failed) and refused.kind is FailureKind.NO_ROOM
    assert refused.message.startswith("needs 1.0 TiB, ")
    assert 0 < shell.health("test", "gpu").memory_free_bytes < shell.health("test", "gpu").memory_total_bytes


def test_a_body_that_fails_leaves_no_array_behind(shell):
    before, failed, after = run(shell, ("used", ()), ("fail", ()), ("used", ()))
    assert isinstance(failed, Failed) and "268435456" in failed.message
    assert value(after) <= value(before) + MIB
