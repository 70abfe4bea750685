"""In the driver: Celery's own tracer for each task, in a greenlet, with `forward` in the body's place.

The tracer is synchronous. A task's greenlet switches in two places only: `forward`, in the body's place, gives the loop
back until the outcome is there; and storing that outcome, before any hook, waits until the results of the loop's turn
are stored together (`results.py`). So no two tasks ever interleave inside a hook or other code of the user.
"""

import inspect
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import greenlet
from billiard.einfo import ExceptionInfo
from celery.app.trace import fast_trace_task

from actors import closed
from actors.bodies import has_custom_call, innermost, is_pydantic, replace_innermost, without_custom_call
from actors.closed import Texts
from actors.contract import Outcome, Pending, Reason
from actors.data import arrays
from actors.data.ahead import Wanted
from actors.data.arrays import ArrayRef
from actors.data.stores import worth_reading_ahead
from actors.frames import Part
from actors.validation import Check, checker
from bridge.closing import may_stay_closed
from bridge.driver.dead_letters import Crash
from bridge.driver.holders import Plan, dumps, may_stay
from bridge.driver.outcomes import grant, resolve
from bridge.errors import BridgeError, PayloadInvalid, TaskPoisoned
from bridge.link import Done, Ended, Run
from bridge.marks import MAPS, Mark

logger = logging.getLogger(__name__)

#: News of a running body that are kept in case they are its last.
LAST_WORDS = 4
#: A stretch between two switches longer than this is logged, in seconds: it stops every other GPU task of the worker.
SLOW_S = 1.0


#: Pickled arguments and request of a body, and the texts of what stays closed in it.
Payload = tuple[bytes, tuple[Part, ...]]


class TracedTask:
    """One request in the driver."""

    __slots__ = (
        "accepted",
        "alone",
        "announced",
        "attempt",
        "cancelled",
        "checks",
        "crashes",
        "fetches",
        "how",
        "large",
        "losses",
        "once",
        "payload",
        "plan",
        "refs",
        "run",
        "short_since",
        "stays",
        "token",
        "told",
        "tracer",
    )

    def __init__(self, run: Run) -> None:
        self.run = run
        self.attempt = 0
        self.token = f"{run.serial}.0"
        self.tracer: _Tracer | None = None
        self.payload: Payload | None = None  # set while `forward` waits for the outcome
        self.checks = False  # whether the executor checks the arguments
        self.accepted = False  # its call is with an actor
        self.announced = run.announced  # the worker has been told so, by this driver or an earlier one
        self.alone = False  # it was running when an executor died, alone or with others: it shares no run any more
        self.cancelled = False  # the worker has given it up: it must not run again
        self.how = Reason.CANCEL  # and in this way
        self.losses = 0
        self.once: list[ArrayRef] = []  # what is deleted when it has ended
        self.large: tuple[Wanted, ...] = ()  # what its arguments refer to in Redis, if the actor may read it ahead
        self.plan: Plan | None = None  # where it runs, once its message has been looked at for handles
        self.refs: dict[str, ArrayRef] = {}  # arrays of other actors that were fetched for it, by id of their handles
        self.fetches = False  # arrays of other actors are under way for it: the scheduler does not know it yet
        self.stays = False  # arrays in its result may stay on the device
        self.crashes: dict[str, Crash] = {}  # by execution; with those that earlier drivers have noted
        self.told: deque[bytes] = deque(maxlen=LAST_WORDS)  # news of its body that may hold its last words
        self.short_since = 0.0  # when it was first refused for want of memory


class _Tracer(greenlet.greenlet):
    """A greenlet that runs Celery's tracer for one task."""

    task: TracedTask
    refusal: BridgeError | None = None  # raised in the body's place
    forwarded = False  # the body has had its turn
    has_outcome = False  # it has ended, and the tracer has not stored its outcome yet
    checks_there = False  # arguments that came closed are checked where they are read
    waits = False  # for that to be stored: it takes no other news


