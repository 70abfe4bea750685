"""In the worker: starts the driver process, keeps every GPU request until it is answered, and restarts the driver.

Used on the worker's main thread only. A driver that dies takes only started tasks with it, and those follow Celery's
rules for a lost worker; what had not started goes to the next driver.
"""

import logging
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

import billiard
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.exceptions import Terminated, WorkerLostError
from celery import signals
from celery.worker import state as worker_state

from actors.contract import ActorState, Config
from bridge import driver, errors
from bridge.errors import ActorNotReady, GpuOutOfMemory, StartupError
from bridge.link import (
    Accepted,
    Cancel,
    Discard,
    Done,
    Ended,
    Flush,
    Flushed,
    Link,
    Report,
    RestartActors,
    Returned,
    Run,
    SoftLimited,
    Stop,
    TimedOut,
    Unreadable,
    Withdraw,
)
from bridge.release import make_config
from bridge.settings import Settings

logger = logging.getLogger(__name__)

#: First and longest pause before a driver that died is started again, in seconds; it grows while none gets an actor.
BACKOFF_S = (0.1, 30.0)
#: A driver that has been silent for this long after a hard limit has passed is ended.
BACKSTOP_S = 30.0
#: A request that this many drivers had when they died is lost, too, though it never started: it may be why they died.
#: Drivers that ended with their cluster, or were not let in, are not counted: they have said why.
MAX_LOST = 5
#: While the driver does not take what is written, it is offered again this often, in seconds.
FLUSH_AGAIN_S = 0.005
#: A driver told to stop gets this long.
STOP_S = 5.0


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
        self.on_accepted: Callable[[], None] = _nothing
        self.on_end: Callable[[], None] = _nothing
        self.on_given_back: Callable[[], None] | None = None  # wanted back: called if it has not started
        self.callbacks = callbacks

    def terminate(self, signum: int) -> None:
        """Cancel this one task; called by Celery on revoke and on cold shutdown, also from signal handlers."""
        self.cancelled = True
        self.supervisor.cancel(self, signum)


