"""The actor's shell with real executor processes and no Ray: blame, limits, cancellation, releases, what bodies may do.

Every body here is a real one in a real child process; the tests speak to `ActorShell` as a driver does.
"""

import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest

from actors.actor import children, leases
from actors.actor.entries import Limits
from actors.actor.shell import ActorShell
from actors.contract import (
    ActorState,
    Busy,
    Call,
    Config,
    Failed,
    FailureKind,
    Large,
    LogLine,
    Pending,
    Release,
    Succeeded,
    TaskCall,
)
from tests.support.services import ROOT, wait_for

LIMITS = Limits(
    inline_bytes=65_536, queued_tasks=4096, reply_after_s=0.02, lease_s=60.0, keep_warm_s=120.0, grace_s=5.0
)

APP = '''
import concurrent.futures, ctypes, logging, os, queue, signal, socket, subprocess, sys, threading, time
from celery import Celery, Task
from celery.utils.log import get_task_logger
from bridge import batched, executor_init

started = []
OUT = sys.stdout  # as celery.contrib.rdb and many loggers keep it


@executor_init.connect
def on_start(sender, device, **_):
    started.append([sender.main, device["kind"]])


VERSION = "one"
app = Celery("bodies", broker="memory://")
logger = logging.getLogger("bodies")


def note(path, text="x"):
    with open(path, "a") as file:
        file.write(f"{text}\\n")


def until(path):
    """Wait until the test makes a file; ends by itself, so that a failing test leaves nothing behind."""
    deadline = time.monotonic() + 60
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.002)


class InContext(Task):
    context = "outside"

    def __call__(self, *args, **kwargs):
        InContext.context = "inside"
        try:
            return super().__call__(*args, **kwargs)
        finally:
            InContext.context = "outside"


@app.task
def echo(value): return value

@app.task
def pid(): return os.getpid()

@app.task
def version(): return VERSION

@app.task
def segfault(): ctypes.string_at(0)

@app.task
def segfault_times(path, times):
    note(path)
    if len(open(path).readlines()) <= times:
        ctypes.string_at(0)
    return os.getpid()

@app.task
def hold(started, release):
    note(started)
    until(release)
    return os.getpid()

@app.task
def naps(seconds): time.sleep(seconds)

@app.task
def touch(path): note(path)

@app.task
def waits_for(path): until(path)

@app.task
def raises(): raise KeyError("missing")

@app.task
def exits(code): sys.exit(code)

@app.task
def hard_exit(code): os._exit(code)

@app.task
def stuck_in_c(started):
    note(started)
    ctypes.PyDLL(None).sleep(60)

@app.task
def stubborn(started):
    note(started)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            time.sleep(60)
        except BaseException:
            pass

@app.task
def leaves_child(started, then):
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    note(started, child)
    if then == "segfault":
        ctypes.string_at(0)
    return child

@app.task
def fork_and_exit(started):
    child = os.fork()
    if child == 0:
        sys.exit(3)
    note(started, child)
    _, status = os.waitpid(child, 0)
    return [os.getpid(), os.waitstatus_to_exitcode(status)]

@app.task
def moves(folder): os.chdir(folder)

@app.task
def cwd(): return os.getcwd()

@app.task
def prints(size):
    line = "x" * 79
    for _ in range(size // 80):
        print(line)
    return size

@app.task
def logs(text, count=1, level=logging.WARNING):
    for _ in range(count):
        logger.log(level, text)

@app.task
def closes_files():
    os.closerange(3, 256)

@app.task
def big(size): return "y" * size

@app.task
def returns_lock(): return threading.Lock()

@app.task(bind=True)
def who(self, *args, **kwargs):
    return [self.request.id, list(self.request.args), self.request.kwargs, self.request.called_directly, self.name]

@app.task(base=InContext)
def in_context(): return InContext.context

@app.task(bind=True)
def retries(self): raise self.retry(countdown=3)

@app.task(bind=True)
def progress(self):
    self.update_state(state="PROGRESS", meta={"done": 1})
    return "done"

@app.task(bind=True)
def progress_and_hold(self, release):
    self.update_state(state="PROGRESS", meta={"done": 1})
    until(release)
    return "done"

@app.task(bind=True)
def tells_for_ever(self):
    while True:
        self.update_state(state="PROGRESS", meta={"text": "x" * 100_000})

@app.task(bind=True)
def bad_progress(self):
    self.update_state(state="PROGRESS", meta={"done": threading.Lock()})
    return "done"

class Bomb:
    def __reduce__(self):  # stands for the host running out of memory while a value is pickled
        os.kill(os.getpid(), signal.SIGKILL)

@app.task
def returns_bomb(path):
    note(path)
    return Bomb()

@app.task
def prints_then_bomb(path):
    note(path)
    print("x" * 10_000)
    return [Bomb()]

@app.task
@batched(max_size=4)
def halves(numbers: list[int], paths: list[str]) -> list[int]:
    note(paths[0], ",".join(map(str, numbers)))
    if numbers[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    if len(numbers) == 4:
        raise ValueError("too many")
    return numbers

@app.task
def prints_where_it_kept():
    print("kept", file=OUT)

@app.task
def starts():
    return started

@app.task
def says_and_holds(gate):
    get_task_logger("bodies.said").warning("so far")
    until(gate)

@app.task(acks_late=True)
def no_memory(path):
    note(path)
    raise MemoryError("no room")

@app.task
def no_memory_early(path):
    note(path)
    raise MemoryError("no room")

@app.task(acks_late=True)
def no_memory_once(path):
    note(path)
    if len(open(path).readlines()) == 1:
        raise MemoryError("no room")
    return "fits"

# places a body may wait in when its soft limit comes

@app.task
def waits(where, started):
    ours, theirs = socket.socketpair()
    lock = threading.Lock()
    lock.acquire()
    sleeper = threading.Thread(target=time.sleep, args=(2,), daemon=True)
    sleeper.start()
    places = {
        "sleep": lambda: time.sleep(60),
        "event": lambda: threading.Event().wait(60),
        "event without end": lambda: threading.Event().wait(),
        "condition": lambda: wait_on_condition(),
        "queue": lambda: queue.Queue().get(),
        "queue with timeout": lambda: queue.Queue().get(timeout=60),
        "lock": lambda: lock.acquire(),
        "join": lambda: sleeper.join(),
        "subprocess": lambda: subprocess.run(["sleep", "60"]),
        "socket": lambda: ours.recv(1),
        "loop": lambda: spin(),
        "future": lambda: concurrent.futures.Future().result(),
        "logging": lambda: log_for_ever(),
        "reads a pipe": lambda: os.read(os.pipe()[0], 1),
    }
    note(started)
    places[where]()
    return "not interrupted"

def wait_on_condition():
    condition = threading.Condition()
    with condition:
        condition.wait()

def spin():
    while True:
        pass

def log_for_ever():
    while True:
        logger.debug("a line below the level")
        logger.warning("a line")

@app.task
def catches(started):
    from celery.exceptions import SoftTimeLimitExceeded
    note(started)
    try:
        time.sleep(60)
    except SoftTimeLimitExceeded:
        return os.getpid()

LOCK = threading.Lock()

@app.task
def busy_with_locks(number):
    """Short, and always inside logging, a lock or a queue."""
    things = queue.Queue()
    event = threading.Event()
    for step in range(20):
        logger.warning("task %d, step %d", number, step)
        with LOCK:
            things.put(step)
        things.get()
        event.wait(0.0001)
    return number

@app.task
def logs_under_lock(started):
    note(started)
    while True:
        with LOCK:
            for _ in range(20):
                logger.debug("not shown")
            logger.warning("a line")

@app.task
def locks_are_free():
    held = []
    for name in [None, "bodies", "celery.redirected"]:
        for handler in logging.getLogger(name).handlers:
            if handler.lock is not None and not can_take(handler.lock):
                held.append(f"{name} {handler!r}")
    if not can_take(logging._lock):
        held.append("logging._lock")
    if not can_take(LOCK):
        held.append("LOCK")
    return held

def can_take(lock):
    """Asked on another thread, because some of these may be taken twice by one."""
    taken = []
    def take():
        if lock.acquire(timeout=2):
            taken.append(1)
            lock.release()
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return bool(taken)

# vectorised bodies

@app.task
@batched(max_size=8)
def squares(numbers: list[int]) -> list[int]:
    if any(number == 13 for number in numbers):
        raise ValueError("unlucky")
    return [OverflowError("negative") if number < 0 else number * number for number in numbers]

@app.task
@batched(max_size=8)
def batch_segfault(numbers: list[int]) -> list[int]:
    ctypes.string_at(0)

@app.task
@batched(max_size=8)
def batch_sizes(numbers: list[int]) -> list[int]:
    return [len(numbers)] * len(numbers)

@app.task
@batched(max_size=8)
def batch_hold(starts: list[str], ends: list[str]) -> list[int]:
    for start, end in zip(starts, ends):
        note(start)
        until(end)
    return [os.getpid()] * len(starts)
'''

