"""The app of the acceptance tests: a user's app, with every kind of body the tests need. Effects go to files."""

import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy
from celery import Task
from celery.exceptions import SoftTimeLimitExceeded
from pydantic import BaseModel

from bridge import Gpu, array_module, batched, resident
from tests.apps.base import App

app = App("shop")
app.conf.update(
    task_acks_late=True,
    broker_connection_retry_on_startup=True,
    worker_send_task_events=True,
    task_send_sent_event=True,
    visibility_timeout=3600,
    worker_soft_shutdown_timeout=float(os.environ.get("SHOP_SOFT_SHUTDOWN_S", 0)),
    result_backend_transport_options=json.loads(os.environ.get("SHOP_RESULT_OPTIONS", "{}")),
)


def note(path, text):
    with open(path, "a") as file:
        file.write(f"{text}\n")


class Point(BaseModel):
    x: float
    y: float


class ShopError(Exception):
    """An application's own exception."""

    def __init__(self, code, reason):
        super().__init__(code, reason)
        self.code = code


class Unpicklable(Exception):
    def __init__(self, one, *, two):
        super().__init__(one)
        self.lock = threading.Lock()


def local_error():
    """An exception whose class no other process can find."""

    class Local(Exception):
        pass

    return Local("here only")


class InContext(Task):
    """The Flask pattern: a context around every body."""

    context = None

    def __call__(self, *args, **kwargs):
        InContext.context = f"context of {os.getpid()}"
        try:
            return super().__call__(*args, **kwargs)
        finally:
            InContext.context = None


@app.task(name="shop.where")
def where():
    return os.getpid()


@app.task(name="shop.double")
def double(value):
    return value * 2


@app.task(name="shop.add", gpu=True)
def add(a: int, b: int = 10) -> int:
    return a + b


@app.task(name="shop.echo", gpu=True)
def echo(*args, **kwargs):
    return [list(args), kwargs]


@app.task(name="shop.who", gpu=True, bind=True)
def who(self, *args):
    request = self.request
    return {
        "id": request.id, "task": request.task, "retries": request.retries, "args": list(request.args),
        "root_id": request.root_id, "parent_id": request.parent_id, "hostname": request.hostname,
        "called_directly": request.called_directly, "delivery_info": request.delivery_info, "pid": os.getpid(),
        "headers": request.headers, "name": self.name, "is_eager": request.is_eager,
    }  # fmt: skip


@app.task(name="shop.in_context", gpu=True, base=InContext, bind=True)
def in_context(self):
    return [InContext.context, f"context of {os.getpid()}", self.request.id]


@app.task(name="shop.mirror", gpu=True, pydantic=True)
def mirror(point: Point) -> Point:
    assert isinstance(point, Point)
    return Point(x=-point.x, y=-point.y)


@app.task(name="shop.length", gpu=True)
def length(point: Point, scale: float = 1.0) -> float:
    assert isinstance(point, Point)
    return scale * (point.x**2 + point.y**2) ** 0.5


@app.task(name="shop.model", gpu=True)
def model() -> Point:
    return Point(x=1.0, y=2.0)


@app.task(name="shop.arrays", gpu=True)
def arrays():
    xp = array_module()
    matrix = xp.arange(4, dtype="float32").reshape(2, 2)
    return {"scalar": xp.float64(0.5), "int": xp.int32(7), "array": matrix, "nested": [matrix.sum(), (matrix.max(),)]}


@app.task(name="shop.fails", gpu=True)
def fails(code):
    raise ShopError(code, "because")


@app.task(name="shop.fails_unpicklable", gpu=True)
def fails_unpicklable():
    raise Unpicklable("odd", two=2)


@app.task(name="shop.fails_locally", gpu=True)
def fails_locally():
    raise local_error()


@app.task(name="shop.returns_lock", gpu=True)
def returns_lock():
    return threading.Lock()


@app.task(name="shop.memory_error", gpu=True)
def memory_error(path):
    note(path, "ran")
    raise MemoryError("no room for 7 GiB")


@app.task(name="shop.array_memory_error", gpu=True)
def array_memory_error():
    return numpy.empty(1 << 58).sum()


@app.task(name="shop.exits", gpu=True)
def exits(code):
    sys.exit(code)


@app.task(name="shop.prints", gpu=True)
def prints(text):
    print(text)


@app.task(name="shop.nap", gpu=True)
def nap(seconds, path=None):
    if path:
        note(path, f"start {os.getpid()}")
    time.sleep(seconds)
    if path:
        note(path, "end")
    return seconds


@app.task(name="shop.slow_once", gpu=True, acks_late=True, acks_on_timeout=False, time_limit=0.5, soft_time_limit=50)
def slow_once(path):
    note(path, "run")
    if Path(path).read_text().count("run") == 1:
        time.sleep(100)
    return "fast"


LOCK = threading.Lock()


