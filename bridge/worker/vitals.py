"""In the worker: what it knows of itself, noted by its main thread as it turns and read by threads that answer probes.

The main thread pulses: from a timer of its loop, while it starts, while it connects to the broker again, while it
drains. Each pulse takes a picture of drivers, actors and counts, so whoever reads needs no lock and waits for nothing.
"""

import importlib.metadata
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from celery.worker import state as worker_state

from bridge.health import folder
from bridge.worker.health_server import HealthServer
from bridge.worker.readiness import Condition, DriverFacts, Facts, clean, condition_of

logger = logging.getLogger(__name__)

#: The main thread pulses at least this often while it is well, in seconds.
PULSE_S = 1.0
#: The kernel gives up a connection that nobody answers after about 130 s; meanwhile the main thread does not turn.
CONNECT_S = 150.0
#: What an account tells of an actor, of what its report holds.
_ACTOR = (
    "slot", "node", "device", "state", "reason", "generation", "crashes", "failed_starts", "queued", "running", "pid",
    "executor_pid", "accelerator", "share", "memory_used_bytes", "memory_total_bytes", "memory_free_bytes",
)  # fmt: skip


class Vitals:
    """One worker's health. `pulse` and what notes something are for the main thread, `account` is for any."""

    def __init__(self, worker: str, pool: Any) -> None:
        self._worker = worker
        self._pool = pool
        self._server = HealthServer(self.account)
        self._began = self._pulsed_at = time.monotonic()
        self._waits_for = "starting its processes"
        self._stops = False
        self._channel: Any = None  # tasks are consumed from it; None without a connection
        self._count_waiting: Callable[[], int] = lambda: 0
        self._asked_at: float | None = None  # a question to the broker that has no answer yet
        self._drivers: tuple[tuple[int | None, float | None], ...] = ()  # pid, and when last heard
        self._gpu: dict[str, Any] = {"actors": [], "slots": 0, "in_flight": 0, "running": 0}
        self._waiting = 0
        self._timer: Any = None

    def open(self) -> None:
        """Answer from now on.

        Raises:
            ConfigurationInvalid: BRIDGE_HEALTH_ADDRESS cannot be listened to.
        """
        self._server.open_socket(folder(), self._worker)
        place = self._pool.settings.health_place
        if place is not None:
            self._server.open_port(*place)

    def close(self) -> None:
        """The worker ends."""
        self._server.close()

    def starts(self, text: str) -> None:
        """The start goes on, and waits for this."""
        self._waits_for = text
        self.pulse()

    def register(self, hub: Any) -> None:
        """Pulse with the worker's event loop; again after each reconnect to the broker."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = hub.call_repeatedly(PULSE_S, self.pulse)
        self.pulse()

    def consumes(self, channel: Any, count_waiting: Callable[[], int]) -> None:
        """Tasks are consumed from this channel; `count_waiting` counts those that wait for a slot."""
        self._channel, self._count_waiting, self._waits_for = channel, count_waiting, ""
        self.pulse()

    def loses_broker(self) -> None:
        """Nothing is consumed."""
        self._channel = None
        self.pulse()

    def stops(self) -> None:
        """The pool ends; `control shutdown` says so nowhere else."""
        self._stops = True

    def connecting(self, connection: Any) -> None:
        """Pulse while this connection is made, however often that fails: kombu tries again without the loop."""
        ensure = connection.ensure_connection

        def ensure_connection(*args: Any, callback: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            def each_second() -> None:
                self.pulse()
                if callback is not None:
                    callback()

            return ensure(*args, callback=each_second, **kwargs)

        connection.ensure_connection = ensure_connection

    def pulse(self) -> None:
        """The main thread turns. It must not fail for what is only looked at."""
        self._pulsed_at = time.monotonic()
        try:
            self._look()
        except Exception:
            logger.exception("the worker's health could not be looked at")

    def _look(self) -> None:
        self._gpu = self._pool.gpu_info()
        self._drivers = self._pool.gpu.heard
        self._waiting = self._gpu["in_flight"] - self._gpu["running"] + self._count_waiting()
        self._asked_at = None
        if getattr(self._channel, "_in_poll", None):  # kombu's Redis: an answer is due within a second
            self._asked_at = getattr(self._channel, "_brpop_sent_at", None)

    def account(self) -> dict[str, Any]:
        """All of it, JSON-able; nothing in it is secret."""
        gpu, condition = self._gpu, self._condition()
        return {
            "version": _version(),
            "worker": self._worker,
            "pid": os.getpid(),
            "state": condition.state,
            "live": condition.live,
            "ready": condition.ready,
            "reasons": [reason._asdict() for reason in condition.reasons],
            "uptime_s": _round(time.monotonic() - self._began),
            "loop_s": _round(time.monotonic() - self._pulsed_at),
            "broker": {"consumes": self._channel is not None},
            "cluster": {key: gpu.get(key) for key in ("cluster", "nodes", "gpus", "ray")},
            "drivers": [{"pid": pid, "heard_s": _age(heard_at)} for pid, heard_at in self._drivers],
            "actors": [_shown(actor) for actor in gpu["actors"]],
            "slots": gpu["slots"],
            "waiting": self._waiting,
            "running": gpu["running"],
        }

    def _condition(self) -> Condition:
        now, settings, gpu, consumes = time.monotonic(), self._pool.settings, self._gpu, self._channel is not None
        told = (worker_state.should_stop, worker_state.should_terminate)
        return condition_of(
            Facts(
                waits_for=self._waits_for,
                stops=self._stops or any(each is not None and each is not False for each in told),
                loop_s=now - self._pulsed_at,
                loop_limit_s=settings.hung_after_s + (0.0 if consumes else CONNECT_S),
                consumes=consumes,
                broker_s=now - self._asked_at if self._asked_at is not None else 0.0,
                drivers=tuple(DriverFacts(pid, at if at is None else now - at) for pid, at in self._drivers),
                has_cluster=bool(gpu.get("cluster")),
                actors=tuple(gpu["actors"]),
                results=gpu.get("results", ""),
                tasks={name: mark.gpu for name, mark in self._pool.marks.items()},
                on_demand=settings.min_actors == 0 and (settings.max_actors is not None or bool(gpu.get("gpus"))),
            )
        )


def _age(moment: float | None) -> float | None:
    return None if moment is None else _round(time.monotonic() - moment)


def _round(seconds: float) -> float:
    return round(seconds, 1)


def _shown(actor: dict[str, Any]) -> dict[str, Any]:
    row = {key: actor[key] for key in _ACTOR if key in actor}
    return row | {"reason": clean(row.get("reason", ""))}


def _version() -> str:
    try:
        return importlib.metadata.version("celery-gpu-bridge")
    except importlib.metadata.PackageNotFoundError:  # unpacked beside the app, not installed
        return "not installed"