QUEUE_MODULE = """
from bodies import app, note
import time

@app.task
def nap(started):
    note(started)
    time.sleep(60)
"""

TASKS = [
    "echo", "pid", "version", "segfault", "segfault_times", "hold", "raises", "exits", "hard_exit", "stuck_in_c",
    "stubborn", "leaves_child", "fork_and_exit", "moves", "cwd", "prints", "logs", "closes_files", "big",
    "returns_lock", "who", "in_context", "retries", "progress", "bad_progress", "no_memory", "no_memory_once", "waits",
    "no_memory_early", "says_and_holds", "starts", "returns_bomb", "prints_then_bomb", "halves",
    "prints_where_it_kept",
    "catches", "busy_with_locks", "logs_under_lock", "locks_are_free", "squares", "batch_segfault", "batch_sizes",
    "batch_hold", "progress_and_hold", "tells_for_ever", "naps", "touch",
    "waits_for",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "bodies.py").write_text(APP)
    (folder / "queue_jobs.py").write_text(QUEUE_MODULE)
    return folder


def make_config(folder, name="one", module="bodies", tasks=TASKS, includes=(), **options):
    release = Release(
        id=name, app=f"{module}:app", script="", sys_path=(str(folder), str(ROOT)), workdir=str(folder),
        includes=tuple(includes), tasks=tuple(task if "." in task else f"bodies.{task}" for task in tasks),
        environment=(),
    )  # fmt: skip
    return Config(
        release,
        **{
            "device": "cpu",
            "memory_limit": "90%",
            "log_level": 30,
            "log_limit_bytes": 4096,
            "resident_limit": "50%",
            **options,
        },
    )


class Driver:
    """What a driver does with one actor, for tests."""

    def __init__(self, limits=LIMITS):
        self.abandoned = threading.Event()
        self.shell = ActorShell(0, limits, self.abandoned.set)
        self.id = uuid.uuid4().hex
        self.config = None

    def hello(self, config, ready=True, supersedes=""):
        self.config = config
        health = self.shell.hello(self.id, supersedes, config)
        if ready:
            wait_for(lambda: self.health.state is ActorState.READY, f"an executor; {health}")
        return self

    @property
    def health(self):
        return self.shell.health(self.id, self.config.release.id)

    @property
    def executor(self):
        return self.health.executor_pid

    def send(self, *tasks, **options):
        return InHand(self, tasks, **options)

    def outcomes(self, *tasks, **options):
        return self.send(*tasks, **options).outcomes()

    def values(self, *tasks, **options):
        return [value(outcome) for outcome in self.outcomes(*tasks, **options)]

    def value(self, name, *args):
        return self.values(task(name, *args))[0]

    def end(self):
        assert self.shell._thread.is_alive() or self.abandoned.is_set(), "the supervisor died"
        self.shell.drain()
        self.shell._lock.acquire()
        try:
            for entry in list(self.shell._entries.values()):
                self.shell._cancel(entry, [each.token for each in entry.todo])
                self.shell._entries.pop(entry.call.id, None)
            executors = list(self.shell._children)
        finally:
            self.shell._lock.release()
        self.shell.close()
        self.shell._thread.join(30)
        assert not self.shell._thread.is_alive(), "an actor that was closed has not ended"
        for child in executors:
            child.process.wait(10)


def task(name, *args, soft=None, hard=None, context=None, **kwargs):
    token = f"{name}-{uuid.uuid4().hex[:8]}"
    name = name if "." in name else f"bodies.{name}"
    payload = pickle.dumps((args, kwargs, {"id": token, **(context or {})}), 5)
    return TaskCall(token, name, payload, soft, hard)


class InHand:
    """A call that has been sent."""

    def __init__(self, driver, tasks, release=None, driver_id=None, estimate_s=0.0):
        self.shell = driver.shell
        release = release or driver.config.release.id
        self.call = Call(uuid.uuid4().hex, driver_id or driver.id, release, tuple(tasks), estimate_s)
        self.found = {}
        self.pending = {each.token for each in tasks}
        self.running = set()
        self.wishes = {}  # token -> what the running body asked
        self.told = {}  # token -> what it logged, as far as it was told while it ran
        self.reply = self.take(self.shell.run(self.call))

    def take(self, reply):
        if isinstance(reply, Busy):
            return reply
        self.running = {answer.token for answer in reply.answers if isinstance(answer, Pending) and answer.running}
        for answer in reply.answers:
            if isinstance(answer, Pending):
                for each in (each for wishes in answer.wishes for each in pickle.loads(wishes)):
                    kept = self.told if isinstance(each, LogLine) else self.wishes
                    kept.setdefault(answer.token, []).append(each)
                continue
            if isinstance(answer, Large):
                answer = pickle.loads(self.shell.fetch(answer.token))
            assert answer.token not in self.found, "a second outcome"
            answer = answer._replace(logs=(*self.told.get(answer.token, ()), *answer.logs))
            self.found[answer.token] = answer
            self.pending.discard(answer.token)
        return reply

    def collect(self, wait_s=0.1):
        self.take(self.shell.collect(self.call, wait_s))
        return self

    def outcomes(self, timeout_s=60.0):
        deadline = time.monotonic() + timeout_s
        while self.pending:
            assert time.monotonic() < deadline, f"no outcome of {self.pending}; {self.found}"
            self.collect(0.2)
        return [self.found[each.token] for each in self.call.tasks]

    def cancel(self, *indices):
        self.shell.cancel(self.call.id, [self.call.tasks[index].token for index in indices])


