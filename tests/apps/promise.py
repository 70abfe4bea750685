"""Every body twice, as GPU task ``gpu.NAME`` and as CPU task ``cpu.NAME``: what Celery promises, it promises for both.

Settings come from the environment as JSON. With CELERY_PROMISE_SIGNALS every process notes every signal in that file.
"""

import datetime
import functools
import gc
import json
import os
import time
from pathlib import Path

from billiard.einfo import ExceptionWithTraceback
from celery import Task, chain, current_task, signals
from celery.contrib.abortable import AbortableTask
from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, Retry, SoftTimeLimitExceeded
from celery.utils.log import get_task_logger
from celery.worker.request import Request
from pydantic import BaseModel, field_validator

from tests.apps.base import App

KINDS = ("gpu", "cpu")
QUEUE = "promise"
OTHER_QUEUE = "promise.other"  # consumed, too
PARKED = "promise.parked"  # by nobody

app = App("promise", include=["tests.apps.promise_shared"])
app.conf.update(
    task_acks_late=True,
    task_default_queue=QUEUE,
    broker_connection_retry_on_startup=True,
    **json.loads(os.environ.get("CELERY_PROMISE", "{}")),
)

logger = get_task_logger(__name__)


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


@both()
def own_errback(*args, path):
    """A task, and its own errback in the new style."""
    if len(args) == 3:
        request, error, _ = args
        note(path, f"{request.id} {error.args[0]}")
        return "as errback"
    raise PromiseError("as task")


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


# ---- bodies for retries


@both(bind=True, max_retries=3, default_retry_delay=0)
def again(self, path, how, value=0):
    """Retries once, as `how` says; returns how the second run was called."""
    request = self.request
    note(path, f"{request.retries} {value}")
    if request.retries:
        return [request.retries, value, request.delivery_info["routing_key"], request.eta is not None]
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=0.2)
    options = {
        "plain": {}, "countdown": {"countdown": 0.2}, "eta": {"eta": soon}, "queue": {"queue": OTHER_QUEUE},
        "args": {"args": (path, how, 5)}, "kwargs": {"kwargs": {"value": 6}}, "parked": {"queue": PARKED},
        "both": {"args": (path,), "kwargs": {"how": how, "value": 9}}, "unpicklable": {"exc": Unpicklable("1", two=2)},
        "parked with error": {"exc": PromiseError(8), "queue": PARKED},
    }  # fmt: skip
    if how == "not thrown":
        wanted = self.retry(throw=False, queue=PARKED)
        return ["went on", isinstance(wanted, Retry)]
    if how == "by hand":
        raise Retry("by hand", exc=PromiseError(7))
    if how == "swallowed":
        try:
            raise self.retry(queue=PARKED)
        except Retry:
            return "swallowed"
    raise self.retry(**options[how])


@both(bind=True, max_retries=2, default_retry_delay=0)
def never(self, path, how="plain"):
    """Retries for ever, or so it tries."""
    note(path, self.request.retries)
    try:
        {}["missing"]
    except KeyError as error:
        if how == "plain":
            raise self.retry()  # noqa: B904 - as users write it
        if how == "exc":
            raise self.retry(exc=PromiseError(self.request.retries)) from error
        if how == "same exc":
            raise self.retry(exc=error)  # noqa: B904
        if how == "fewer":
            raise self.retry(max_retries=1)  # noqa: B904
        try:
            raise self.retry()
        except MaxRetriesExceededError as over:
            return ["gave up", str(over).partition("[")[0], list(over.task_args), over.task_kwargs]


@both(bind=True, max_retries=None, default_retry_delay=0)
def endless(self, until):
    if self.request.retries < until:
        raise self.retry()
    return self.request.retries


@both(bind=True, acks_late=False, default_retry_delay=0)
def early(self, path):
    note(path, self.request.retries)
    if self.request.retries < 2:
        raise self.retry()
    return self.request.retries


class Temporary(PromiseError):
    """Worth another try."""


class Permanent(Temporary):
    """Not worth it."""


