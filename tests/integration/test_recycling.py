"""What bodies leave behind: device memory, a changed directory, a changed environment. With real executors.

NumPy's device counts nothing, so the app counts for it what it keeps in a global.
"""

import os
from pathlib import Path

import pytest

from actors.contract import ActorState, FailureKind
from tests.integration import test_executor as executors
from tests.integration.test_executor import make_config, value
from tests.support.services import wait_for

APP = """
import gc
import os
import numpy
from celery import Celery
from actors.executor.device import CpuDevice
from bridge import resident

KIB = 1024
kept, models = [], []
CpuDevice.pooled_bytes = lambda self: sum(each.nbytes for each in kept + models)
app = Celery("leaky", broker="memory://")

@resident
def model(number):
    models.append(numpy.zeros(50 * KIB, "uint8"))
    return models[-1]

@resident
def cyclic():
    made = []
    made.append(made)
    return made

@app.task(name="l.looks_for_garbage")
def looks_for_garbage():
    return gc.get_freeze_count(), any(each is cyclic() for each in gc.get_objects())

@app.task(name="l.leaks")
def leaks(kib):
    kept.append(numpy.zeros(kib * KIB, "uint8"))
    return os.getpid()

class Cycle:
    def __init__(self, kib):
        self.array, self.me = numpy.zeros(kib * KIB, "uint8"), self
        kept.append(self.array)

    def __del__(self):
        kept.pop()

@app.task(name="l.cycles")
def cycles(kib):
    Cycle(kib)
    return os.getpid()

@app.task(name="l.loads")
def loads(number):
    model(number)
    return os.getpid()

@app.task(name="l.where")
def where(): return os.getcwd(), os.environ.get("HOME"), os.environ.get("LEFT_BEHIND")

@app.task(name="l.roams")
def roams(folder):
    os.chdir(folder)
    os.environ["LEFT_BEHIND"] = "x"
    del os.environ["HOME"]
    return os.getcwd()

@app.task(name="l.no_memory")
def no_memory(): raise MemoryError("no room for 5 arrays")
"""
TASKS = ["l.looks_for_garbage", "l.leaks", "l.cycles", "l.loads", "l.where", "l.roams", "l.no_memory"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = tmp_path_factory.mktemp("leaky")
    (folder / "leaky.py").write_text(APP)
    limits = {"memory_limit": "200KiB", "resident_limit": "60%", "left_limit": "25%"}
    driver = executors.Driver().hello(make_config(folder, "leaky", module="leaky", tasks=TASKS, **limits))
    yield driver
    driver.end()


def task(name, *args):
    return executors.task(f"l.{name}", *args)


def test_an_executor_whose_bodies_leave_too_much_behind_is_replaced(driver, capfd):
    before, recycled = driver.executor, driver.health.recycled
    assert driver.values(task("loads", 1), task("leaks", 20), task("leaks", 20)) == [before] * 3
    assert driver.values(task("where"), task("loads", 1))[1] == before, "40 of 50 KiB, and a resident is no leak"
    assert driver.values(task("leaks", 20), task("leaks", 1)) == [before] * 2, "what is in its call is finished"
    (after,) = driver.values(task("leaks", 1))
    assert after != before
    health = driver.health
    assert (health.recycled, health.crashes) == (recycled + 1, 0), "planned: nobody is charged"
    said = capfd.readouterr().out
    assert f"its bodies have left {61 << 10} bytes behind on the device, l.leaks {61 << 10} of them" in said


def test_garbage_in_cycles_is_no_leak(driver):
    wait_for(lambda: driver.health.state is ActorState.READY, "the executor")
    before = driver.executor
    assert driver.values(task("cycles", 100)) == [before]
    assert driver.values(task("cycles", 100)) == [before]


def test_garbage_is_not_looked_for_in_modules_but_in_residents(driver):
    """All modules at once take a tenth of a second, in the middle of a body; a resident may be evicted one day."""
    frozen, looks_at_residents = driver.value("l.looks_for_garbage")
    assert frozen > 10_000 and looks_at_residents


def test_calls_that_come_meanwhile_wait_for_the_successor(driver):
    wait_for(lambda: driver.health.state is ActorState.READY, "the executor")
    first = driver.send(task("leaks", 60))
    others = [driver.send(task("leaks", 1)) for _ in range(3)]
    old, later = value(first.outcomes()[0]), {value(each.outcomes()[0]) for each in others}
    assert len(later) == 1 and later != {old}


def test_the_next_body_finds_the_old_directory_and_environment(driver, tmp_path):
    before = driver.values(task("where"))
    moved, after = driver.values(task("roams", str(tmp_path)), task("where"))
    assert moved == str(tmp_path)
    assert before == [after] and after == (str(Path(driver.config.release.workdir)), os.environ["HOME"], None)


def test_out_of_memory_says_how_full_the_device_is(driver):
    (failed,) = driver.outcomes(task("no_memory"))
    assert failed.kind is FailureKind.OUT_OF_MEMORY
    full = "0 B of the device's 200.0 KiB are in use now, 0 B by residents"
    assert failed.message == f"no room for 5 arrays; {full}"