def value(outcome):
    assert not isinstance(outcome, Failed), f"{outcome.kind}: {outcome.message}\n{outcome.traceback}"
    return pickle.loads(outcome.value)


def kinds(outcomes):
    return [outcome.kind if isinstance(outcome, Failed) else "succeeded" for outcome in outcomes]


def exception(outcome):
    return pickle.loads(outcome.exception)


def exists(path):
    return lambda: Path(path).exists()


@pytest.fixture(scope="module")
def shared(folder):
    """One actor for the tests that leave its executor alive, or do not mind a new one."""
    driver = Driver()
    driver.hello(make_config(folder))
    yield driver
    driver.end()


@pytest.fixture
def driver(shared):
    wait_for(lambda: shared.health.state is ActorState.READY, "the executor")
    return shared


@pytest.fixture
def new_driver():
    """Make an actor of its own; ended after the test."""
    made = []

    def make(**limits):
        made.append(Driver(LIMITS._replace(**limits)))
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


def open_gate(path):
    Path(path).touch()


# ---- values and errors


def test_values_come_back_in_the_order_of_the_call(driver):
    assert driver.values(*(task("echo", number) for number in range(50))) == list(range(50))


def test_health_tells_what_a_person_needs(driver):
    driver.value("echo", 1)
    health = driver.health
    assert health.device["kind"] == "cpu"
    assert health.device["note"] == "BRIDGE_DEVICE=cpu"
    assert health.pid == os.getpid()
    assert psutil.pid_exists(health.executor_pid)
    assert health.by_task["bodies.echo"]["tasks"] >= 1
    assert health.warm_s > 0


def test_a_body_sees_its_request(driver):
    one = task("who", 1, 2, key=3)
    assert driver.values(one) == [[one.token, [1, 2], {"key": 3}, False, "bodies.who"]]


def test_a_custom_call_runs_around_the_body(driver):
    assert driver.value("in_context") == "inside"


def test_an_exception_travels_with_its_traceback_and_without_our_frames(driver):
    (outcome,) = driver.outcomes(task("raises"))
    assert outcome.kind is FailureKind.RAISED
    assert isinstance(exception(outcome), KeyError)
    assert "in raises" in outcome.traceback
    assert "_enter_body" not in outcome.traceback


def test_a_retry_is_data(driver):
    (retried,) = driver.outcomes(task("retries"))
    assert retried.kind is FailureKind.RETRY
    ((method, _, options),) = pickle.loads(retried.wishes)
    assert (method, options["countdown"], options["throw"]) == ("retry", 3, False)


def test_progress_is_told_before_the_outcome(driver):
    sent = driver.send(task("progress"))
    assert value(sent.outcomes()[0]) == "done"
    ((method, _, options),) = sent.wishes[sent.call.tasks[0].token]
    assert (method, options) == ("update_state", {"state": "PROGRESS", "meta": {"done": 1}})


def test_progress_is_told_while_the_body_runs(driver, gate):
    sent = driver.send(task("progress_and_hold", gate))
    wait_for(lambda: sent.collect().wishes.get(sent.call.tasks[0].token), "the progress")
    assert not sent.found
    open_gate(gate)
    assert value(sent.outcomes()[0]) == "done"


def test_a_limit_that_comes_while_progress_is_told_spoils_nothing(folder, new_driver):
    """The words go through the executor's pipe: half a message there would be the end of it."""
    driver = new_driver().hello(make_config(folder))
    pid = driver.executor
    for number in range(40):
        interrupted, good = driver.send(task("tells_for_ever", soft=0.01 + number / 2000), task("pid")).outcomes(20)
        assert interrupted.type_name.endswith("SoftTimeLimitExceeded"), interrupted
        assert value(good) == pid


def test_a_wish_that_cannot_be_sent_fails_its_task_only(driver):
    pid = driver.executor
    bad, good = driver.outcomes(task("bad_progress"), task("progress"))
    assert bad.kind is FailureKind.RAISED
    assert "lock" in bad.message
    assert value(good) == "done"
    assert driver.executor == pid


def test_a_value_that_cannot_be_sent_fails_its_task_only(driver):
    bad, good = driver.outcomes(task("returns_lock"), task("echo", 1))
    assert bad.kind is FailureKind.NOT_SENDABLE
    assert "lock" in bad.message
    assert value(good) == 1


def test_a_task_the_app_does_not_know_is_refused(driver):
    unknown, good = driver.outcomes(task("celery.backend_cleanup"), task("echo", 1))
    assert unknown.kind is FailureKind.UNKNOWN_TASK
    assert value(good) == 1


def test_a_payload_that_cannot_be_opened_fails_its_task_only(driver):
    broken = task("echo")._replace(payload=b"cnowhere\nNothing\n.")
    bad, good = driver.outcomes(broken, task("echo", 1))
    assert bad.kind is FailureKind.RAISED
    assert "nowhere" in bad.message
    assert value(good) == 1


def test_a_call_of_an_unknown_release_is_lost_not_failed(driver):
    (outcome,) = driver.outcomes(task("echo", 1), release="never heard of")
    assert outcome.kind is FailureKind.LOST


def test_a_large_outcome_is_fetched_once(driver):
    one = task("big", 200_000)
    assert driver.values(one) == ["y" * 200_000]
    with pytest.raises(KeyError):
        driver.shell.fetch(one.token)


def test_an_outcome_larger_than_the_journal_goes_through_the_pipe(driver):
    values = driver.values(task("big", 3_000_000), task("echo", 1), task("big", 900_000), task("big", 900_000))
    assert [len(each) if isinstance(each, str) else each for each in values] == [3_000_000, 1, 900_000, 900_000]


def test_out_of_memory_of_a_task_acknowledged_early_is_not_tried_again(driver, tmp_path):
    log = tmp_path / "log"
    (once,) = driver.outcomes(task("no_memory_early", str(log)))
    assert once.kind is FailureKind.OUT_OF_MEMORY
    assert len(log.read_text().splitlines()) == 1, "it may have had effects before, and must not have them twice"


def test_out_of_memory_is_tried_once_more_and_then_said(driver, path, tmp_path):
    again, never = driver.outcomes(task("no_memory_once", path), task("no_memory", str(tmp_path / "second")))
    assert value(again) == "fits"
    assert never.kind is FailureKind.OUT_OF_MEMORY
    assert never.exception is None  # a MemoryError would end the Celery worker
    assert len((tmp_path / "second").read_text().splitlines()) == 2


# ---- death: blame, and who goes on


def test_a_segfault_is_charged_to_its_task_alone(driver):
    crashes = driver.health.crashes
    before, crashed, *after = driver.outcomes(task("pid"), task("segfault"), task("pid"), task("pid"))
    assert crashed.kind is FailureKind.CRASHED
    assert crashed.message == "signal 11 (SIGSEGV)"
    assert value(before) != value(after[0]) == value(after[1]), "the rest of the call continues in one successor"
    assert driver.health.crashes == crashes + 1


def test_every_crash_of_a_call_is_charged_exactly(driver):
    outcomes = driver.outcomes(task("segfault"), task("echo", 1), task("hard_exit", 3), task("echo", 2))
    assert kinds(outcomes) == [FailureKind.CRASHED, "succeeded", FailureKind.CRASHED, "succeeded"]
    assert outcomes[2].message == "exit code 3"