AUTO = {"Temporary": Temporary, "Permanent": Permanent, "KeyError": KeyError, "ValueError": ValueError}


@both(bind=True, autoretry_for=(Temporary, KeyError, Unpicklable), dont_autoretry_for=(Permanent,), max_retries=2,
      default_retry_delay=0)  # fmt: skip
def auto(self, path, name, until):
    note(path, self.request.retries)
    if self.request.retries < until:
        raise Unpicklable("odd", two=2) if name == "Unpicklable" else AUTO[name](self.request.retries)
    return self.request.retries


@both(bind=True, autoretry_for=(Exception,), retry_kwargs={"max_retries": 1, "countdown": 0})
def auto_once(self, path, how="fails"):
    note(path, self.request.retries)
    if how == "ignores":
        raise Ignore()
    if how == "retries":
        raise self.retry(countdown=0)
    raise PromiseError(self.request.retries)


@both(bind=True, autoretry_for=(SoftTimeLimitExceeded,), soft_time_limit=0.3, default_retry_delay=0)
def auto_soft(self):
    while not self.request.retries:
        time.sleep(0.01)
    return self.request.retries


def backing_off(**options):
    return both(autoretry_for=(Exception,), max_retries=9, retry_kwargs={"queue": PARKED}, **options)


@backing_off(retry_backoff=10, retry_jitter=False)
def backs_off():
    raise PromiseError(1)


@backing_off(retry_backoff=10, retry_backoff_max=15, retry_jitter=False)
def backs_off_at_most():
    raise PromiseError(1)


@backing_off(retry_backoff=True)
def backs_off_by_chance():
    raise PromiseError(1)


@both(bind=True)
def replaces_badly(self, path):
    """Nothing after a replacement runs; a replacement that makes no sense is an error."""
    if path:
        try:
            self.replace(self.app.signature(self.name.replace("replaces_badly", "same"), ("replaced",)))
            note(path, "went on")
        finally:
            note(path, "finally")
    raise self.replace(chain())


# ---- bodies for calling


@both(bind=True)
def request_of(self, *args, **kwargs):
    """The request as a body sees it, all of it."""
    return {key: value for key, value in vars(self.request).items() if not key.startswith("_")}


@both()
def clock():
    return time.time()


@both(rate_limit="60/m")
def rated():
    return time.time()


@both(typing=False)
def untyped(a, b):
    return a + b


@both(serializer="yaml")
def as_yaml(value):
    return [type(value).__name__, sorted(value)]


@both(bind=True)
def naps(self, seconds, catch=False):
    try:
        time.sleep(seconds)
    except SoftTimeLimitExceeded:
        if not catch:
            raise
        return "caught"
    return "slept"


@both(bind=True)
def logs(self, text):
    logger.warning(text)
    return [current_task.request.id, current_task.name, self.request.id]


class Hooked(Task):
    """Notes each handler with its arguments, in the file that is the first argument."""

    def _note(self, hook, path, *values):
        note(path, json.dumps([hook, os.getpid(), self.request.id, *values], default=repr))

    def before_start(self, task_id, args, kwargs):
        self.request.set_before = "red"
        self._note("before_start", args[0], task_id, args, kwargs)
        if args[1] == "before":
            raise PromiseError("before")

    def on_success(self, retval, task_id, args, kwargs):
        self._note("on_success", args[0], retval, task_id, args, kwargs)
        if args[1] == "broken":
            raise PromiseError("on_success")

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        self._note("on_failure", args[0], repr(exc), task_id, args, kwargs, "PromiseError" in str(einfo))

    def on_retry(self, exc, task_id, args, kwargs, einfo):
        self._note("on_retry", args[0], repr(exc), task_id, args, kwargs, "Retry" in str(einfo))

    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        self._note("after_return", args[0], status, repr(retval), task_id, args, kwargs, einfo)
        if args[1] == "broken":
            raise PromiseError("after_return")


