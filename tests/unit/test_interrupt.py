"""Soft limits and cancellation inside a body: where the exception is raised, and where it must not be."""

import importlib
import logging
import os
import queue
import signal
import sys
import threading

import numpy
import pytest
from celery.exceptions import SoftTimeLimitExceeded

from actors.contract import INTERRUPT_SIGNAL, Reason
from actors.executor import interrupt, pinned, residents
from actors.executor.device import CudaDevice
from actors.executor.interrupt import Cancelled, Interrupter
from actors.executor.pinned import PinnedCopies
from actors.journal import Journal
from tests.support.services import wait_for
from tests.unit.test_pinned import FakeCupy


class Executor:
    """What the interrupter needs of one: a journal, and the frame that calls bodies."""

    def __init__(self):
        self.journal = Journal.create()
        self.interrupter = Interrupter(self.journal, Executor.enter.__code__)

    def enter(self, body):
        self.interrupter.serial = self.journal.begin(0, 1, 0)
        return body()

    def run(self, body):
        """The value or exception of a body, as the executor takes it."""
        try:
            return self.enter(body)
        except BaseException as error:
            return error
        finally:
            self.interrupter.serial = 0
            sys.settrace(None)
            self.journal.end()

    def interrupt(self, reason=Reason.SOFT_LIMIT, serial=None):
        """What the actor does; the signal reaches this thread before the call returns."""
        self.journal.want(self.interrupter.serial if serial is None else serial, reason)
        os.kill(os.getpid(), INTERRUPT_SIGNAL)


@pytest.fixture
def executor():
    before, trace = signal.getsignal(INTERRUPT_SIGNAL), sys.gettrace()
    executor = Executor()
    yield executor
    signal.signal(INTERRUPT_SIGNAL, before)
    sys.settrace(trace)
    executor.journal.close()


@pytest.mark.parametrize(("reason", "cls"), [(Reason.SOFT_LIMIT, SoftTimeLimitExceeded), (Reason.CANCEL, Cancelled)])
def test_the_reason_decides_the_exception(executor, reason, cls):
    after = []

    def body():
        executor.interrupt(reason)
        after.append(1)

    assert type(executor.run(body)) is cls
    assert after == []
    assert executor.journal.taken() == 1


def test_cancelled_is_not_swallowed_by_except_exception():
    assert not issubclass(Cancelled, Exception)


def test_an_interrupt_for_another_body_is_ignored(executor):
    def body():
        executor.interrupt(serial=executor.interrupter.serial + 1)
        executor.interrupt(serial=executor.interrupter.serial - 1)
        return "untouched"

    assert executor.run(lambda: "first") == "first"
    assert executor.run(body) == "untouched"
    assert executor.journal.taken() == 0


def test_an_interrupt_that_comes_late_is_ignored(executor):
    assert executor.run(lambda: "done") == "done"
    executor.interrupt(serial=1)
    executor.interrupt(serial=0)
    assert executor.run(lambda: "next") == "next"


def test_one_for_no_body_does_not_hit_code_between_bodies(executor):
    executor.interrupter.serial = executor.journal.begin(0, 1, 0)  # begun, but not in the entry's frame
    executor.interrupt()
    assert executor.journal.taken() == 0


class Interrupts(logging.Handler):
    """Interrupts the body that logs, while logging holds its locks."""

    def __init__(self, executor):
        super().__init__()
        self.executor, self.finished = executor, 0

    def emit(self, record):
        self.executor.interrupt()
        self.finished += 1


@pytest.fixture
def logger(executor):
    logger = logging.Logger("interrupts")
    logger.addHandler(Interrupts(executor))
    return logger


def test_a_log_call_is_finished_before_its_body_is_interrupted(executor, logger):
    after = []

    def body():
        logger.warning("x")
        after.append(1)

    assert isinstance(executor.run(body), SoftTimeLimitExceeded)
    (handler,) = logger.handlers
    assert handler.finished == 1
    assert after == []
    assert free(handler.lock)