def test_a_kill_from_outside_is_charged_to_who_was_running(driver, path, gate):
    sent = driver.send(task("echo", 1), task("hold", path, gate), task("echo", 2))
    wait_for(exists(path), "the body to run")
    os.kill(driver.executor, signal.SIGKILL)
    outcomes = sent.outcomes()
    assert kinds(outcomes) == ["succeeded", FailureKind.CRASHED, "succeeded"]
    assert outcomes[1].message == "signal 9 (SIGKILL)"


def test_a_finished_outcome_that_nobody_collected_survives_the_death(driver, path, gate):
    sent = driver.send(task("big", 500_000), task("hold", path, gate))
    wait_for(exists(path), "the body to run")
    os.kill(driver.executor, signal.SIGKILL)
    assert kinds(sent.outcomes()) == ["succeeded", FailureKind.CRASHED]


def test_a_death_between_calls_is_charged_to_nobody(driver):
    crashes, pid = driver.health.crashes, driver.executor
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: driver.executor not in (pid, 0), "a successor")
    assert driver.value("echo", 1) == 1
    assert driver.health.crashes == crashes


def test_calls_behind_a_crash_wait_for_the_successor(driver, path, gate):
    first = driver.send(task("hold", path, gate))
    wait_for(exists(path), "the body to run")
    behind = [driver.send(task("echo", number)) for number in range(3)]
    os.kill(driver.executor, signal.SIGKILL)
    assert kinds(first.outcomes()) == [FailureKind.CRASHED]
    assert [value(sent.outcomes()[0]) for sent in behind] == [0, 1, 2]


def test_a_child_left_behind_by_a_body_does_not_hide_the_executors_death(folder, new_driver, path):
    """A forked process holds the executor's end of the pipe open: its end alone does not tell of a death."""
    driver = new_driver().hello(make_config(folder))
    sent = driver.send(task("leaves_child", path, "segfault"), task("echo", 1))
    wait_for(exists(path), "the body to fork")
    child = int(Path(path).read_text())
    try:
        assert kinds(sent.outcomes(timeout_s=15)) == [FailureKind.CRASHED, "succeeded"]
    finally:
        os.kill(child, signal.SIGKILL)


def test_executors_end_with_their_actor(folder, tmp_path):
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from pathlib import Path\n"
        "from tests.integration.test_executor import Driver, make_config\n"
        f"driver = Driver().hello(make_config(Path({str(folder)!r})))\n"
        "print(driver.executor, flush=True); input()\n"
    )
    actor = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        executor = psutil.Process(int(actor.stdout.readline()))
        actor.kill()
        actor.wait(10)
        wait_for(lambda: not executor.is_running() or executor.status() == psutil.STATUS_ZOMBIE, "the executor to end")
    finally:
        actor.kill()
        actor.stdin.close()
        actor.stdout.close()


# ---- what a body may do to its process


def test_sys_exit_fails_its_task_only(driver):
    pid = driver.executor
    exited, good = driver.outcomes(task("exits", 4), task("pid"))
    assert exited.kind is FailureKind.EXITED
    assert (exited.type_name, exited.message) == ("SystemExit", "exitcode 4")
    assert exited.exception is None, "rebuilt in the driver it would end it"
    assert value(good) == pid


@pytest.mark.parametrize("name", ["returns_bomb", "prints_then_bomb"])
def test_a_death_after_the_body_and_before_its_outcome_is_charged_to_it(driver, path, name):
    crashed, good = driver.outcomes(task(name, path), task("echo", 1))
    assert crashed.kind is FailureKind.CRASHED
    assert value(good) == 1
    assert len(Path(path).read_text().splitlines()) == 1, "the driver decides whether it runs again"


def test_what_a_shared_run_has_finished_is_kept_when_its_other_half_dies(driver, path):
    tasks = [task("halves", number, path) for number in (1, 2, 3, 4)]
    outcomes = driver.outcomes(*tasks)
    assert [value(outcome) for outcome in outcomes[:2]] == [1, 2]
    assert kinds(outcomes[2:]) == [FailureKind.SUSPECT] * 2
    assert Path(path).read_text().split() == ["1,2,3,4", "1,2", "3,4"]


def test_os_exit_is_a_crash(driver):
    outcomes = driver.outcomes(task("hard_exit", 0), task("echo", 1))
    assert kinds(outcomes) == [FailureKind.CRASHED, "succeeded"]


def test_a_forked_child_that_exits_does_not_become_a_second_executor(folder, new_driver, path):
    driver = new_driver().hello(make_config(folder))
    forked, *others = driver.values(task("fork_and_exit", path), *(task("pid") for _ in range(5)))
    assert forked[1] == 3, "the child ended with its own exit code"
    assert set(others) == {forked[0]}
    assert not psutil.pid_exists(int(Path(path).read_text()))


def test_a_body_that_leaves_a_child_is_no_problem(driver, path):
    pid = driver.executor
    child = driver.value("leaves_child", path, "")
    os.kill(child, signal.SIGKILL)
    assert driver.value("pid") == pid


def test_a_body_that_changes_directory_does_not_move_the_successor(driver, folder, tmp_path):
    driver.value("moves", str(tmp_path))
    crashed, where = driver.outcomes(task("segfault"), task("cwd"))
    assert crashed.kind is FailureKind.CRASHED
    assert value(where) == str(folder)


def test_a_body_that_closes_descriptors_costs_an_executor_and_no_task(driver):
    outcomes = driver.outcomes(task("echo", 1), task("closes_files"), task("echo", 2))
    assert kinds(outcomes) == ["succeeded"] * 3
    assert driver.value("echo", 3) == 3


def test_the_executors_own_signal_is_sent_once_before_its_first_body(driver):
    assert driver.value("starts") == [["bodies", "cpu"]]


# ---- logs


def test_logs_travel_with_their_task(driver):
    said, silent = driver.outcomes(task("logs", "hello"), task("logs", "quiet", 1, 10))
    assert [line[:4] for line in said.logs] == [(30, "bodies", "hello", False)]
    assert silent.logs == ()


def test_logs_of_a_running_body_are_told_while_it_runs_and_outlive_it(driver, path, gate):
    sent = driver.send(task("says_and_holds", gate))
    token = sent.call.tasks[0].token
    wait_for(lambda: sent.collect().told.get(token), "the first line")
    assert not sent.found
    os.kill(driver.executor, signal.SIGKILL)
    (outcome,) = sent.outcomes()
    assert outcome.kind is FailureKind.CRASHED
    assert [line[:4] for line in outcome.logs] == [(30, "bodies.said", "so far", True)]


def test_logs_of_a_failure_travel_too(driver):
    (outcome,) = driver.outcomes(task("prints", 160))
    assert [line.text for line in outcome.logs] == ["x" * 79] * 2
    assert {line.logger for line in outcome.logs} == {"celery.redirected"}


def test_what_a_module_kept_as_stdout_leads_to_the_log(driver):
    (outcome,) = driver.outcomes(task("prints_where_it_kept"))
    assert [line.text for line in outcome.logs] == ["kept"]


def test_ten_megabytes_of_prints_are_cut(driver):
    (outcome,) = driver.outcomes(task("prints", 10_000_000))
    assert value(outcome) == 10_000_000
    assert sum(len(line.text) for line in outcome.logs) <= 2 * driver.config.log_limit_bytes + 100
    assert outcome.logs[-1].text.endswith("dropped)")


