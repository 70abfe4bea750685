"""A bad GPU is fenced and a sick kernel is not, with real executors.

The device's faults are injected by tests/support/sick.py. At the end: deploys, as far as one actor decides them.
"""

import time
from pathlib import Path

import psutil
import pytest

from actors.actor import children
from actors.actor.breaker import BreakerRules
from actors.contract import ActorState, Busy, FailureKind
from tests.integration import test_executor as executors
from tests.integration.test_executor import LIMITS, exists, kinds, make_config, open_gate, value
from tests.support.services import wait_for

APP = """
import os, time
from celery import Celery
from bridge import resident
from tests.support import sick

SICK, HANGS, ONE = {sick!r}, {hangs!r}, {one!r}
sick.sick_while(HANGS, hangs=True)
if os.path.exists(SICK):
    sick.sick_while(SICK)
app = Celery("{module}", broker="memory://")

@resident
def model():
    '''Of a device whose memory has room for one executor's.'''
    if os.path.exists(ONE):
        holder = int(open(ONE).read() or 0)
        if holder != os.getpid() and os.path.exists(f"/proc/{{holder}}"):
            raise MemoryError("no room for the model")
        open(ONE, "w").write(str(os.getpid()))

@app.task(name="f.echo")
def echo(value): return value

@app.task(name="f.release")
def release(): return "{module}"

@app.task(name="f.breaks")
def breaks(faulty=False, leaves=""):
    if leaves:
        open(leaves, "w").close()
    sick.break_device(faulty)

@app.task(name="f.breaks_too")
def breaks_too(): sick.break_device()

@app.task(name="f.holds")
def holds(started, gate):
    open(started, "w").close()
    deadline = time.monotonic() + 60
    while not os.path.exists(gate) and time.monotonic() < deadline:
        time.sleep(0.002)
"""

RULES = BreakerRules(faults=3, window_s=600.0, good_tasks=100, pauses_s=(0.3, 600.0))
FOR_EVER = RULES._replace(pauses_s=(600.0,))
TASKS = ["f.echo", "f.release", "f.breaks", "f.breaks_too", "f.holds"]


@pytest.fixture
def new_driver():
    """Make an actor of its own; ended after the test."""
    made = []

    def make(**limits):
        made.append(executors.Driver(LIMITS._replace(**limits)))
        return made[-1]

    yield make
    for driver in made:
        driver.end()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "notes")


@pytest.fixture
def gate(tmp_path):
    return str(tmp_path / "gate")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "BACKOFF_S", (0.05, 0.2))
    return tmp_path


def release(folder, name="fenced"):
    """The app as one release; files in `folder` say how its device is."""
    files = {what: str(folder / what) for what in ("sick", "hangs", "one")}
    (folder / f"{name}.py").write_text(APP.format(module=name, **files))
    return make_config(folder, name, module=name, tasks=TASKS)


def task(number, name, *args):
    """The `number`-th task of a driver, in whatever execution of it."""
    made = executors.task(f"f.{name}", *args)
    return made._replace(token=f"{number}.{made.token.rpartition('-')[2]}")


def breaks(driver, *numbers, name="breaks"):
    """Let these tasks break the device, one executor each."""
    for number in numbers:
        (outcome,) = driver.outcomes(task(number, name))
        assert outcome.kind is FailureKind.CRASHED, outcome
        assert outcome.message == "its CUDA context broke: RuntimeError: an illegal memory access was encountered"


def is_fenced(driver):
    return driver.health.state is ActorState.FENCED


def test_a_gpu_that_breaks_under_different_tasks_is_fenced(folder, new_driver):
    driver = new_driver(breaker=FOR_EVER).hello(release(folder))
    breaks(driver, 1, 2)
    assert not is_fenced(driver)
    breaks(driver, 3)
    health = driver.health
    assert health.state is ActorState.FENCED and health.device_faults == 3 and 590 < health.probe_in_s <= 600
    assert health.reason == (
        "3 faults of the device, the last: its CUDA context broke: RuntimeError: "
        "an illegal memory access was encountered, while f.breaks ran"
    )
    refused = driver.send(task(4, "echo", 1)).reply
    assert isinstance(refused, Busy) and refused.reason == f"fenced: {health.reason}", "nothing of the call is taken"
    wait_for(lambda: driver.health.executor_pid == 0, "the end of the last executor")
    assert driver.health.generation == 3, "no executor is started any more"


def test_what_waits_for_a_fenced_gpu_goes_back_uncharged(folder, new_driver, path, gate):
    driver = new_driver(breaker=FOR_EVER._replace(faults=1)).hello(release(folder))
    held = driver.send(task(1, "holds", path, gate), task(2, "breaks"), task(3, "echo", 3))
    wait_for(exists(path), "the first body")
    waiting = driver.send(task(4, "echo", 4))
    open_gate(gate)
    assert kinds(held.outcomes()) == ["succeeded", FailureKind.CRASHED, FailureKind.LOST]
    assert kinds(waiting.outcomes()) == [FailureKind.LOST]
    assert "fenced" in waiting.outcomes()[0].message


def test_a_poisonous_task_does_not_fence_a_healthy_gpu(folder, new_driver):
    driver = new_driver(breaker=FOR_EVER).hello(release(folder))
    breaks(driver, 1, 1, 1, 1)
    assert driver.values(task(2, "echo", "well")) == ["well"]
    assert not is_fenced(driver) and driver.health.device_faults == 4