@both(bind=True, base=Hooked, default_retry_delay=0)
def hooked(self, path, how, extra=None):
    note(path, json.dumps(["body", os.getpid(), self.request.id]))
    if how == "fails":
        raise PromiseError("body")
    if how == "retries" and not self.request.retries:
        raise self.retry(exc=PromiseError("again"))
    if how == "too long":
        time.sleep(60)
    return self.request.get("set_before")


class Settled(Task):
    """Notes how many objects the garbage collector never looks at, in the process that traces the task."""

    def on_success(self, retval, task_id, args, kwargs):
        note(args[0], gc.get_freeze_count())


@both(base=Settled)
def settled(path):
    """Do nothing."""


class Called(Task):
    """Surrounds the body, and keeps what was made for the first one in its process."""

    made = None

    def __call__(self, *args, **kwargs):
        if self.made is None:
            self.made = [os.getpid(), 0]
        self.made[1] += 1
        return ["around", self.request.id, super().__call__(*args, **kwargs)]


@both(bind=True, base=Called)
def called(self, value):
    return [value, os.getpid(), *self.made]


class NotingRequest(Request):
    """As in Celery's documentation: told of each task in the worker, by its first argument."""

    def _note(self, what):
        note(self.args[0], f"{what} {os.getpid()}")

    def on_accepted(self, pid, time_accepted):
        self._note("accepted")
        return super().on_accepted(pid, time_accepted)

    def on_failure(self, exc_info, send_failed_event=True, return_ok=False):
        error = exc_info.exception
        self._note(f"failure {type(error.exc if isinstance(error, ExceptionWithTraceback) else error).__name__}")
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def on_retry(self, exc_info):
        self._note("retry")
        return super().on_retry(exc_info)

    def on_timeout(self, soft, timeout):
        self._note(f"{'soft' if soft else 'hard'} {timeout:g}")
        return super().on_timeout(soft, timeout)


class Requested(Task):
    Request = "tests.apps.promise:NotingRequest"


@both(bind=True, base=Requested, default_retry_delay=0)
def requested(self, path, how=None):
    if how == "fails":
        raise PromiseError(1)
    if how == "retries" and not self.request.retries:
        raise self.retry()
    if how == "too long":
        time.sleep(60)
    return how


# ---- ways to write a task


class ClassBased(Task):
    """Celery's class-based tasks: registered by hand, options as attributes."""

    autoretry_for = (PromiseError,)
    max_retries = 2
    default_retry_delay = 0

    def __init__(self):
        self.prefix = "made once"

    def run(self, until, *, suffix="!"):
        if self.request.retries < until:
            raise PromiseError(self.request.retries)
        return [self.prefix, self.request.retries, self.name, suffix]


for each in KINDS:
    app.register_task(type("OfKind", (ClassBased,), {"name": f"{each}.class_based", "gpu": each == "gpu" or None})())


def loudly(function):
    """A decorator of the user's own."""

    @functools.wraps(function)
    def louder(*args, **kwargs):
        return f"{function(*args, **kwargs)}!"

    return louder


@both()
@loudly
def decorated(text, times=2):
    return text * times


class Order(BaseModel):
    count: int
    note: str | None = None

    @field_validator("count")
    @classmethod
    def _most(cls, value, info):
        most = (info.context or {}).get("most")
        if most is not None and value > most:
            raise ValueError(f"more than {most}")
        return value


@both(bind=True, pydantic=True, pydantic_context={"most": 5}, pydantic_dump_kwargs={"exclude_none": True})
def orders(self, order: Order, other: Order | None = None) -> Order:
    return Order(count=order.count + (other.count if other else 0), note=type(order).__name__ if other else None)


@both(pydantic=True, pydantic_strict=True)
def strictly(order: Order) -> int:
    return order.count


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
        line["said"] = {key: repr(value)[:500] for key, value in said.items()}  # one short write each
        note(SIGNALS_FILE, json.dumps(line))

    getattr(signals, name).connect(receive, weak=False)


if SIGNALS_FILE:
    for each in set(signals.__all__) - {"task_sent"}:
        if each.startswith(("task_", "worker_", "before_task_publish", "after_task_publish", "celeryd_")):
            _listen(each)
