"""In the worker: every GPU request until its driver has answered it, and what becomes of it when the driver dies.

Used on the worker's main thread only. A driver that dies takes only started tasks with it, and those follow Celery's
rules for a lost worker; what had not started goes to the next driver. The process itself is `driver_process.py`.
"""

import logging
import math
import signal
import time
from collections.abc import Callable
from typing import Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.exceptions import Terminated, WorkerLostError

from bridge.errors import ClusterUnavailable, GpuOutOfMemory
from bridge.link import (
    Accepted,
    Cancel,
    Discard,
    Done,
    Ended,
    Flush,
    Flushed,
    RestartActors,
    Returned,
    Run,
    SoftLimited,
    Stop,
    TimedOut,
    Unreadable,
    Withdraw,
)
from bridge.settings import Settings
from bridge.worker.driver_process import Death, DriverProcess, call_back, nothing

logger = logging.getLogger(__name__)

#: A driver that has been silent for this long after a hard limit has passed is ended.
BACKSTOP_S = 30.0
#: A request that this many drivers had when they died is lost, too, though it never started: it may be why they died.
#: Drivers that ended with their cluster, or were not let in, are not counted: they have said why.
MAX_LOST = 5


class GpuRequest:
    """A GPU task in the worker's hands, from `apply_async` to its answer; Celery keeps only a weak reference."""

    def __init__(self, run: Run, callbacks: dict[str, Any], supervisor: "DriverSupervisor") -> None:
        self.run = run
        self.supervisor = supervisor  # of the driver it goes to
        self.accepted = False  # its call is with an actor
        self.announced = False  # Celery has been told so, once
        self.cancelled = False  # Celery does not want it any more
        self.is_sent = False  # the driver has it
        self.overdue_at = math.inf  # its hard limit has passed by then, and more than that
        self.on_accepted: Callable[[], None] = nothing
        self.on_end: Callable[[], None] = nothing
        self.on_given_back: Callable[[], None] | None = None  # wanted back: called if it has not started
        self.callbacks = callbacks

    def terminate(self, signum: int) -> None:
        """Cancel this one task; called by Celery on revoke and on cold shutdown, also from signal handlers."""
        self.cancelled = True
        self.supervisor.cancel(self, signum)