class DriverSupervisor:
    """One driver process and the requests it has."""

    def __init__(self, app: Any, hostname: str, settings: Settings, label: str = "GpuDriver") -> None:
        self._label = label  # its processes' name, in logs
        self._app = app
        self._config: Config | None = None
        self._hostname = hostname
        self._settings = settings
        self._requests: dict[int, GpuRequest] = {}
        self._serial = 0
        self._starts = 0
        self._failures = 0
        self._heard_at = 0.0
        self._has_reported = False  # the driver that is there now
        self._process: Any = None
        self._link: Link | None = None
        self._hub: Any = None
        self._hub_uses = 0
        self._busy = False  # inside a read or write: a signal handler must not enter a second time
        self._flushes_later = False
        self._flushes_soon = False  # in the next turn of the event loop, with all that is sent until then
        self._stopping = False
        self._giving_back = False
        self._restarting = False
        self._unsettled: set[int] = set()  # restarting: the driver has not said whether these have started
        self._restart_at: float | None = None
        self.report: dict[str, Any] = {"actors": []}
        self.on_report: Callable[[], None] = _nothing
        self._driver_id = ""
        self._start_error: tuple[str, str] | None = None
        self._shut_out_since: float | None = None  # no driver gets into the cluster: a changed token, another version

    # ---- life cycle

    def start(self, tasks: Iterable[str], share: float) -> None:
        """Start the first driver for these GPU tasks; it connects in the background. Actors reserve `share` of a GPU.

        Raises:
            AppNotImportable: an executor could not import the app.
        """
        # Once: this worker's code is what it has imported by now, whatever a deploy puts on the disk later.
        self._config = make_config(self._app, tasks, self._settings, share)
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._starts += 1
        self._has_reported = False
        name = f"{self._label}-{self._starts}"
        self._process = billiard.Process(
            target=driver.main,
            args=(self._app, self._hostname, theirs, name, self._config, self._driver_id, self._starts == 1),
            name=name,
        )
        self._process.daemon = True
        self._process.index = self._starts  # for %i in log file names
        signals.worker_before_create_process.send(sender=self)  # as before any child of the pool
        self._process.start()
        theirs.close()
        self._link = Link(ours)
        self._restart_at = None
        for request in list(self._requests.values()):
            self._settle_or_send(request)
        if self._giving_back:
            self._send(Flush(ends=True))
        self._register()

    def _settle_or_send(self, request: GpuRequest) -> None:
        """A driver is there, or is to come: what Celery does not want any more ends here."""
        if request.cancelled:
            del self._requests[request.run.serial]
            _call(request.callbacks["error_callback"], _einfo(Terminated(signal.SIGTERM)))
            _call(request.on_end)
        elif request.on_given_back:
            del self._requests[request.run.serial]
            _call(request.on_given_back)
        elif self._link is not None and not self._restarting:
            request.is_sent = True
            self._send(request.run)

    def wait_until_ready(self, say: Callable[[str], None]) -> None:
        """Serve the link until an actor is ready; after `start_wait_s` the worker goes on without.

        Args:
            say: shows a person what is being waited for.

        Raises:
            StartupError: the driver cannot start, or no actor's executor can.
            WorkerShutdown: the worker was told to stop meanwhile.
        """
        deadline = time.monotonic() + self._settings.start_wait_s
        while time.monotonic() < deadline:
            worker_state.maybe_shutdown()
            say(self._waits_for())
            if self._link is None:
                raise errors.ClusterNotFound("the GPU driver process ended while it started; its error stands above")
            select.select([self._link], [], [], 0.2)
            self.on_readable()
            if self._start_error is not None:
                name, text = self._start_error
                raise getattr(errors, name, StartupError)(text)
            actors = self.report["actors"]
            if "cluster" in self.report and self._settings.min_actors == 0:
                return  # they come with the first task
            if any(actor["state"] == ActorState.READY for actor in actors):
                return
            failed = [actor for actor in actors if actor.get("failed_starts", 0) >= 3]
            if failed and len(failed) == len(actors):
                raise ActorNotReady(f"GPU actors do not start: {failed[0]['reason']}")

    def register(self, hub: Any) -> None:
        """Serve the link on the worker's event loop; again after each reconnect to the broker."""
        self._hub = hub
        self._flushes_later = self._flushes_soon = False  # a lost connection may have taken our timers with its own
        self._hub_uses += 1
        hub.call_later(BACKSTOP_S, self._enforce, self._hub_uses)
        if self._restart_at is not None:
            hub.call_later(max(0.0, self._restart_at - time.monotonic()), self._restart)
        self._register()

    def stop(self) -> None:
        """End the driver; it leaves its actors warm."""
        self.say_stop()
        if self._process is not None:
            self._process.join(STOP_S)
            self.kill()

    def say_stop(self) -> None:
        """Tell the driver to end, and wait for nothing."""
        if not self._stopping and self._link is not None and not self._busy:
            self._link.send(Stop())
            self.flush()  # the event loop, which flushes otherwise, has ended
        self._stopping = True

    def restart(self) -> None:
        """Start another driver when what has started is finished; what has not, and what comes, waits for it."""
        if self._link is not None and not self._restarting:
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
        if self._link is None:
            return False
        self._send(RestartActors())
        return True

    def discard(self, refs: tuple[Any, ...]) -> bool:
        """Let the driver delete data by reference; False while there is no driver."""
        if self._link is None or self._stopping:
            return False
        self._send(Discard(refs))
        return True

    def kill(self) -> None:
        """End the driver at once."""
        self._stopping = True
        if self._process is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.join(STOP_S)
        self._close_link()

    @property
    def pid(self) -> int | None:
        """The driver's process id."""
        return self._process.pid if self._process is not None else None

    @property
    def heard_at(self) -> float | None:
        """When the driver last said something, as `time.monotonic`; None before its first report and without one."""
        return self._heard_at if self._link is not None and self._has_reported else None

    @property
    def in_flight(self) -> int:
        """Requests not answered yet."""
        return len(self._requests)

    @property
    def running(self) -> int:
        """Requests whose call has left for an actor."""
        return sum(request.accepted for request in self._requests.values())

    @property
    def can_drain(self) -> bool:
        """Whether `serve` may be called here: not from a signal handler that interrupted this object."""
        return not self._busy

    @property
    def is_linked(self) -> bool:
        """Whether there is a driver to read from; then `fileno` may be polled."""
        return self._link is not None

    def fileno(self) -> int:
        """The link's descriptor."""
        return self._link.fileno() if self._link is not None else -1

    def restart_if_due(self) -> None:
        """Outside the event loop: start the next driver when its pause is over and somebody waits for it."""
        if self._restart_at is not None and time.monotonic() >= self._restart_at and self._requests:
            self._start()

    # ---- requests

    def apply(self, run: dict[str, Any], callbacks: dict[str, Any]) -> GpuRequest:
        """Send a request to the driver. Whatever pickling it raises passes through, and nothing is kept."""
        self._serial += 1
        request = GpuRequest(Run(serial=self._serial, lost=0, **run), callbacks, self)
        if self._giving_back:  # an ETA task that is due while the worker drains stays in the broker
            return request
        if self._link is not None and not self._restarting:
            self._send(request.run)
            request.is_sent = True
        self._requests[self._serial] = request
        return request

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
        if self._link is None:
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
        self.flush()  # now: the event loop rests while Celery connects again, and actors would go on with it

    def cancel(self, request: GpuRequest, signum: int) -> None:
        """The request is no longer wanted."""
        if request.run.serial not in self._requests or self._busy:
            return
        if request.is_sent:
            self._send(Cancel(request.run.serial, signum))
        else:
            self._settle_or_send(request)

    # ---- the link

    def _register(self) -> None:
        if self._hub is not None and self._link is not None:
            self._hub.add_reader(self._link.fileno(), self._on_event)
            self.flush()

    def _on_event(self, *_: Any) -> None:
        self.on_readable()

    def _send(self, message: Any) -> None:
        if self._link is not None:
            self._link.send(message)
            if self._hub is None or not self._requests:
                self.flush()  # nothing else is in hand: a task that is alone leaves at once
            elif not self._flushes_soon:
                self._flushes_soon = True
                self._hub.call_soon(self.flush)

    def flush(self) -> None:
        """Write what the link takes; the rest a little later."""
        self._flushes_soon = False
        if self._link is None or self._busy:
            return
        self._busy = True
        try:
            written = self._link.flush()
        except ConnectionError:
            written = True  # the reader sees the end, too
        finally:
            self._busy = False
        if not written and self._hub is not None and not self._flushes_later:
            # Not by a writer on the hub: kombu ignores one on a descriptor that has a reader, and nothing would go on.
            self._flushes_later = True
            self._hub.call_later(FLUSH_AGAIN_S, self._flush_again)

    def _flush_again(self) -> None:
        self._flushes_later = False
        self.flush()

    def on_readable(self) -> None:
        """Take what the driver has sent."""
        if self._link is None or self._busy:
            return
        self._busy = True
        try:
            received = self._link.receive()
        except EOFError:
            received = None
        finally:
            self._busy = False
        if received is None:
            self._on_death()
            return
        self._heard_at = time.monotonic()
        for message in received:
            self._handle(message)

    def _handle(self, message: Any) -> None:
        if isinstance(message, Report):
            self.report = message.fleet
            self._has_reported = True
            self._driver_id = message.fleet.get("driver_id", "")
            self._start_error = message.error
            if any(actor["state"] == ActorState.READY for actor in message.fleet["actors"]):
                self._failures = 0  # it has started well: should it die, the next one need not wait
                self._shut_out_since = None
            _call(self.on_report)
            return
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
            _call(request.callbacks["timeout_callback"], True, message.limit_s)
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
                _call(callbacks["callback"], _without_memory_error(result))
            case Ended(_, einfo):
                self._fail(request, _harmless(einfo))
            case TimedOut(_, limit_s):
                _call(callbacks["timeout_callback"], False, limit_s)
            case Unreadable(_, reason):
                self._fail(request, _einfo(RuntimeError(f"the outcome could not be read: {reason}")))
        wanted_back = isinstance(message, Flushed) and request.on_given_back
        _call(wanted_back or request.on_end)
        self._end_if_finished()

    def _fail(self, request: GpuRequest, einfo: Any) -> None:
        """Celery acknowledges early what was accepted, so what fails without having started is accepted first."""
        if not request.announced and not request.cancelled:
            _call(request.callbacks["accept_callback"], self.pid, time.monotonic())
        _call(request.callbacks["error_callback"], einfo)

    def _on_accepted(self, request: GpuRequest, at: float) -> None:
        request.accepted = True
        if request.announced:
            return
        request.announced, request.on_given_back = True, None
        request.run = request.run._replace(announced=True)
        _call(request.callbacks["accept_callback"], self.pid, at)
        _call(request.on_accepted)
        if request.run.hard_limit_s:
            request.overdue_at = time.monotonic() + request.run.hard_limit_s + BACKSTOP_S

    def _enforce(self, hub_use: int) -> None:
        """The actor enforces limits; this ends a driver that has let one pass and says nothing any more."""
        if hub_use != self._hub_uses:
            return  # the hub was registered anew, with a timer of its own
        self._hub.call_later(BACKSTOP_S, self._enforce, hub_use)
        now = time.monotonic()
        is_silent = now - self._heard_at > BACKSTOP_S
        if is_silent and self._link is not None and any(now > each.overdue_at for each in self._requests.values()):
            logger.error("the GPU driver let a hard time limit pass and does not answer; it is ended")
            os.kill(self._process.pid, signal.SIGKILL)

    # ---- death

    def _on_death(self) -> None:
        self._close_link()
        self._process.join(STOP_S)
        code = self._process.exitcode
        if self._stopping:
            return
        planned, self._restarting = self._restarting, False
        why = self._start_error[1] if code == driver.EXIT_NOT_STARTED and self._start_error else ""
        blames_nobody = planned or code in (driver.EXIT_CLUSTER_LOST, driver.EXIT_NOT_STARTED)
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
            error = WorkerLostError(f"the GPU driver (pid {self._process.pid}) ended with exit code {code}")
            self._fail(request, _einfo(error))
            _call(request.on_end)
        if why:
            self._fail_what_has_waited(why)
        for request in list(self._requests.values()):
            request.is_sent = request.accepted = False
            self._settle_or_send(request)
        self.report = {**self.report, "actors": [], "results": ""}
        if self._giving_back:
            self.flush_requests()
        self._schedule_restart()

    def _runs_again(self, request: GpuRequest) -> bool:
        """Whether a late task goes on although it is lost: Celery would acknowledge it first, and could not say so."""
        if not self.report.get("results"):  # they are stored
            return False
        task = self._app.tasks[request.run.task]
        return bool(task.acks_late) and task.reject_on_worker_lost is not False

    def _fail_what_has_waited(self, why: str) -> None:
        """No driver gets in: tasks wait as for a cluster that is gone, and then learn the reason."""
        now = time.monotonic()
        self._shut_out_since = self._shut_out_since or now
        if now - self._shut_out_since < self._settings.cluster_wait_s:
            return
        for request in [each for each in self._requests.values() if not each.cancelled]:
            del self._requests[request.run.serial]
            self._fail(request, _einfo(errors.ClusterUnavailable(why)))
            _call(request.on_end)

    def _schedule_restart(self) -> None:
        first, longest = BACKOFF_S
        pause = min(longest, first * 2**self._failures)
        self._failures += 1
        self._restart_at = time.monotonic() + pause
        if self._hub is not None:
            self._hub.call_later(pause, self._restart)

    def _restart(self) -> None:
        if self._link is None and not self._stopping:
            self._start()

    def _close_link(self) -> None:
        if self._link is not None:
            if self._hub is not None:
                self._hub.remove(self._link.fileno())
            self._link.close()
            self._link = None

    def _waits_for(self) -> str:
        if "cluster" not in self.report:
            return "connecting to the Ray cluster"
        actors = self.report["actors"]
        if not actors:
            return "creating GPU actors"
        return "; ".join(f"GPU actor {actor['slot']}: {actor.get('reason') or actor['state']}" for actor in actors)


def _nothing() -> None:
    pass


def _call(callback: Callable[..., Any], *args: Any) -> None:
    """A callback; an error in it (a broker that is away) costs only this task, as in billiard's pool."""
    try:
        callback(*args)
    except Exception:
        logger.exception("a callback of the worker raised")


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
