"""`HybridPool`: Celery's prefork for CPU tasks, the driver for GPU tasks; the setting `worker_pool` names it.

Everything not about GPU tasks is Celery's own code, untouched. Never imports ray or cupy.
"""

import math
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from celery import signals
from celery.concurrency.prefork import TaskPool, _run_ready_callbacks
from celery.exceptions import TaskRevokedError
from kombu.asynchronous import get_event_loop, set_event_loop
from kombu.utils.imports import symbol_by_name

from actors.garbage import settle
from bridge import data  # noqa: F401 - register remote commands and types of messages
from bridge.driver.discards import once_in
from bridge.errors import StartupError, TransportUnsupported
from bridge.marks import MAPS, is_gpu, marks_of
from bridge.settings import settings
from bridge.worker import control  # noqa: F401 - register remote commands and types of messages
from bridge.worker.banner import Progress, gpu_banner
from bridge.worker.consumer import hybrid_autoscaler, hybrid_consumer
from bridge.worker.drivers import Drivers
from bridge.worker.readiness import clean
from bridge.worker.supervisor import GpuRequest
from bridge.worker.vitals import Vitals

#: Default for BRIDGE_GPU_SLOTS, per driver; a larger batch raises it to thrice its size: one runs, one fills, one is on
#: its way to a result.
DEFAULT_SLOTS = 32
#: While draining, timers and acknowledgements are served at least this often, in seconds.
DRAIN_EVERY_S = 0.5