def test_empty_log_lines_are_bounded_too(driver):
    (outcome,) = driver.outcomes(task("logs", "", 50_000))
    assert len(outcome.logs) <= driver.config.log_limit_bytes


# ---- soft limits


@pytest.mark.parametrize(
    "where",
    [
        "sleep", "event", "event without end", "condition", "queue", "queue with timeout", "lock", "subprocess",
        "socket", "loop", "future", "logging", "reads a pipe",
    ],
)  # fmt: skip
def test_a_soft_limit_interrupts_a_body_wherever_it_waits(driver, path, where):
    pid = driver.executor
    interrupted, good = driver.outcomes(task("waits", where, path, soft=0.2), task("pid"))
    assert interrupted.kind is FailureKind.RAISED
    assert interrupted.type_name.endswith("SoftTimeLimitExceeded")
    assert value(good) == pid


def test_a_body_may_catch_its_soft_limit(driver, path):
    pid = driver.executor
    assert driver.values(task("catches", path, soft=0.2), task("pid")) == [pid, pid]


def test_a_soft_limit_counts_from_the_start_of_its_body(driver, path, gate):
    """What waits behind another task is not running."""
    sent = driver.send(task("hold", path, gate), task("echo", 1, soft=0.1))
    wait_for(exists(path), "the first body to run")
    time.sleep(0.3)  # the second one's limit, several times
    open_gate(gate)
    assert kinds(sent.outcomes()) == ["succeeded", "succeeded"]


def test_a_soft_limit_reaches_bodies_of_any_module_name(folder, new_driver, path):
    """`queue_jobs` is not the standard library's `queue`."""
    tasks = ["echo", "queue_jobs.nap"]
    driver = new_driver().hello(make_config(folder, "queue", tasks=tasks, includes=["queue_jobs"]))
    (outcome,) = driver.outcomes(task("queue_jobs.nap", path, soft=0.2, hard=10.0))
    assert outcome.kind is FailureKind.RAISED


def test_an_interrupt_in_a_log_call_lets_go_of_the_locks_around_it(folder, new_driver, path):
    driver = new_driver().hello(make_config(folder))
    for _ in range(10):
        (interrupted,) = driver.outcomes(task("logs_under_lock", path, soft=0.02))
        assert interrupted.type_name.endswith("SoftTimeLimitExceeded")
        assert driver.value("locks_are_free") == []


# ---- hard limits


def test_a_hard_limit_ends_a_body_stuck_in_c_and_only_it(driver, path):
    crashes = driver.health.crashes
    before, stuck, after = driver.outcomes(task("pid"), task("stuck_in_c", path, hard=0.5), task("pid"))
    assert stuck.kind is FailureKind.HARD_LIMIT
    assert value(before) != value(after)
    assert driver.health.crashes == crashes, "a planned end is no crash"


def test_a_hard_limit_ends_a_body_that_swallows_its_soft_limit(driver, path):
    stuck, after = driver.outcomes(task("stubborn", path, soft=0.1, hard=0.5), task("echo", 1))
    assert stuck.kind is FailureKind.HARD_LIMIT
    assert value(after) == 1


# ---- cancellation


def test_a_queued_task_is_cancelled_without_running(driver, path, gate, tmp_path):
    never = str(tmp_path / "never")
    first = driver.send(task("hold", path, gate), task("hold", never, never), task("echo", 1))
    wait_for(exists(path), "the body to run")
    second = driver.send(task("hold", never, never), task("echo", 2))
    first.cancel(1)
    second.cancel(0)
    open_gate(gate)
    assert kinds(first.outcomes()) == ["succeeded", FailureKind.CANCELLED, "succeeded"]
    assert kinds(second.outcomes()) == [FailureKind.CANCELLED, "succeeded"]
    assert not Path(never).exists()


@pytest.mark.parametrize("where", ["sleep", "event without end", "queue", "loop", "socket", "logging"])
def test_a_running_task_is_cancelled_and_its_executor_stays(driver, path, where):
    pid = driver.executor
    sent = driver.send(task("waits", where, path), task("pid"))
    wait_for(exists(path), "the body to run")
    sent.cancel(0)
    cancelled, good = sent.outcomes()
    assert cancelled.kind is FailureKind.CANCELLED
    assert value(good) == pid


def test_a_body_that_goes_on_after_a_cancel_is_ended_after_the_grace_time(folder, new_driver, path):
    driver = new_driver(grace_s=0.5).hello(make_config(folder))
    pid = driver.executor
    sent = driver.send(task("stubborn", path), task("pid"))
    wait_for(exists(path), "the body to run")
    sent.cancel(0)
    cancelled, good = sent.outcomes()
    assert cancelled.kind is FailureKind.CANCELLED
    assert value(good) != pid
    assert driver.health.crashes == 0


def test_cancelling_what_is_finished_or_unknown_changes_nothing(driver):
    sent = driver.send(task("echo", 1))
    assert kinds(sent.outcomes()) == ["succeeded"]
    sent.cancel(0)
    driver.shell.cancel("unknown", ["unknown"])
    assert driver.value("echo", 2) == 2


# ---- vectorised bodies


def test_a_batch_shares_one_run(driver):
    outcomes = driver.outcomes(*(task("batch_sizes", number) for number in range(20)))
    assert [value(outcome) for outcome in outcomes] == [8] * 16 + [4] * 4
    assert [outcome.batch for outcome in outcomes] == [8] * 16 + [4] * 4


def test_only_the_item_at_fault_fails(driver):
    outcomes = driver.outcomes(*(task("squares", number) for number in [1, 2, 13, -4, 5]))
    assert kinds(outcomes) == ["succeeded", "succeeded", FailureKind.RAISED, FailureKind.RAISED, "succeeded"]
    assert isinstance(exception(outcomes[2]), ValueError)
    assert isinstance(exception(outcomes[3]), OverflowError)
    assert value(outcomes[4]) == 25


def test_a_batch_that_dies_makes_suspects_and_charges_nobody(driver):
    outcomes = driver.outcomes(*(task("batch_segfault", number) for number in range(3)), task("echo", 1))
    assert kinds(outcomes) == [FailureKind.SUSPECT] * 3 + ["succeeded"]
    (alone,) = driver.outcomes(task("batch_segfault", 1))
    assert alone.kind is FailureKind.CRASHED


def test_a_withdrawn_item_does_not_shift_the_blame_in_its_batch(driver, path, gate):
    sent = driver.send(task("hold", path, gate), *(task("batch_segfault", number) for number in range(4)))
    wait_for(exists(path), "the first body to run")
    sent.cancel(2)
    open_gate(gate)
    outcomes = sent.outcomes()
    assert [outcome.kind for outcome in outcomes[2:]] == [
        FailureKind.CANCELLED,
        FailureKind.SUSPECT,
        FailureKind.SUSPECT,
    ]
    assert outcomes[1].kind is FailureKind.CRASHED, "it ran alone: the withdrawn one parts the batch"


# ---- leases, bounds, releases