class DriverSupervisor:
    """The requests that one driver has, or that wait for it; the driver itself is its `process`."""

    def __init__(self, app: Any, hostname: str, settings: Settings, label: str = "GpuDriver") -> None:
        self._app = app
        self._settings = settings
        self._requests: dict[int, GpuRequest] = {}
        self._serial = 0
        self._hub_uses = 0
        self._giving_back = False
        self._restarting = False
        self._unsettled: set[int] = set()  # restarting: the driver has not said whether these have started
        self.process = DriverProcess(app, hostname, settings, label, self._on_start, self._take, self._on_death)

    @property
    def in_flight(self) -> int:
        """Requests not answered yet."""
        return len(self._requests)

    @property
    def running(self) -> int:
        """Requests whose call has left for an actor."""
        return sum(request.accepted for request in self._requests.values())

    def register(self, hub: Any) -> None:
        """Serve the link on the worker's event loop; again after each reconnect to the broker."""
        self._hub_uses += 1
        hub.call_later(BACKSTOP_S, self._enforce, hub, self._hub_uses)
        self.process.register(hub)

    def restart_if_due(self) -> None:
        """Outside the event loop: start the next driver when its pause is over and somebody waits for it."""
        if self._requests:
            self.process.restart_if_due()

    def _send(self, message: Any) -> None:
        self.process.send(message, at_once=not self._requests)  # a task that is alone leaves at once

    # ---- requests

    def apply(self, run: dict[str, Any], callbacks: dict[str, Any]) -> GpuRequest:
        """Send a request to the driver. Whatever pickling it raises passes through, and nothing is kept."""
        self._serial += 1
        request = GpuRequest(Run(serial=self._serial, lost=0, **run), callbacks, self)
        if self._giving_back:  # an ETA task that is due while the worker drains stays in the broker
            return request
        if self.process.is_linked and not self._restarting:
            self._send(request.run)
            request.is_sent = True
        self._requests[self._serial] = request
        return request

    def _on_start(self) -> None:
        """A driver is there, and gets what waits for it."""
        for request in list(self._requests.values()):
            self._settle_or_send(request)
        if self._giving_back:
            self._send(Flush(ends=True))

    def _settle_or_send(self, request: GpuRequest) -> None:
        """A driver is there, or is to come: what Celery does not want any more ends here."""
        if request.cancelled:
            del self._requests[request.run.serial]
            call_back(request.callbacks["error_callback"], _einfo(Terminated(signal.SIGTERM)))
            call_back(request.on_end)
        elif request.on_given_back:
            del self._requests[request.run.serial]
            call_back(request.on_given_back)
        elif self.process.is_linked and not self._restarting:
            request.is_sent = True
            self._send(request.run)

    def withdraw(self, request: GpuRequest, on_given_back: Callable[[], None]) -> None:
        """Take a request back if it has not started, and only then call `on_given_back`, in place of its `on_end`."""
        if request.on_given_back or request.run.serial not in self._requests:
            return
        request.on_given_back = on_given_back
        if request.is_sent:
            self._send(Withdraw(request.run.serial))
        else:
            self._settle_or_send(request)

    def give_back(self) -> None:
        """Before the end: let the driver drop what has not started; the broker will deliver it elsewhere."""
        self._giving_back = True
        if not self.process.is_linked:
            self.flush_requests()
        else:
            self._send(Flush(ends=True))

    def flush_requests(self) -> None:
        """Drop what has not started, at once: its connection is gone, the broker will deliver it again."""
        for serial, request in list(self._requests.items()):
            if not request.announced:  # what was announced may have been acknowledged: the broker has it no more
                del self._requests[serial]
        self._unsettled &= self._requests.keys()
        self._end_if_finished()
        self._send(Flush())
        self.process.flush()  # now: the event loop rests while Celery connects again, and actors would go on with it

    def cancel(self, request: GpuRequest, signum: int) -> None:
        """The request is no longer wanted."""
        if request.run.serial not in self._requests or self.process.is_busy:
            return
        if request.is_sent:
            self._send(Cancel(request.run.serial, signum))
        else:
            self._settle_or_send(request)

    def restart(self) -> None:
        """Start another driver when what has started is finished; what has not, and what comes, waits for it."""
        if self.process.is_linked and not self._restarting:
            self._restarting = True
            self._unsettled = {serial for serial, request in self._requests.items() if not request.announced}
            self._send(Flush())
            self._end_if_finished()

    def _end_if_finished(self) -> None:
        """Restarting: end the driver when it has nothing in hand that has started."""
        if self._restarting and not self.running and not self._unsettled:
            self._send(Stop())  # its end is read from the link, and the next one gets all requests

    def restart_actors(self) -> bool:
        """Let the driver restart the actors, one at a time; False while there is no driver."""
        if not self.process.is_linked:
            return False
        self._send(RestartActors())
        return True

    def discard(self, refs: tuple[Any, ...]) -> bool:
        """Let the driver delete data by reference; False while there is no driver."""
        if not self.process.is_linked or self.process.is_stopping:
            return False
        self._send(Discard(refs))
        return True

    # ---- answers

    def _take(self, message: Any) -> None:
        """What the driver says of a request."""
        request = self._requests.get(message.serial)
        self._unsettled.discard(message.serial)
        if request is None:
            if isinstance(message, Accepted):
                self._send(Cancel(message.serial))  # it was dropped here while its call left
            self._end_if_finished()
            return
        if isinstance(message, Accepted):
            self._on_accepted(request, message.at)
            return
        if isinstance(message, SoftLimited):
            call_back(request.callbacks["timeout_callback"], True, message.limit_s)
            return
        if isinstance(message, Returned):
            request.accepted = False
            self._end_if_finished()
            return
        if isinstance(message, Flushed) and self._restarting and not self._giving_back:
            request.is_sent = False
            if request.on_given_back:
                self._settle_or_send(request)
            self._end_if_finished()
            return
        del self._requests[message.serial]
        callbacks = request.callbacks  # none is called for Flushed: the broker still has the message
        match message:
            case Done(_, result):
                call_back(callbacks["callback"], _without_memory_error(result))
            case Ended(_, einfo):
                self._fail(request, _harmless(einfo))
            case TimedOut(_, limit_s):
                call_back(callbacks["timeout_callback"], False, limit_s)
            case Unreadable(_, reason):
                self._fail(request, _einfo(RuntimeError(f"the outcome could not be read: {reason}")))
        wanted_back = isinstance(message, Flushed) and request.on_given_back
        call_back(wanted_back or request.on_end)
        self._end_if_finished()

    def _fail(self, request: GpuRequest, einfo: Any) -> None:
        """Celery acknowledges early what was accepted, so what fails without having started is accepted first."""
        if not request.announced and not request.cancelled:
            call_back(request.callbacks["accept_callback"], self.process.pid, time.monotonic())
        call_back(request.callbacks["error_callback"], einfo)

    def _on_accepted(self, request: GpuRequest, at: float) -> None:
        request.accepted = True
        if request.announced:
            return
        request.announced, request.on_given_back = True, None
        request.run = request.run._replace(announced=True)
        call_back(request.callbacks["accept_callback"], self.process.pid, at)
        call_back(request.on_accepted)
        if request.run.hard_limit_s:
            request.overdue_at = time.monotonic() + request.run.hard_limit_s + BACKSTOP_S

    def _enforce(self, hub: Any, hub_use: int) -> None:
        """The actor enforces limits; this ends a driver that has let one pass and says nothing any more."""
        if hub_use != self._hub_uses:
            return  # the hub was registered anew, with a timer of its own
        hub.call_later(BACKSTOP_S, self._enforce, hub, hub_use)
        now = time.monotonic()
        is_silent = self.process.is_linked and self.process.silent_s > BACKSTOP_S
        if is_silent and any(now > each.overdue_at for each in self._requests.values()):
            logger.error("the GPU driver let a hard time limit pass and does not answer; it is ended")
            self.process.abort()

    # ---- death

    def _on_death(self, death: Death) -> None:
        planned, self._restarting = self._restarting, False
        code, why = death.exit_code, death.shut_out
        blames_nobody = planned or death.is_explained
        for request in self._requests.values():
            request.run = request.run._replace(lost=request.run.lost + (not blames_nobody))
        wanted = [each for each in self._requests.values() if not each.cancelled]
        lost = [each for each in wanted if each.run.lost >= MAX_LOST or (each.accepted and not self._runs_again(each))]
        logger.log(
            logging.INFO if planned and not lost else logging.ERROR,
            "the GPU driver ended (exit code %s%s): %d GPU tasks are lost, %d go to the next driver",
            code, f": {why}" if why else "", len(lost), len(wanted) - len(lost),
        )  # fmt: skip
        for request in lost:
            del self._requests[request.run.serial]
            error = WorkerLostError(f"the GPU driver (pid {death.pid}) ended with exit code {code}")
            self._fail(request, _einfo(error))
            call_back(request.on_end)
        if why and death.shut_out_s >= self._settings.cluster_wait_s:
            self._fail_what_has_waited(why)
        for request in list(self._requests.values()):
            request.is_sent = request.accepted = False
            self._settle_or_send(request)
        if self._giving_back:
            self.flush_requests()

    def _runs_again(self, request: GpuRequest) -> bool:
        """Whether a late task goes on although it is lost: Celery would acknowledge it first, and could not say so."""
        if not self.process.report.get("results"):  # they are stored
            return False
        task = self._app.tasks[request.run.task]
        return bool(task.acks_late) and task.reject_on_worker_lost is not False

    def _fail_what_has_waited(self, why: str) -> None:
        """No driver gets in: tasks have waited as for a cluster that is gone, and learn the reason."""
        for request in [each for each in self._requests.values() if not each.cancelled]:
            del self._requests[request.run.serial]
            self._fail(request, _einfo(ClusterUnavailable(why)))
            call_back(request.on_end)


def _without_memory_error(result: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    failed, value, runtime = result
    return (failed, _harmless(value), runtime) if failed else result


def _harmless(einfo: Any) -> Any:
    """Celery's worker ends itself when a task fails with MemoryError or a subclass; here such a task fails alone."""
    error = einfo.exception
    error = error.exc if isinstance(error, ExceptionWithTraceback) else error
    if isinstance(error, MemoryError):
        einfo.exception, einfo.type = GpuOutOfMemory(str(error)), GpuOutOfMemory
    return einfo


def _einfo(error: Exception) -> ExceptionInfo:
    try:
        raise error
    except Exception:
        return ExceptionInfo()