class HybridPool(TaskPool):
    """A worker pool that runs marked tasks on GPU actors and all others in prefork children."""

    __module__ = "bridge.pool.prefork"  # Celery's Django fixup and banner look for this word to know a pool that forks

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            self.settings = settings()
            self.marks = marks_of(self.app, self.settings.gpu_tasks)
        except StartupError as error:
            refuse(error)
        largest = max((mark.batch.max_size for mark in self.marks.values() if mark.batch), default=0)
        self.gpu_slots = self.settings.gpu_slots or max(DEFAULT_SLOTS * self.settings.drivers, 3 * largest)
        hostname = (self.options.get("initargs") or (None, "celery"))[1]
        self.gpu = Drivers(self.app, hostname, self.settings, self.marks)
        self.vitals = Vitals(hostname, self)
        self._hub: Any = None
        self.is_lost: Callable[[str], bool] = lambda _: False  # on Redis: whether a task is another worker's by now

    # ---- start and stop

    def on_start(self) -> None:
        """Start prefork's children, then the driver, and wait for a warm actor."""
        try:
            if self.options.get("threads"):
                raise TransportUnsupported(
                    f"the broker transport {self.app.connection().transport.driver_type!r} has no event loop, "
                    "which GPU tasks need: use Redis or RabbitMQ"
                )
            self.vitals.open()
            settle()  # before children are forked, which then share what nobody touches
            super().on_start()
            if self.marks:
                self.gpu.start([*self.marks, *MAPS])
                with Progress() as progress:
                    self.gpu.wait_until_ready(lambda text: self._show(progress, text))
            signals.task_revoked.connect(self._discard_what_was_for)
            self.vitals.starts("connecting to the broker")
        except StartupError as error:
            self.gpu.kill()
            self.vitals.close()
            refuse(error)
        except BaseException:  # told to stop meanwhile: a pool that has not started is not stopped by anybody else
            self.gpu.kill()
            self.vitals.close()
            raise
        if not {"-q", "--quiet"} & set(sys.argv):  # as for Celery's own banner, which the pool is not told of
            print(gpu_banner(self.info["gpu"], self.marks), file=sys.__stdout__, flush=True)

    def _show(self, progress: Progress, text: str) -> None:
        progress.say(text)
        self.vitals.starts(text)

    def register_with_event_loop(self, loop: Any) -> None:
        """Serve children and driver on the worker's event loop."""
        super().register_with_event_loop(loop)
        self._hub = loop
        self.gpu.register(loop)
        self.vitals.register(loop)

    def on_stop(self) -> None:
        """Warm shutdown: finish what runs, on CPU and GPU, acknowledging each task as it ends; give back what waits."""
        self.vitals.stops()
        if self._hub is not None and get_event_loop() is None:
            set_event_loop(self._hub)  # Celery forgets it after a reconnect; late acks would wait for the whole drain
        if self.gpu.can_drain:
            self.gpu.give_back()
            self._drain()
            super().on_stop()
            self.gpu.stop()
        else:  # a signal arrived in the middle of a read or write of the link
            self.gpu.kill()
            super().on_stop()
        self.vitals.close()

    def on_terminate(self) -> None:
        """Cold shutdown: end children and driver at once; actors stay warm."""
        self.vitals.stops()
        self.gpu.kill()
        super().on_terminate()
        self.vitals.close()

    def restart(self) -> None:
        """`control pool_restart`: new children and a new driver, each when it has finished what it runs."""
        super().restart()
        self.gpu.restart()

    def _drain(self) -> None:
        """Until no GPU task is left: read driver and children, fire timers, send acknowledgements."""
        if self.gpu.in_flight and self._pool is not None:
            self._pool.close()
        while self.gpu.in_flight:
            for fd in self.gpu.serve(DRAIN_EVERY_S, self._child_outputs()):
                callback, args = self._hub.readers[fd]
                callback(*args)
            if self._hub is not None:
                self._hub.fire_timers()
                _run_ready_callbacks(self._hub)

    def _child_outputs(self) -> list[int]:
        known = getattr(self._pool, "_fileno_to_outq", {})
        return [fd for fd in known if self._hub is not None and fd in self._hub.readers]

    # ---- tasks

    def _discard_what_was_for(self, sender: Any = None, request: Any = None, **_: Any) -> None:
        """A GPU task that was revoked, has expired or was terminated is over, whether or not a driver had it."""
        if sender is not None and sender.name in self.marks and (refs := once_in([request.args, request.kwargs])):
            self.gpu.discard(refs)

    def is_gpu(self, request: Any) -> bool:
        """Whether a request of the worker is a GPU task."""
        name = request.type  # `request.name` is the shadow, a name for people
        return name in self.marks or (name in MAPS and is_gpu(self.marks, name, request.args, request.kwargs))

    def apply_async(self, target: Any, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send a marked task to the driver and any other to a child."""
        if args and self.is_lost(args[1]):
            raise TaskRevokedError(args[1])  # Celery's way out of a start
        if not args or not is_gpu(self.marks, args[0], args[2].get("args"), args[2].get("kwargs")):
            return super().apply_async(target, args, kwargs, **options)
        name, task_id, request, body, content_type, content_encoding = args
        return self.apply_gpu(name, task_id, request, body, content_type, content_encoding, options)

    def apply_gpu(
        self, name: str, task_id: str, request: dict[str, Any], body: Any, content_type: Any, content_encoding: Any,
        options: dict[str, Any],
    ) -> GpuRequest:  # fmt: skip
        """Send one GPU task to the driver; `options` are those of Celery's `apply_async` of a pool."""
        # Not options' limits: Celery has read the task's own ones once, so `control time_limit` would change nothing.
        task = self.app.tasks[name]
        refusal, hard_s, soft_s = "", None, None
        try:
            hard_s, soft_s = (_seconds(value) for value in request.get("timelimit") or (None, None))
        except (TypeError, ValueError, OverflowError):
            refusal = "timelimit must be two finite numbers of seconds, hard and soft, or null"
        # Celery has decoded the arguments into the request for its own use; the tracer takes them from the body again.
        slim = {key: value for key, value in request.items() if key not in ("args", "kwargs")}
        run = {
            "task": name,
            "id": task_id,
            "request": slim,
            "body": bytes(body) if isinstance(body, memoryview | bytearray) else body,
            "content_type": content_type,
            "content_encoding": content_encoding,
            "soft_limit_s": soft_s or task.soft_time_limit or self.options.get("soft_timeout"),
            "hard_limit_s": hard_s or task.time_limit or self.options.get("timeout"),
            "refusal": refusal,
        }
        names = ("callback", "error_callback", "accept_callback", "timeout_callback")
        return self.gpu.apply(run, {key: options[key] for key in names})

    def _get_info(self) -> dict[str, Any]:
        info: dict[str, Any] = super()._get_info()
        info["gpu"] = self.gpu_info()
        return info

    def gpu_info(self) -> dict[str, Any]:
        """Cluster, driver, slots and actors as JSON-able data: ``inspect gpu``, and a part of ``inspect stats``."""
        report = self.gpu.report
        return {
            "cluster": report.get("cluster", {}).get("address", ""),
            "nodes": report.get("cluster", {}).get("nodes", 0),
            "gpus": report.get("cluster", {}).get("gpus", 0),
            "ray": report.get("cluster", {}).get("ray_version", ""),
            "driver": self.gpu.pids[0],
            "drivers": self.gpu.pids,
            "slots": self.gpu_slots,
            "in_flight": self.gpu.in_flight,
            "running": self.gpu.running,
            "results": clean(self.gpu.result_trouble),
            "actors": [_jsonable(actor) for actor in report["actors"]],
        }


def _seconds(value: Any) -> float | None:
    """A limit as a client of any language may write it; a number stays as it is, for errors and logs show it."""
    if value is None:
        return None
    seconds = float(value)
    if not math.isfinite(seconds):
        raise ValueError(value)
    return value if isinstance(value, int) else seconds


def _jsonable(actor: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if key == "state" else value for key, value in actor.items()}


def refuse(error: StartupError) -> NoReturn:
    """End the worker at start with one line and the error's exit code."""
    print(f"bridge: {' '.join(str(error).split())}", file=sys.__stderr__, flush=True)
    raise SystemExit(error.exit_code) from None


@signals.worker_init.connect
def _use_hybrid_parts(sender: Any = None, **_: Any) -> None:
    """A worker that uses this pool gets its consumer and autoscaler too, however it was started."""
    pool = (
        symbol_by_name(sender.pool_cls)
        if isinstance(sender.pool_cls, str) and ":" in sender.pool_cls
        else sender.pool_cls
    )
    if isinstance(pool, type) and issubclass(pool, HybridPool):
        sender.consumer_cls = hybrid_consumer(symbol_by_name(sender.consumer_cls))
        sender.autoscaler_cls = hybrid_autoscaler(symbol_by_name(sender.autoscaler_cls))