def test_a_full_actor_says_busy_and_takes_nothing(folder, new_driver, path, gate):
    driver = new_driver(queued_tasks=3).hello(make_config(folder))
    first = driver.send(task("hold", path, gate), task("echo", 1))
    wait_for(exists(path), "the body to run")
    assert isinstance(driver.send(task("echo", 2), task("echo", 3)).reply, Busy)
    second = driver.send(task("echo", 4))
    open_gate(gate)
    assert kinds(first.outcomes() + second.outcomes()) == ["succeeded"] * 3
    assert driver.health.tasks == 3


def test_an_empty_actor_takes_a_call_larger_than_its_queue(folder, new_driver):
    driver = new_driver(queued_tasks=3).hello(make_config(folder))
    assert driver.values(*(task("echo", number) for number in range(10))) == list(range(10))


def test_queue_estimates_tell_what_waits(driver, path, gate):
    first = driver.send(task("hold", path, gate), estimate_s=1500.0)
    wait_for(exists(path), "the body to run")
    second = driver.send(task("echo", 1), estimate_s=2000.0)
    assert 3400.0 < second.reply.queue_s < 3500.0, "what is left of the first, and the second"
    open_gate(gate)
    first.outcomes(), second.outcomes()
    assert driver.send(task("echo", 1)).reply.queue_s == 0.0


def test_tasks_of_a_driver_whose_lease_ran_out_are_dropped(folder, new_driver, path, gate, tmp_path):
    driver = new_driver(lease_s=1.0).hello(make_config(folder))
    never = str(tmp_path / "never")
    driver.send(task("hold", path, gate), driver_id="alive")
    wait_for(exists(path), "the body to run")
    gone = driver.send(task("hold", never, never), driver_id="gone")
    deadline = time.monotonic() + 30
    while driver.health.queued and time.monotonic() < deadline:  # asking keeps this driver's own lease
        driver.shell.health("alive", "one")
        time.sleep(0.05)
    open_gate(gate)
    assert driver.value("echo", 1) == 1
    assert not Path(never).exists()
    assert kinds(gone.collect().found.values()) == [FailureKind.UNSURE], "the actor no longer knows how far it was"


def test_what_runs_of_a_driver_whose_lease_ran_out_is_interrupted(folder, new_driver, path):
    driver = new_driver(lease_s=0.5).hello(make_config(folder))
    driver.send(task("waits", "sleep", path), driver_id="gone")
    wait_for(exists(path), "the body to run")
    wait_for(lambda: not driver.health.running, "the body to end", 30)
    assert driver.value("echo", 1) == 1


def test_a_new_driver_drops_the_work_of_the_one_it_supersedes(folder, new_driver, path, gate, tmp_path):
    driver = new_driver().hello(make_config(folder))
    never = str(tmp_path / "never")
    running = driver.send(task("waits", "sleep", path), driver_id="old")
    wait_for(exists(path), "the body to run")
    queued = driver.send(task("hold", never, never), driver_id="old")
    mine = driver.send(task("echo", 1))
    driver.shell.hello("new", "old", driver.config)
    assert kinds(mine.outcomes()) == ["succeeded"]
    assert kinds(queued.collect().found.values()) == [FailureKind.UNSURE]
    assert kinds(running.collect().found.values()) == [FailureKind.UNSURE]
    assert not Path(never).exists()


def test_a_superseded_driver_that_comes_back_gets_nothing_done(folder, new_driver, tmp_path):
    driver = new_driver().hello(make_config(folder))
    driver.shell.hello("new", "old", driver.config)
    never = str(tmp_path / "never")
    (outcome,) = driver.outcomes(task("hold", never, never), driver_id="old")
    assert outcome.kind is FailureKind.LOST
    assert driver.value("echo", 1) == 1
    assert not Path(never).exists()


def test_large_outcomes_nobody_fetches_are_let_go_with_their_driver(folder, new_driver):
    driver = new_driver().hello(make_config(folder))
    one = task("big", 200_000)
    call = Call("large", "old", driver.config.release.id, (one,), 0.0)
    answers = driver.shell.run(call).answers
    while isinstance(answers[0], Pending):
        answers = driver.shell.collect(call, 1.0).answers
    assert isinstance(answers[0], Large)
    driver.shell.hello("new", "old", driver.config)
    with pytest.raises(KeyError):
        driver.shell.fetch(one.token)


def other_release(folder, name, version):
    module = f"bodies_{name}"
    text = APP.replace('VERSION = "one"', f'VERSION = "{version}"').replace('Celery("bodies"', f'Celery("{module}"')
    (folder / f"{module}.py").write_text(text)
    return make_config(folder, name, module=module, tasks=[f"{module}.{each}" for each in TASKS])


def test_two_releases_run_side_by_side_and_the_older_one_stays_until_it_is_idle(folder, new_driver, path, gate):
    driver = new_driver().hello(make_config(folder))
    held = driver.send(task("hold", path, gate))
    wait_for(exists(path), "the body to run")
    second = other_release(folder, "two", "two")
    driver.shell.hello("second", "", second)
    wait_for(lambda: driver.shell.health("second", "two").state is ActorState.READY, "the second executor")
    assert driver.health.state is ActorState.READY
    newer = driver.send(task("bodies_two.version"), release="two", driver_id="second")
    open_gate(gate)
    assert kinds(held.outcomes()) == ["succeeded"]
    assert value(newer.outcomes()[0]) == "two"
    assert driver.value("version") == "one"
    assert driver.shell.health("second", "two").executor_pid != driver.executor


def test_a_third_release_takes_the_place_of_one_nobody_waits_for(folder, new_driver):
    driver = new_driver().hello(make_config(folder))
    first = driver.executor
    for name in ("two", "three"):
        driver.hello(other_release(folder, name, name))
        assert driver.values(task(f"bodies_{name}.version")) == [name]
    assert not psutil.pid_exists(first)
    driver.hello(make_config(folder))
    assert driver.value("version") == "one"


def test_an_idle_executor_of_an_old_release_ends(folder, new_driver, monkeypatch):
    monkeypatch.setattr(children, "RETIRE_AFTER_S", 0.2)
    driver = new_driver().hello(make_config(folder))
    first = driver.executor
    driver.hello(other_release(folder, "two", "two"))
    wait_for(lambda: not psutil.pid_exists(first), "the old executor to end")
    assert driver.values(task("bodies_two.version")) == ["two"]


def test_an_old_release_is_served_as_long_as_its_driver_lives(folder, new_driver, monkeypatch):
    """A worker of an older release that has been idle must find its actor usable, whoever came later."""
    monkeypatch.setattr(children, "RETIRE_AFTER_S", 0.2)
    driver = new_driver().hello(make_config(folder))
    for number, name in enumerate(("two", "three")):
        driver.shell.hello(f"other {number}", "", other_release(folder, name, name))
        wait_for(lambda name=name: driver.shell.health("other", name).executor_pid, f"the executor of {name}")
    wait_for(lambda: driver.health.executor_pid == 0, "the first executor to make room for the third")
    assert driver.health.state is ActorState.READY, "or its driver would never send the call that starts it again"
    assert driver.value("version") == "one"


def test_an_actor_that_was_restarted_says_that_it_knows_nobody(folder, new_driver):
    restarted = new_driver().hello(make_config(folder))
    health = restarted.shell.health("somebody", "a release from before")
    assert health.knows_release is False
    assert restarted.health.knows_release is True


# ---- start-up that fails