def test_a_sick_kernel_does_not_fence_a_healthy_gpu_while_others_run_well(folder, new_driver):
    driver = new_driver(breaker=FOR_EVER).hello(release(folder))
    for number in range(4):
        breaks(driver, number)
        assert driver.values(task(10, "echo", number)) == [number]
    assert not is_fenced(driver)


def test_a_successor_whose_test_fails_tells_a_sick_gpu(folder, new_driver):
    driver = new_driver(breaker=FOR_EVER).hello(release(folder))
    (outcome,) = driver.outcomes(task(1, "breaks", False, str(folder / "sick")))
    assert outcome.kind is FailureKind.CRASHED
    wait_for(lambda: is_fenced(driver), "the fence")
    health = driver.health
    assert health.device_faults == 3, "one task, and two warm-ups"
    assert "DeviceUnusable: a first kernel failed" in health.reason


def test_hardware_that_says_it_is_faulty_is_fenced_at_once(folder, new_driver):
    driver = new_driver(breaker=FOR_EVER).hello(release(folder))
    assert kinds(driver.outcomes(task(1, "breaks", True))) == [FailureKind.CRASHED]
    assert is_fenced(driver)


def test_a_fenced_gpu_is_probed_and_comes_back(folder, new_driver):
    driver = new_driver(breaker=RULES).hello(release(folder))
    breaks(driver, 1, 2, 3)
    assert is_fenced(driver)
    wait_for(lambda: driver.health.state is ActorState.READY, "the probe")
    assert driver.health.probe_in_s is None
    assert driver.values(task(4, "echo", "well")) == ["well"]
    breaks(driver, 5, name="breaks_too")
    assert is_fenced(driver) and driver.health.probe_in_s > 590, "one more is enough, and the pause has grown"


def test_a_probe_that_fails_keeps_the_fence(folder, new_driver):
    driver = new_driver(breaker=RULES).hello(release(folder))
    (folder / "sick").touch()
    breaks(driver, 1)
    wait_for(lambda: driver.health.device_faults == 4, "the probe to fail")
    assert is_fenced(driver) and driver.health.probe_in_s > 590


def test_a_device_that_hangs_when_it_is_touched_is_fenced(folder, new_driver, monkeypatch):
    monkeypatch.setattr(children, "WARM_DEVICE_S", 0.2)
    (folder / "hangs").touch()
    driver = new_driver(breaker=FOR_EVER).hello(release(folder), ready=False)
    wait_for(lambda: is_fenced(driver), "the fence")
    assert "the device was not warm after 0.2 s" in driver.health.reason


def test_a_new_worker_has_a_gpu_tried_at_once_that_never_started(folder, new_driver):
    (folder / "sick").touch()
    driver = new_driver(breaker=FOR_EVER).hello(release(folder), ready=False)
    wait_for(lambda: is_fenced(driver), "the fence")
    (folder / "sick").unlink()
    driver.shell.hello("another", "", driver.config)
    wait_for(lambda: driver.health.state is ActorState.READY, "the executor")


def test_an_app_that_does_not_start_fences_nothing(folder, new_driver):
    config = release(folder)
    (folder / "fenced.py").write_text("raise RuntimeError('the licence server is away')")
    driver = new_driver(breaker=FOR_EVER).hello(config, ready=False)
    wait_for(lambda: driver.health.failed_starts > 3, "some attempts")
    assert driver.health.state is ActorState.FAILING and driver.health.device_faults == 0


def test_a_fenced_actor_keeps_its_gpu(folder, new_driver):
    driver = new_driver(breaker=FOR_EVER._replace(faults=1), keep_idle_s=0.1).hello(release(folder))
    breaks(driver, 1)
    started = time.monotonic()
    wait_for(lambda: time.monotonic() - started > 1.5, "twice the supervisor's slowest look")
    assert is_fenced(driver) and not driver.abandoned.is_set()
    driver.shell.drain()
    wait_for(lambda: driver.health and driver.abandoned.is_set(), "the end it is told to take")


# ---- deploys


def test_where_memory_has_no_room_for_two_the_old_executor_ends_first(folder, new_driver):
    (folder / "one").touch()
    driver = new_driver(breaker=FOR_EVER).hello(release(folder, "old"))
    old = driver.executor
    driver.shell.hello("second", "", release(folder, "new"))
    wait_for(lambda: driver.shell.health("second", "new").state is ActorState.READY, "the new executor")
    assert not psutil.pid_exists(old) and driver.health.device_faults == 0, "a full device is not a sick one"
    assert driver.health.state is ActorState.READY, "the old release starts again when it is called"
    assert driver.values(task(1, "release")) == ["old"]
    newer = driver.send(task(2, "release"), release="new", driver_id="second")
    assert value(newer.outcomes()[0]) == "new"


def test_the_old_executor_works_until_the_new_one_is_warm(folder, new_driver, path, gate):
    """The new release fails to start: the old one goes on, whatever that takes."""
    driver = new_driver(breaker=FOR_EVER).hello(release(folder, "old"))
    old = driver.executor
    broken = release(folder, "new")
    text = Path(folder, "new.py").read_text()
    (folder / "new.py").write_text(f"import os\nif not os.path.exists({gate!r}): raise RuntimeError('a typo')\n{text}")
    driver.shell.hello("second", "", broken)
    wait_for(lambda: driver.shell.health("second", "new").failed_starts > 3, "some attempts")
    assert driver.values(task(1, "release")) == ["old"] and driver.executor == old
    open_gate(gate)
    wait_for(lambda: driver.shell.health("second", "new").state is ActorState.READY, "the new executor")
    assert driver.values(task(2, "release")) == ["old"] and driver.executor == old
