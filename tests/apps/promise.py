"""Every body twice, as GPU task ``gpu.NAME`` and as CPU task ``cpu.NAME``: what Celery promises, it promises for both.

Settings come from the environment as JSON. With CELERY_PROMISE_SIGNALS every process notes every signal in that file.
"""

import json
import os
import time
from pathlib import Path

from celery import Celery, Task, signals
from celery.contrib.abortable import AbortableTask
from celery.exceptions import Ignore, Reject

KINDS = ("gpu", "cpu")
QUEUE = "promise"

app = Celery("promise")
app.conf.update(
    task_acks_late=True,
    task_default_queue=QUEUE,
    broker_connection_retry_on_startup=True,
    **json.loads(os.environ.get("CELERY_PROMISE", "{}")),
)


def note(path, text):
    with open(path, "a") as file:
        file.write(f"{text}\n")


def both(**options):
    """Register the function as GPU task and as CPU task, otherwise alike."""

    def register(function):
        tasks = [app.task(name=f"gpu.{function.__name__}", gpu=True, **options)(function)]
        tasks.append(app.task(name=f"cpu.{function.__name__}", **options)(function))
        return dict(zip(KINDS, tasks, strict=True))

    return register


class PromiseError(Exception):
    """An application's own exception."""

    def __init__(self, code, reason="because"):
        super().__init__(code, reason)
        self.code = code


class Unpicklable(Exception):
    """Cannot be rebuilt from its arguments, as many libraries' exceptions."""

    def __init__(self, one, *, two):
        super().__init__(one)
        self.two = two


# ---- bodies for canvas


@both()
def add(a, b=10):
    return a + b


@both()
def same(value=None):
    return value


@both()
def total(values, plus=0):
    return sum(values) + plus


@both()
def pid(value=None):
    return os.getpid()


@both()
def pair(a, b):
    return [os.getpid(), a, b]


@both()
def fails(*args, code=1):
    raise PromiseError(code)


@both()
def notes(value, path, text=None):
    """Note `text`, or the value; return the value."""
    note(path, text or value)
    return value


@both()
def holds(gate, path=None):
    """Run until the file `gate` exists."""
    if path:
        note(path, "starts")
    while not Path(gate).exists():
        time.sleep(0.02)
    if path:
        note(path, "ends")
    return "held"


@both(time_limit=0.5)
def too_long(*args):
    time.sleep(60)


@both(bind=True)
def family(self, *args):
    request = self.request
    return [request.id, request.parent_id, request.root_id, request.group]


@both(bind=True)
def stamps(self, *args):
    return [sorted(self.request.stamped_headers or []), self.request.stamps]


@both()
def errback(request, exc, traceback, path):
    """The new style: called with the failed request."""
    note(path, f"{request.id} {type(exc).__name__} {exc.args[0]} {'raise PromiseError' in (traceback or '')}")


@both()
def old_errback(task_id, path):
    """The old style: a task of its own."""
    note(path, task_id)


@both(bind=True)
def replaces(self, *args):
    """Replaced by the signature that is its last argument."""
    raise self.replace(self.app.signature(args[-1]))


@both(bind=True)
def adds_to_chord(self, value, signature, lazy=False):
    added = self.add_to_chord(self.app.signature(signature), lazy=lazy)
    if lazy:
        added.delay()
    return value


@both(bind=True, base=AbortableTask)
def abortable(self, path):
    note(path, "starts")
    while not self.is_aborted():
        time.sleep(0.02)
    return "aborted"


# ---- bodies for outcomes and signals


class BrokenHook(Task):
    def on_failure(self, exc, task_id, args, kwargs, einfo):
        raise RuntimeError("the hook itself is broken")


@both(base=BrokenHook)
def broken_hook():
    raise PromiseError(2)


@both()
def typed(value: int):
    return value


@both(bind=True)
def ignores(self, state=None, meta=None):
    """The documented way to set a state of one's own for good."""
    if state:
        self.update_state(state=state, meta=meta)
    raise Ignore()


@both(bind=True)
def rejects(self, path=None):
    """Rejected for good, or with `path` given back once."""
    if path:
        note(path, self.request.delivery_info["redelivered"])
        if len(Path(path).read_text().split()) > 1:
            return "came again"
    raise Reject("no", requeue=bool(path))