def failing(folder, name, gate):
    text = f"import os\nif not os.path.exists({gate!r}):\n    raise RuntimeError('the licence server is away')\n"
    (folder / f"failing_{name}.py").write_text(text + "from bodies import app\n")
    return make_config(folder, name, module=f"failing_{name}", tasks=["echo"])


def test_a_failing_import_is_reported_and_tried_again(folder, new_driver, monkeypatch, gate):
    monkeypatch.setattr(children, "BACKOFF_S", (0.05, 0.2))
    driver = new_driver().hello(failing(folder, "import", gate), ready=False)
    wait_for(lambda: driver.health.failed_starts >= 2, "a second attempt")
    assert driver.health.state is ActorState.FAILING
    assert "RuntimeError: the licence server is away" in driver.health.reason
    open_gate(gate)
    wait_for(lambda: driver.health.state is ActorState.READY, "the executor")
    assert driver.health.failed_starts == 0
    assert driver.value("echo", 1) == 1


def test_calls_are_handed_back_when_their_executor_does_not_start(folder, new_driver, monkeypatch, gate):
    monkeypatch.setattr(children, "BACKOFF_S", (0.05, 0.2))
    driver = new_driver().hello(failing(folder, "handed", gate), ready=False)
    (outcome,) = driver.outcomes(task("echo", 1))
    assert outcome.kind is FailureKind.LOST
    assert "the licence server is away" in outcome.message


def test_a_task_the_imported_app_lacks_is_said_at_start(folder, new_driver):
    driver = new_driver().hello(make_config(folder, tasks=["echo", "vanished"]), ready=False)
    wait_for(lambda: driver.health.failed_starts, "a failed start")
    assert "bodies.vanished" in driver.health.reason


def test_cuda_that_cannot_be_had_is_said_at_start(folder, new_driver):
    pytest.importorskip("cupy")
    driver = new_driver().hello(make_config(folder, device="cuda"), ready=False)
    wait_for(lambda: driver.health.failed_starts or driver.health.state is ActorState.READY, "a failed start")
    if driver.health.state is not ActorState.READY:
        assert "DeviceUnusable" in driver.health.reason


def test_a_process_that_dies_while_it_starts_is_reported_with_its_step(folder, new_driver):
    (folder / "dying.py").write_text("import os\nos._exit(9)\n")
    driver = new_driver().hello(make_config(folder, "dying", module="dying", tasks=["echo"]), ready=False)
    wait_for(lambda: driver.health.failed_starts, "a failed start")
    assert "importing the app" in driver.health.reason
    assert "exit code 9" in driver.health.reason


# ---- the end


def test_a_draining_actor_waits_until_large_outcomes_are_fetched(folder, new_driver):
    driver = new_driver().hello(make_config(folder))
    one = task("big", 200_000)
    call = Call("large", driver.id, driver.config.release.id, (one,), 0.0)
    reply = driver.shell.run(call)
    while any(isinstance(answer, Pending) for answer in reply.answers):
        reply = driver.shell.collect(call, 0.1)
    driver.shell.drain()
    assert driver.health.state is ActorState.DRAINING
    with driver.shell._lock:
        assert not driver.shell._is_over()
    driver.shell.fetch(one.token)
    wait_for(lambda: driver.shell._is_over(), "the actor to be done")


def test_a_draining_actor_finishes_what_it_has_and_takes_no_more(folder, new_driver, path, gate):
    driver = new_driver().hello(make_config(folder))
    held = driver.send(task("hold", path, gate), task("echo", 1))
    wait_for(exists(path), "the body to run")
    driver.shell.drain()
    assert isinstance(driver.send(task("echo", 2)).reply, Busy)
    assert not driver.abandoned.is_set()
    open_gate(gate)
    assert kinds(held.outcomes()) == ["succeeded", "succeeded"]
    assert driver.health.state is ActorState.DRAINING  # it ends when its drivers know
    assert driver.abandoned.wait(30)


def test_an_actor_nobody_asks_for_ends_itself(folder, new_driver):
    driver = new_driver(keep_warm_s=1.0).hello(make_config(folder))
    assert driver.value("echo", 1) == 1
    assert not driver.abandoned.is_set()
    assert driver.abandoned.wait(30)


def test_an_actor_that_is_asked_stays(folder, new_driver):
    driver = new_driver(keep_warm_s=1.0).hello(make_config(folder))
    for _ in range(25):
        assert driver.health.state is ActorState.READY
        assert not driver.abandoned.wait(0.1)


# ---- leaks and storms


def test_crashes_leave_no_descriptor_and_no_process_behind(folder, new_driver):
    driver = new_driver().hello(make_config(folder))
    driver.outcomes(task("segfault"), task("echo", 1))
    actor = psutil.Process()
    before, processes = actor.num_fds(), len(actor.children())
    for _ in range(4):
        driver.outcomes(task("segfault"), task("echo", 1))
    assert actor.num_fds() <= before
    assert len(actor.children()) <= processes


def test_interrupts_never_hit_another_task_and_leave_no_lock_held(driver):
    """Thousands of short bodies inside logging, locks and queues, with cancels and soft limits at random moments."""
    dice = random.Random(7)
    pid = driver.executor
    interrupted = 0
    for _round in range(40):
        tasks = []
        for number in range(50):
            soft = dice.uniform(0.0005, 0.004) if dice.random() < 0.3 else None
            tasks.append(task("busy_with_locks", number, soft=soft))
        sent = driver.send(*tasks)
        wanted = set()
        while sent.pending:
            index = dice.randrange(50)
            wanted.add(index)
            sent.cancel(index)
            sent.collect(dice.uniform(0, 0.02))
        for index, outcome in enumerate(sent.outcomes()):
            if not isinstance(outcome, Failed):
                assert value(outcome) == index
            elif outcome.kind is FailureKind.CANCELLED:
                assert index in wanted, "a cancel hit a task nobody cancelled"
            else:
                assert outcome.type_name.endswith("SoftTimeLimitExceeded"), outcome
                assert tasks[index].soft_limit_s, "a soft limit hit a task that has none"
            interrupted += isinstance(outcome, Failed)
    assert interrupted > 100, "hardly anything was interrupted: the test tests nothing"
    assert driver.value("locks_are_free") == []
    assert driver.executor == pid


# ---- one call for a body that takes its time; what stands behind a slow one


def test_a_call_of_one_long_body_is_answered_once(driver):
    call = Call(uuid.uuid4().hex, driver.id, driver.config.release.id, (task("naps", 0.2),), 0.2)
    (answer,) = driver.shell.run(call, wait_s=60.0).answers
    assert isinstance(answer, Succeeded), "no Pending that would have to be asked for again"


def test_a_cancellation_that_overtakes_its_call_is_not_lost(driver, path):
    call = Call(uuid.uuid4().hex, driver.id, driver.config.release.id, (task("touch", str(path)),), 0.0)
    driver.shell.cancel(call.id, [call.tasks[0].token])
    (answer,) = driver.shell.run(call, wait_s=60.0).answers
    assert kinds([answer]) == [FailureKind.CANCELLED]
    assert not Path(path).exists()