class Tracing:
    """Starts, resumes and ends tracers; made on the loop's greenlet.

    Args:
        app: the Celery app.
        answer: called with a task and its `Done` or `Ended` when its tracer has returned.
        marks: the app's GPU tasks.
    """

    def __init__(self, app: Any, answer: Callable[[TracedTask, Any], None], marks: dict[str, Mark]) -> None:
        self._tasks = app.tasks  # kept: the app takes a lock for each look
        self._answer = answer
        self._staying = {name for name, mark in marks.items() if mark.gpu.result == "device"}
        self._marks = marks
        self._loop = greenlet.getcurrent()

    def start(self, task: TracedTask, refusal: BridgeError | None = None) -> None:
        """Run the tracer until the body wants its outcome, or to its end; `refusal` is raised in the body's place."""
        task.tracer = _Tracer(self._trace, parent=self._loop)
        task.tracer.task = task
        task.tracer.refusal = refusal
        self.resume(task, task)

    def resume(self, task: TracedTask, value: "Outcome | Pending | BridgeError | TracedTask") -> None:
        """Give a waiting tracer the outcome, progress, or an error of ours."""
        if not task.tracer.waits:  # type: ignore[union-attr]
            self._switch(task, value)

    def at_its_outcome(self, task_id: str) -> TracedTask | None:
        """The task whose tracer, running now, stores the outcome of its body; asked once per task."""
        tracer = greenlet.getcurrent()
        if not isinstance(tracer, _Tracer) or not tracer.has_outcome or tracer.task.run.id != task_id:
            return None
        tracer.has_outcome = False
        return tracer.task

    def has_another_outcome(self, task: TracedTask) -> None:
        """The outcome could not be stored as it was: the tracer, running now, will store an error in its place."""
        task.tracer.has_outcome = True  # type: ignore[union-attr]

    def running(self, task_id: str) -> TracedTask | None:
        """The task, if it is its tracer that runs now."""
        tracer = greenlet.getcurrent()
        return tracer.task if isinstance(tracer, _Tracer) and tracer.task.run.id == task_id else None

    def is_late(self, task: TracedTask) -> bool:
        """Whether the task's message is acknowledged when it has ended."""
        return bool(getattr(self._tasks.get(task.run.task), "acks_late", False))

    def wait(self) -> Any:
        """Called in a tracer: give the loop back until `go_on`, whose answer is returned."""
        tracer = greenlet.getcurrent()
        tracer.waits = True
        try:
            return self._loop.switch()
        finally:
            tracer.waits = False

    def go_on(self, task: TracedTask, answer: Any) -> None:
        """End the `wait` of a task's tracer, unless the tracer was ended meanwhile."""
        if task.tracer is not None and task.tracer.waits:
            self._switch(task, answer)

    def _switch(self, task: TracedTask, value: Any) -> None:
        started = time.monotonic()
        task.tracer.switch(value)  # type: ignore[union-attr]
        took = time.monotonic() - started
        if took > SLOW_S:
            name = task.run.task
            logger.warning("%s held the driver for %.1f s: its hooks or the result backend are slow", name, took)

    def stop(self, task: TracedTask) -> None:
        """End a tracer from outside: it stores nothing and answers nothing."""
        if task.tracer is not None:
            task.tracer.throw(greenlet.GreenletExit)

    def forward(self, name: str, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Stands in the body's place: gives its arguments to the call and returns what the body returned."""
        tracer = greenlet.getcurrent()
        celery_task = self._tasks[name]
        if (
            not isinstance(tracer, _Tracer)
            or (tracer.task.run.task, tracer.forwarded) != (name, False)
            or celery_task.request.called_directly
        ):
            return original(*args, **kwargs)  # a hook or an error callback calls a task as a function
        tracer.forwarded = True
        task = tracer.task
        _take_seen(task)
        if tracer.refusal is not None:
            raise _final(celery_task, tracer.refusal)
        request = vars(celery_task.request)
        task.stays = name in self._staying and may_stay(request, self._marks)
        task.payload = _payload(args, kwargs, request, task)
        task.checks = tracer.checks_there
        try:
            outcome: Outcome | Pending | BridgeError = self._loop.switch()
            while isinstance(outcome, Pending):
                for wishes in outcome.wishes:
                    grant(celery_task, wishes)
                outcome = self._loop.switch()
        finally:
            task.payload = None
        tracer.has_outcome = True
        if isinstance(outcome, BridgeError):
            raise _final(celery_task, outcome)
        try:
            return resolve(celery_task, outcome)
        except PayloadInvalid as error:  # what can be seen on the GPU node only
            raise _final(celery_task, error) from error.__cause__

    def _trace(self, task: TracedTask) -> None:
        """The greenlet's entry: nothing may leave it, for it would land in the loop and end every task in hand."""
        run = task.run
        try:
            body, content_type = run.body, run.content_type
            if isinstance(body, Texts):
                stays = may_stay_closed(self._tasks[run.task])
                body, content_type = (body.values(), None) if stays else (body.joined(), content_type)
            arrays.seen.clear()  # of a task whose check has failed
            result = fast_trace_task(run.task, run.id, run.request, body, content_type, run.content_encoding)
        except greenlet.GreenletExit:
            return  # ended from outside, and answered there
        except BaseException as error:
            self._answer(task, Ended(run.serial, einfo(error)))
        else:
            self._answer(task, Done(run.serial, result))


def _take_seen(task: TracedTask) -> None:
    """What the check has just seen is this task's; the next one, should nobody check it, would delete it."""
    task.once = [ref for ref in arrays.seen if ref.once]
    task.large = worth_reading_ahead([*arrays.seen, *task.refs.values()])
    arrays.seen.clear()


class _Final(BaseException):
    """Carries an error past Celery's autoretry, which takes any `Exception` if the user says so."""

    def __init__(self, error: BridgeError) -> None:
        super().__init__(error)
        self.error = error


def _final(task: Any, error: BridgeError) -> BaseException:
    return _Final(error) if isinstance(error, TaskPoisoned | PayloadInvalid) and hasattr(task, "_orig_run") else error


def _payload(args: Any, kwargs: Any, request: dict[str, Any], task: TracedTask) -> Payload:
    """Arguments and request of a body; hooks such as `before_start` may have added to the request that was sent."""
    context = {key: value for key, value in request.items() if key != "kwargs" and not key.startswith("_")}
    context["args"] = () if isinstance(context.get("args"), tuple) else []  # from pickle it is a tuple, else a list
    pickled = closed.dumps if closed.is_closed(args, kwargs) else lambda value: (dumps(value, task.refs), ())
    try:
        return pickled((args, kwargs, context))
    except Exception:  # what a hook has put there belongs to this process
        context = {key: value for key, value in context.items() if key in task.run.request or key == "args"}
        return pickled((args, kwargs, context))


def einfo(error: BaseException) -> ExceptionInfo:
    """What Celery's error callback takes."""
    try:
        raise error
    except BaseException:
        return ExceptionInfo()


def prepare(app: Any, marks: dict[str, Mark], forward: Callable[..., Any], validate_configured: bool) -> None:
    """Put `forward` in the place of every marked body; to be done before the first tracer is built."""
    checks = {
        name: checker(name, innermost(app.tasks[name]))
        for name, mark in marks.items()
        if validate_configured or not mark.configured
    }
    for name in [*marks, *MAPS]:
        task = app.tasks[name]
        body = innermost(task)
        has_own_check = is_pydantic(task)

        stand_in = _stand_in(forward, name, body)
        # Task.retry merges new arguments with the message's by the signature it finds.
        stand_in.__signature__ = inspect.signature(body)  # type: ignore[attr-defined]
        replace_innermost(task, stand_in)
        if hasattr(task, "_orig_run"):
            task.run = _without_final(task.run)
        if name in MAPS:
            task.run = _checked_items(checks, task.run, starred=name == "celery.starmap")
        elif name in checks and not has_own_check:
            task.run = _checked(checks[name], task.run)
        if has_custom_call(task):
            without_custom_call(task)  # it runs in the executor, around the body


def _stand_in(forward: Callable[..., Any], name: str, body: Callable[..., Any]) -> Callable[..., Any]:
    """What is called in the body's place; the body's own parameters may have any names."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return forward(name, body, *args, **kwargs)

    return stand_in


def _without_final(run: Callable[..., Any]) -> Callable[..., Any]:
    """Outside of autoretry: a task that is poisoned or can never fit ends."""

    def ended(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except _Final as final:
            raise final.error from None

    ended.__signature__ = inspect.signature(run)  # type: ignore[attr-defined]
    return ended


def _checked(check: Check, run: Callable[..., Any]) -> Callable[..., Any]:
    """Check outside of what Celery wraps around the body, so that autoretry does not retry what can never fit."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        tracer = greenlet.getcurrent()
        if isinstance(tracer, _Tracer) and closed.is_closed(args, kwargs):
            tracer.checks_there = True
        else:
            try:
                args, kwargs = check(args, kwargs)
            except PayloadInvalid:
                if isinstance(tracer, _Tracer):
                    _take_seen(tracer.task)  # it has been refused what was meant for it
                raise
        return run(*args, **kwargs)

    checked.__signature__ = inspect.signature(run)  # type: ignore[attr-defined]
    return checked


def _checked_items(checks: dict[str, Check], run: Callable[..., Any], starred: bool) -> Callable[..., Any]:
    """For `MAPS`: each item is the one argument, or if `starred` all positional ones, of the task they name."""

    def checked(task: dict[str, Any], it: Any) -> Any:
        check = checks.get(task["task"])
        if check is not None:
            rows = [check(tuple(item) if starred else (item,), {})[0] for item in it]
            it = rows if starred else [row[0] for row in rows]
        return run(task, it)

    return checked