@both(bind=True, max_retries=2)
def retries(self, until, countdown=0):
    if self.request.retries < until:
        raise self.retry(countdown=countdown, exc=PromiseError(self.request.retries))
    return self.request.retries


@both(bind=True)
def progress(self, gates, seen):
    """Says how far it is; goes on when the next of the files `gates` exists."""
    for number, gate in enumerate(gates):
        self.update_state(state="PROGRESS", meta={"done": number, "of": len(gates)})
        note(seen, number)
        while not Path(gate).exists():
            time.sleep(0.02)
    return "done"


@both(ignore_result=True)
def ignored(path, code=None):
    note(path, "ran")
    if code is not None:
        raise PromiseError(code)
    return "nobody reads it"


@both(ignore_result=True, store_errors_even_if_ignored=True)
def errors_stored(path, code=None):
    note(path, "ran")
    if code is not None:
        raise PromiseError(code)


@both(throws=(PromiseError, KeyError))
def expected_error(code):
    raise PromiseError(code)


class NoArguments(Exception):
    def __init__(self):
        super().__init__()


class Inner(ValueError):
    def __str__(self):
        raise RuntimeError("its __str__ is broken")


class OwnBase(BaseException):
    """Not an Exception."""


ERRORS = {
    "key": lambda: KeyError("k"),
    "os": lambda: FileNotFoundError(2, "no such file", "x.npy"),
    "unicode": lambda: UnicodeDecodeError("utf-8", b"ab", 0, 1, "bad"),
    "nothing": lambda: NoArguments(),
    "number": lambda: ValueError(1.5),
    "nested": lambda: PromiseError({"deep": [1, {"er": None}]}, ["why"]),
    "object": lambda: ValueError(Path("relative")),
    "group": lambda: ExceptionGroup("many", [ValueError("a"), KeyError("b")]),
    "no text": lambda: Inner("x"),
    "unpicklable": lambda: Unpicklable("one", two=2),
    "stop": lambda: StopIteration("stopped"),
    "assertion": lambda: AssertionError(),
    "timeout": lambda: TimeoutError("slow"),
    "exit": lambda: SystemExit(3),
    "interrupt": lambda: KeyboardInterrupt("stop"),
    "base": lambda: OwnBase("own"),
}


@both()
def raises(name):
    raise ERRORS[name]()


@both()
def raises_from(how):
    try:
        {}["missing"]
    except KeyError as error:
        if how == "from":
            raise PromiseError(1) from error
        if how == "from none":
            raise PromiseError(1) from None
        raise PromiseError(1)  # noqa: B904 - the point


@both()
def returns(how):
    """Values that JSON cannot carry, or only in part."""
    return {"object": Path, "tuple": (1, (2,)), "none": None, "text keys": {1: "a"}, "text": "ü☃"}[how]


@both(bind=True)
def tells_of_another(self, task_id):
    self.update_state(task_id, "SEEN", {"by": self.request.id})


@both(bind=True)
def bad_meta(self):
    self.update_state(state="PROGRESS", meta={"value": Path})
    return "went on"


# ---- signals


SIGNALS_FILE = os.environ.get("CELERY_PROMISE_SIGNALS")


def _task_id(said):
    if "task_id" in said:
        return said["task_id"]
    request = said.get("request")
    if request is not None:
        return request["id"] if isinstance(request, dict) else request.id
    if "message" in said:
        return said["message"].headers.get("id")
    if "headers" in said:
        return said["headers"]["id"]
    return getattr(getattr(said.get("sender"), "request", None), "id", None)


def _listen(name):
    def receive(signal=None, **said):
        line = {"signal": name, "pid": os.getpid(), "id": _task_id(said), "keys": sorted(said)}
        line["said"] = {key: repr(value) for key, value in said.items()}
        note(SIGNALS_FILE, json.dumps(line))

    getattr(signals, name).connect(receive, weak=False)


if SIGNALS_FILE:
    for each in set(signals.__all__) - {"task_sent"}:
        if each.startswith(("task_", "worker_", "before_task_publish", "after_task_publish", "celeryd_")):
            _listen(each)