def test_tasks_behind_a_slow_one_come_back_while_it_runs(driver, folder, path, tmp_path):
    marks = [str(tmp_path / f"ran{number}") for number in range(3)]
    tasks = (task("echo", 1), task("waits_for", str(path)), *[task("touch", mark) for mark in marks])
    call = Call(uuid.uuid4().hex, driver.id, driver.config.release.id, tasks, 0.001, may_part=True)
    found = {}

    def take(reply):
        found.update({answer.token: answer for answer in reply.answers if not isinstance(answer, Pending)})

    take(driver.shell.run(call))
    while len(found) < 4:
        take(driver.shell.collect(call, 60.0))
    assert kinds([found[each.token] for each in tasks[2:]]) == [FailureKind.HELD_UP] * 3
    assert tasks[1].token not in found, "the slow one runs on"
    Path(path).touch()
    while len(found) < 5:
        take(driver.shell.collect(call, 60.0))
    assert value(found[tasks[0].token]) == 1 and isinstance(found[tasks[1].token], Succeeded)
    assert not any(Path(mark).exists() for mark in marks), "what came back has not run here"


def test_a_body_beyond_its_estimate_keeps_the_actor_busy_until_it_ends(driver, path, gate):
    assert driver.health.queue_s == 0
    held = driver.send(task("hold", path, gate), estimate_s=0.001)
    wait_for(lambda: driver.health.queue_s >= LIMITS.lease_s, "the actor to say that it is busy for long")
    open_gate(gate)
    held.outcomes()
    assert driver.health.queue_s == 0


def test_tasks_of_one_run_do_not_part(driver, path):
    tasks = (task("waits_for", str(path)), task("echo", 1))
    sent = driver.send(*tasks)
    for _ in range(3):
        sent.collect(0.2)
    assert not sent.found
    Path(path).touch()
    assert kinds(sent.outcomes()) == ["succeeded"] * 2


def call_of(driver, estimate_s, waits_s, *tasks):
    return Call(uuid.uuid4().hex, driver.id, driver.config.release.id, tasks, estimate_s, True, waits_s)


def test_a_call_queued_behind_a_slow_short_one_comes_back(driver, path):
    slow = call_of(driver, 0.001, 0.0, task("waits_for", str(path)))
    behind = call_of(driver, 0.001, 0.001, task("echo", 1))
    driver.shell.run(slow)
    reply = driver.shell.run(behind, wait_s=60.0)
    assert kinds(reply.answers) == [FailureKind.HELD_UP]
    assert reply.queue_s >= LIMITS.lease_s, "and its driver hears how long the actor will be busy"
    Path(path).touch()
    (answer,) = driver.shell.collect(slow, 60.0).answers
    assert isinstance(answer, Succeeded)


def test_a_call_whose_driver_did_not_know_of_a_long_one_comes_back_at_once(driver, path, gate):
    """Another driver's long call, of which this one has not heard yet: its own may find another actor free."""
    held = driver.send(task("hold", path, gate), estimate_s=3600.0)
    reply = driver.shell.run(call_of(driver, 0.001, 0.0, task("echo", 1)), wait_s=60.0)
    assert kinds(reply.answers) == [FailureKind.HELD_UP]
    assert 3000.0 < reply.queue_s < 3600.0, "what is left of it"
    knows = call_of(driver, 0.001, reply.queue_s, task("echo", 1))
    (answer,) = driver.shell.run(knows, wait_s=0.5).answers
    assert isinstance(answer, Pending), "no other is free, and it says so: it stays"
    open_gate(gate)
    assert kinds(driver.shell.collect(knows, 60.0).answers) == ["succeeded"]
    held.outcomes()


def test_behind_a_late_call_whose_end_recedes_a_call_that_knows_stays(driver, path, gate):
    held = driver.send(task("hold", path, gate), estimate_s=0.001)
    wait_for(exists(path), "the body to run")
    driver.shell._active.entry.started_at -= 100.0
    heard_s = driver.health.queue_s
    assert heard_s >= 100.0, "as long again as it has run"
    under_way_s = 1.0  # in which the driver expects as much less, and the actor as much more
    driver.shell._active.entry.started_at -= under_way_s
    knows = call_of(driver, 0.001, heard_s - under_way_s, task("echo", 1))
    (answer,) = driver.shell.run(knows, wait_s=0.3).answers
    assert isinstance(answer, Pending)
    open_gate(gate)
    assert kinds(driver.shell.collect(knows, 60.0).answers) == ["succeeded"]
    held.outcomes()


# ---- the end of an idle actor


def test_an_idle_actor_ends_when_its_drivers_know_it(folder, new_driver):
    driver = new_driver(keep_idle_s=0.5).hello(make_config(folder))
    wait_for(lambda: driver.shell._leases.is_closing, "the idle actor to close")
    assert not driver.abandoned.wait(2 * leases.REPLY_LEAVES_S), "a call may be on its way"
    late = Call(uuid.uuid4().hex, driver.id, driver.config.release.id, (task("echo", 1),), 0.001)
    assert isinstance(driver.shell.run(late), Busy), "and is told to go elsewhere"
    assert driver.health.state == "draining"
    assert driver.abandoned.wait(60)


def test_an_actor_with_work_is_not_idle(folder, new_driver, path, gate):
    driver = new_driver(keep_idle_s=0.5).hello(make_config(folder))
    held = driver.send(task("hold", path, gate))
    wait_for(exists(path), "the body to run")
    for _ in range(5):
        held.collect(0.1)
    assert not driver.shell._leases.is_closing
    open_gate(gate)
    held.outcomes()
    wait_for(lambda: driver.shell._leases.is_closing, "the idle actor to close")


def test_a_call_whose_reply_was_lost_is_forgotten(driver, path, gate):
    lost = driver.send(task("hold", path, gate))
    wait_for(exists(path), "the body to run")
    driver.shell.forget(lost.call.id, [each.token for each in lost.call.tasks])
    assert driver.value("echo", 2) == 2, "its body was interrupted"
    assert not driver.shell._entries


def test_large_outcomes_whose_reply_was_lost_are_not_kept(folder, new_driver):
    """Its driver never asks for them, and the actor could not end; those it has heard of, it may still fetch."""
    driver = new_driver(inline_bytes=0).hello(make_config(folder))
    driver.value("echo", 0)
    call = call_of(driver, 0.1, 0.0, task("echo", 1), task("echo", 2))
    driver.shell.run(call, wait_s=60.0)
    while len(driver.shell._large) < 2:
        driver.shell.collect(call, 60.0)
    heard, unheard = (each.token for each in call.tasks)
    driver.shell.forget(call.id, [unheard])
    assert list(driver.shell._large) == [heard]
    driver.shell.fetch(heard)


def test_large_outcomes_of_a_call_that_was_dropped_are_not_kept(folder, new_driver, path, gate):
    """A thread of the actor may still wait for them; nobody would fetch them, and the actor could never end."""
    driver = new_driver(inline_bytes=0).hello(make_config(folder))
    held = driver.send(*(task("batch_hold", path, gate) for _ in range(2)))  # a shared run is not interrupted
    wait_for(exists(path), "the body to run")
    entry = driver.shell._entries[held.call.id]
    collecting = threading.Thread(target=driver.shell.collect, args=(held.call, 60.0))
    collecting.start()
    wait_for(lambda: entry.changed._waiters, "somebody to ask for outcomes")
    driver.shell.hello("another", driver.id, driver.config)
    open_gate(gate)
    collecting.join(30)
    assert len(entry._undelivered) < 2, "or nothing large was ever delivered"
    assert not driver.shell._large
