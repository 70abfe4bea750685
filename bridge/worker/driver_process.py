"""In the worker: the driver process, and the link to the one that is there; one that dies is followed by another.

Used on the worker's main thread only. The pause before the next one grows while none gets an actor. What becomes of
the requests is `supervisor.py`'s: it is told of each start, message and death.
"""

import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import billiard
from celery import signals
from celery.worker import state as worker_state

from actors.contract import ActorState, Config
from bridge import errors
from bridge.driver import loop
from bridge.errors import ActorNotReady, StartupError
from bridge.link import Link, Report, Stop
from bridge.settings import Settings
from bridge.worker.release import make_config

logger = logging.getLogger(__name__)

#: First and longest pause before a driver that died is started again, in seconds; it grows while none gets an actor.
BACKOFF_S = (0.1, 30.0)
#: While the driver does not take what is written, it is offered again this often, in seconds.
FLUSH_AGAIN_S = 0.005
#: A driver told to stop gets this long.
STOP_S = 5.0


class Death(NamedTuple):
    """How a driver has ended."""

    pid: int
    exit_code: int | None
    shut_out: str  # why it was not let into the cluster; "" for any other end
    shut_out_s: float  # and for how long none has been

    @property
    def is_explained(self) -> bool:
        """Whether it has said why: its cluster is gone, or it was not let in."""
        return self.exit_code in (loop.EXIT_CLUSTER_LOST, loop.EXIT_NOT_STARTED)