@app.task(name="shop.mixed", gpu=True)
def mixed(number, path):
    """A short body at places an interrupt must not break: a lock, a log line, a pause."""
    with LOCK:
        logging.getLogger("shop").info("number %d", number)
    time.sleep(0.0005)
    with LOCK:
        note(path, number)
    return number


@app.task(name="shop.waits_for_lock", gpu=True)
def waits_for_lock(path):
    lock = threading.Lock()
    lock.acquire()
    note(path, "start")
    lock.acquire()


@app.task(name="shop.spins", gpu=True)
def spins(path):
    note(path, "start")
    while True:
        sum(range(1000))


@app.task(name="shop.catches_soft_limit", gpu=True)
def catches_soft_limit(path):
    note(path, os.getpid())
    try:
        time.sleep(100)
    except SoftTimeLimitExceeded:
        note(path, "caught")


@app.task(name="shop.catches_everything", gpu=True)
def catches_everything(path):
    note(path, os.getpid())
    while True:
        try:
            time.sleep(100)
        except BaseException as error:
            note(path, f"caught {error!r}")


@app.task(name="shop.birth", gpu=True)
def birth():
    """Pid and start time of the process, in clock ticks since boot: together they name it for good."""
    return [os.getpid(), int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])]


@app.task(name="shop.records", gpu=True)
def records(path, text):
    note(path, text)
    return text


@app.task(name="shop.records_early", gpu=True, acks_late=False)
def records_early(path, text):
    note(path, text)
    return text


@app.task(name="shop.kills_executor", gpu=True)
def kills_executor(path, times):
    """Die the first `times` runs."""
    note(path, "killer")
    if Path(path).read_text().count("killer") <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


@app.task(name="shop.segfaults", gpu=True)
def segfaults(path):
    note(path, "segfault")
    ctypes.string_at(0)


@app.task(name="shop.autoretries_a_crash", gpu=True, autoretry_for=(Exception,), default_retry_delay=0)
def autoretries_a_crash(path):
    segfaults(path)


@app.task(name="shop.dies_when_told", gpu=True)
def dies_when_told(path, gate, cure):
    """Each time the gate opens, die; with the cure there is nothing to wait for."""
    note(path, "run")
    while not Path(cure).exists():
        if Path(gate).exists():
            Path(gate).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
    return "survived"


@app.task(name="shop.stuck_in_c", gpu=True)
def stuck_in_c(path):
    note(path, f"start {os.getpid()}")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # like a C library that never comes back to Python
    ctypes.PyDLL(None).sleep(60)


@app.task(name="shop.retries", gpu=True, bind=True, max_retries=3)
def retries(self, path, until):
    note(path, self.request.retries)
    if self.request.retries < until:
        raise self.retry(countdown=0)
    return self.request.retries


@app.task(name="shop.autoretries", gpu=True, bind=True, autoretry_for=(ShopError,), max_retries=2, retry_backoff=False,
          default_retry_delay=0)  # fmt: skip
def autoretries(self, until):
    if self.request.retries < until:
        raise ShopError(self.request.retries, "again")
    return self.request.retries


@app.task(name="shop.autoretries_everything", gpu=True, autoretry_for=(Exception,), default_retry_delay=0)
def autoretries_everything(number: int) -> int:
    return number


@app.task(name="shop.progress", gpu=True, bind=True)
def progress(self, path):
    self.update_state(state="PROGRESS", meta={"done": 1})
    while not Path(path).exists():
        time.sleep(0.01)
    return "done"


@app.task(name="shop.soft_limited", gpu=True, soft_time_limit=0.3)
def soft_limited(path):
    try:
        time.sleep(30)
    except SoftTimeLimitExceeded:
        note(path, "caught")
        return os.getpid()


@app.task(name="shop.hard_limited", gpu=True, time_limit=0.5)
def hard_limited():
    time.sleep(30)


@app.task(name="shop.big", gpu=True)
def big(text, factor):
    return text * factor


@app.task(name="shop.pid", gpu=True)
def pid():
    return os.getpid()


@resident
def table():
    note(os.environ.get("SHOP_TABLE_LOG", os.devnull), "loaded")
    return array_module().arange(5)


@app.task(name="shop.looks_up", gpu=True)
def looks_up(index: int) -> int:
    return int(table()[index])


@app.task(name="shop.squares", gpu=True)
@batched(max_size=16, max_wait_s=0.05)
def squares(numbers: list[int]) -> list[int]:
    if any(number == 13 for number in numbers):
        raise ShopError(13, "unlucky")
    return [ValueError("negative") if number < 0 else number**2 for number in numbers]


@app.task(name="shop.warm", gpu=Gpu(example=(3,)))
def warm(number: int) -> int:
    warm.runs = getattr(warm, "runs", 0) + 1
    return warm.runs


@app.task(name="shop.unmarked")
def unmarked(values):
    return [os.getpid(), sum(values)]