def free(lock):
    """Asked on another thread: some locks may be taken twice by one."""
    found = []
    thread = threading.Thread(target=lambda: found.append(lock.acquire(timeout=1)))
    thread.start()
    thread.join()
    if found[0] and not isinstance(lock, type(threading.RLock())):
        lock.release()
    return found[0]


def with_last(lock, call):
    with lock:
        call()


def with_middle(lock, call):
    with lock:
        call()
        call()


def with_value(lock, call):
    with lock:
        return call()


def with_loop(lock, call):
    while True:
        with lock:
            for _ in range(3):
                call()


def with_finally(lock, call):
    lock.acquire()
    try:
        call()
    finally:
        lock.release()


def nested(lock, call):
    with lock:
        with_last(threading.Lock(), call)


@pytest.mark.parametrize(
    "use", [with_last, with_middle, with_value, with_loop, with_finally, nested], ids=lambda use: use.__name__
)
def test_locks_around_a_log_call_are_let_go(executor, logger, use):
    lock = threading.Lock()
    assert isinstance(executor.run(lambda: use(lock, lambda: logger.warning("x"))), SoftTimeLimitExceeded)
    assert free(lock)
    lock = threading.Lock()
    assert isinstance(executor.run(lambda: use(lock, executor.interrupt)), SoftTimeLimitExceeded)
    assert free(lock)


@pytest.mark.parametrize("module", ["queue_jobs", "logging_tools", "threading2.tasks", "cupy_tasks", "concurrently"])
def test_only_the_modules_themselves_are_shielded_not_names_that_begin_alike(executor, module):
    space = {"__name__": module, "interrupt": executor.interrupt}
    exec("def body():\n    interrupt()\n    return 'not interrupted'\n", space)
    assert isinstance(executor.run(space["body"]), SoftTimeLimitExceeded)


@pytest.mark.parametrize(
    "module", ["queue", "logging.handlers", "cupy.cuda.memory", "cupyx.scipy", "importlib._bootstrap"]
)
def test_the_modules_inside_are_shielded_too(executor, module):
    space = {"__name__": module, "interrupt": executor.interrupt, "steps": (steps := [])}
    exec("def call():\n    interrupt()\n    steps.append('finished')\n", space)

    def body():
        space["call"]()
        steps.append("went on")

    assert isinstance(executor.run(body), SoftTimeLimitExceeded)
    assert steps == ["finished"]


def test_a_queue_is_interrupted_where_it_waits_and_can_be_used_afterwards(executor):
    things = queue.Queue()
    timer = threading.Timer(0.1, executor.interrupt)

    def body():
        timer.start()
        things.get()

    assert isinstance(executor.run(body), SoftTimeLimitExceeded)
    timer.join()
    things.put(1)
    assert things.get(timeout=1) == 1


def test_an_event_is_interrupted_where_it_waits_and_can_be_used_afterwards(executor):
    event = threading.Event()
    timer = threading.Timer(0.1, executor.interrupt)

    def body():
        timer.start()
        event.wait()

    assert isinstance(executor.run(body), SoftTimeLimitExceeded)
    timer.join()
    event.set()
    assert event.wait(1)


def test_a_body_that_catches_its_limit_goes_on(executor, logger):
    def body():
        try:
            logger.warning("x")
        except SoftTimeLimitExceeded:
            return "caught"

    assert executor.run(body) == "caught"
    assert sys.gettrace() is None


def test_a_body_whose_last_act_is_a_log_call_is_interrupted_or_done_but_nobody_else_is(executor, logger):
    def body():
        logger.warning("x")

    assert isinstance(executor.run(body), SoftTimeLimitExceeded)
    assert executor.run(lambda: "next") == "next"


# ---- residents


@pytest.fixture
def no_residents(monkeypatch):
    monkeypatch.setattr(residents, "_registry", [])
    monkeypatch.setattr(residents, "shared", residents.Residents())