class DriverProcess:
    """The driver that is there or is to come.

    Args:
        label: its name in logs, before a number.
        on_start: called when a driver has been started: it can be sent to.
        take: called with each message about a request.
        on_death: called when it has ended and nobody wanted it to; the next one is started later.
    """

    def __init__(
        self, app: Any, hostname: str, settings: Settings, label: str,
        on_start: Callable[[], None], take: Callable[[Any], None], on_death: Callable[[Death], None],
    ) -> None:  # fmt: skip
        self._app, self._hostname, self._settings, self._label = app, hostname, settings, label
        self._on_start, self._take, self._tell_death = on_start, take, on_death
        self._config: Config | None = None
        self._starts = 0
        self._failures = 0
        self._heard_at = 0.0
        self._has_reported = False  # the driver that is there now
        self._process: Any = None
        self._link: Link | None = None
        self._hub: Any = None
        self.is_busy = False  # inside a read or write: a signal handler must not enter a second time
        self._flushes_later = False
        self._flushes_soon = False  # in the next turn of the event loop, with all that is sent until then
        self.is_stopping = False
        self._restart_at: float | None = None
        self.report: dict[str, Any] = {"actors": []}
        self.on_report: Callable[[], None] = nothing
        self._driver_id = ""
        self._start_error: tuple[str, str] | None = None
        self._shut_out_since: float | None = None  # no driver gets into the cluster: a changed token, another version

    # ---- start

    def start(self, tasks: Iterable[str], share: float) -> None:
        """Start the first driver for these GPU tasks; it connects in the background. Actors reserve `share` of a GPU.

        Raises:
            AppNotImportable: an executor could not import the app.
        """
        # Once: this worker's code is what it has imported by now, whatever a deploy puts on the disk later.
        self._config = make_config(self._app, tasks, self._settings, share)
        self._start()

    def _start(self) -> None:
        """Start a driver.

        Raises:
            OSError: no process or descriptor is to be had.
        """
        ours, theirs = socket.socketpair()
        self._starts += 1
        self._has_reported = False
        name = f"{self._label}-{self._starts}"
        process = billiard.Process(
            target=loop.main,
            args=(self._app, self._hostname, theirs, name, self._config, self._driver_id, self._starts == 1),
            name=name,
        )
        process.daemon = True
        process.index = self._starts  # for %i in log file names
        signals.worker_before_create_process.send(sender=self)  # as before any child of the pool
        try:
            process.start()
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._process = process
        self._link = Link(ours)
        self._restart_at = None
        self._on_start()
        self._register()

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

    def _waits_for(self) -> str:
        if "cluster" not in self.report:
            return "connecting to the Ray cluster"
        actors = self.report["actors"]
        if not actors:
            return "creating GPU actors"
        return "; ".join(f"GPU actor {actor['slot']}: {actor.get('reason') or actor['state']}" for actor in actors)

    def register(self, hub: Any) -> None:
        """Serve the link on the worker's event loop; again after each reconnect to the broker."""
        self._hub = hub
        self._flushes_later = self._flushes_soon = False  # a lost connection may have taken our timers with its own
        if self._restart_at is not None:
            hub.call_later(max(0.0, self._restart_at - time.monotonic()), self._restart)
        self._register()

    # ---- what is known of it

    @property
    def pid(self) -> int | None:
        """The driver's process id."""
        return self._process.pid if self._process is not None else None

    @property
    def heard_at(self) -> float | None:
        """When the driver last said something, as `time.monotonic`; None before its first report and without one."""
        return self._heard_at if self._link is not None and self._has_reported else None

    @property
    def silent_s(self) -> float:
        """For how long the driver has said nothing, in seconds."""
        return time.monotonic() - self._heard_at

    @property
    def is_linked(self) -> bool:
        """Whether there is a driver to read from; then `fileno` may be polled."""
        return self._link is not None

    def fileno(self) -> int:
        """The link's descriptor."""
        return self._link.fileno() if self._link is not None else -1

    # ---- the link

    def _register(self) -> None:
        if self._hub is not None and self._link is not None:
            self._hub.add_reader(self._link.fileno(), self._on_event)
            self.flush()

    def _on_event(self, *_: Any) -> None:
        self.on_readable()

    def send(self, message: Any, at_once: bool) -> None:
        """Send a message, with all others of this turn of the event loop or at once; for nobody without a driver."""
        if self._link is not None:
            self._link.send(message)
            if self._hub is None or at_once:
                self.flush()
            elif not self._flushes_soon:
                self._flushes_soon = True
                self._hub.call_soon(self.flush)

    def flush(self) -> None:
        """Write what the link takes; the rest a little later."""
        self._flushes_soon = False
        if self._link is None or self.is_busy:
            return
        self.is_busy = True
        try:
            written = self._link.flush()
        except ConnectionError:
            written = True  # the reader sees the end, too
        finally:
            self.is_busy = False
        if not written and self._hub is not None and not self._flushes_later:
            # Not by a writer on the hub: kombu ignores one on a descriptor that has a reader, and nothing would go on.
            self._flushes_later = True
            self._hub.call_later(FLUSH_AGAIN_S, self._flush_again)

    def _flush_again(self) -> None:
        self._flushes_later = False
        self.flush()

    def on_readable(self) -> None:
        """Take what the driver has sent."""
        if self._link is None or self.is_busy:
            return
        self.is_busy = True
        try:
            received = self._link.receive()
        except EOFError:
            received = None
        finally:
            self.is_busy = False
        if received is None:
            self._on_death()
            return
        self._heard_at = time.monotonic()
        for message in received:
            if isinstance(message, Report):
                self._take_report(message)
            else:
                self._take(message)

    def _take_report(self, report: Report) -> None:
        self.report = report.fleet
        self._has_reported = True
        self._driver_id = report.fleet.get("driver_id", "")
        self._start_error = report.error
        if any(actor["state"] == ActorState.READY for actor in report.fleet["actors"]):
            self._failures = 0  # it has started well: should it die, the next one need not wait
            self._shut_out_since = None
        call_back(self.on_report)

    # ---- its end, and the next one

    def stop(self) -> None:
        """End the driver; it leaves its actors warm."""
        self.say_stop()
        if self._process is not None:
            self._process.join(STOP_S)
            self.kill()

    def say_stop(self) -> None:
        """Tell the driver to end, and wait for nothing."""
        if not self.is_stopping and self._link is not None and not self.is_busy:
            self._link.send(Stop())
            self.flush()  # the event loop, which flushes otherwise, has ended
        self.is_stopping = True

    def kill(self) -> None:
        """End the driver at once."""
        self.is_stopping = True
        if self._process is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.join(STOP_S)
        self._close_link()

    def abort(self) -> None:
        """Have the driver die; its end is read from the link, and another follows."""
        os.kill(self._process.pid, signal.SIGKILL)

    def _on_death(self) -> None:
        self._close_link()
        self._process.join(STOP_S)
        if self.is_stopping:
            return
        code, now, shut_out, shut_out_s = self._process.exitcode, time.monotonic(), "", 0.0
        if code == loop.EXIT_NOT_STARTED and self._start_error:
            shut_out = self._start_error[1]
            self._shut_out_since = self._shut_out_since or now
            shut_out_s = now - self._shut_out_since
        self._tell_death(Death(self._process.pid, code, shut_out, shut_out_s))
        self.report = {**self.report, "actors": [], "results": ""}
        self._schedule_restart()

    def _schedule_restart(self) -> None:
        first, longest = BACKOFF_S
        pause = min(longest, first * 2**self._failures)
        self._failures += 1
        self._restart_at = time.monotonic() + pause
        if self._hub is not None:
            self._hub.call_later(pause, self._restart)

    def restart_if_due(self) -> None:
        """Outside the event loop: start the next driver when its pause is over."""
        if self._restart_at is not None and time.monotonic() >= self._restart_at:
            self._restart()

    def _restart(self) -> None:
        if self._link is None and not self.is_stopping:
            try:
                self._start()
            except OSError as error:  # the event loop would log it, and nobody would try again
                logger.error("the GPU driver could not be started, it is tried again: %s", error)
                self._schedule_restart()

    def _close_link(self) -> None:
        if self._link is not None:
            if self._hub is not None:
                self._hub.remove(self._link.fileno())
            self._link.close()
            self._link = None


def nothing() -> None:
    """What is called where nobody listens."""


def call_back(callback: Callable[..., Any], *args: Any) -> None:
    """A callback; an error in it (a broker that is away) costs only this task, as in billiard's pool."""
    try:
        callback(*args)
    except Exception:
        logger.exception("a callback of the worker raised")