def test_a_loader_is_interrupted_and_its_resident_is_loaded_at_the_next_use(executor, no_residents):
    after = []

    @residents.resident
    def model():
        if not after:
            after.append("interrupted")
            executor.interrupt()
            after.append("went on")
        return "loaded"

    assert type(executor.run(model)) is SoftTimeLimitExceeded
    assert after == ["interrupted"]
    found = []
    other = threading.Thread(target=lambda: found.append(model()), daemon=True)
    other.start()
    other.join(10)
    assert found == ["loaded"], "the lock is free, for other threads too"


def test_a_loader_that_logs_is_interrupted_after_the_log_call(executor, logger, no_residents):
    after = []

    @residents.resident
    def model():
        logger.warning("x")
        after.append(1)

    assert type(executor.run(model)) is SoftTimeLimitExceeded
    assert logger.handlers[0].finished == 1
    assert after == []


class Interrupting:
    """Interrupts the body while a resident is looked up."""

    def __init__(self, executor):
        self.executor, self.seen = executor, 0

    def __hash__(self):
        self.executor.interrupt()
        self.seen += 1
        return 1


def test_bookkeeping_of_residents_is_finished_before_the_body_is_interrupted(executor, no_residents):
    loads, after = [], []
    argument = Interrupting(executor)

    @residents.resident
    def model(argument):
        loads.append(argument)

    def body():
        model(argument)
        after.append(1)

    assert type(executor.run(body)) is SoftTimeLimitExceeded
    assert loads == [argument] and argument.seen >= 2, "looked up, loaded and kept"
    assert after == []
    assert list(residents.shared.sizes()), "kept"


def test_who_waits_for_the_rest_of_an_array_on_its_way_to_a_gpu_is_reached(executor, monkeypatch):
    """Buffers of pinned memory are shielded, the wait for a store is not."""
    monkeypatch.setattr(pinned, "LEAST_BYTES", 1)
    gpu, fake, came = CudaDevice.__new__(CudaDevice), FakeCupy(), []
    gpu._cupy, gpu._copies = fake, PinnedCopies(fake)

    def pieces():
        yield bytes(8)
        executor.interrupt()
        came.append("the second")
        yield bytes(8)

    error = executor.run(lambda: gpu.receive(pieces(), (16,), "|u1"))
    assert isinstance(error, SoftTimeLimitExceeded) and not came


def test_who_waits_for_the_threads_that_share_a_copy_is_interrupted_after_it(executor, monkeypatch):
    """Or they would go on with arrays that the body has given up."""
    monkeypatch.setattr(pinned, "SLAB_BYTES", 100)
    monkeypatch.setattr(pinned, "THREADS", 2)
    fake, main, begun = FakeCupy(), threading.get_ident(), queue.SimpleQueue()
    copies, copy, after = PinnedCopies(fake), fake.queue, []

    def copies_late(*piece):
        if threading.get_ident() == main:
            if not fake.copies:
                begun.get(timeout=30)  # so that the other has one, too
        else:
            begun.put(None)
            wait_for(lambda: sys._current_frames()[main].f_code.co_name in ("_share", "<listcomp>"), "its wait", 10)
            executor.journal.want(executor.interrupter.serial, Reason.SOFT_LIMIT)
            signal.pthread_kill(main, INTERRUPT_SIGNAL)
            wait_for(lambda: executor.journal.taken() == 1, "the signal", 10)
        copy(*piece)

    def body():
        copies.to_device(numpy.zeros(200, "uint8"))
        after.append(1)

    fake.cuda.runtime.memcpyAsync = copies_late
    assert type(executor.run(body)) is SoftTimeLimitExceeded and not after
    assert sum(size for _, _, size in fake.copies) == 200


@pytest.mark.parametrize("name", interrupt._OURS)
def test_modules_that_are_shielded_are_there(name):
    """One that has moved would be interrupted in the middle of a copy."""
    assert importlib.import_module(name).__name__ == name
