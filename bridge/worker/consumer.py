"""What may enter the worker: GPU tasks wait for a slot of their own, CPU tasks for a child, as ever.

Everything reaches the pool through the consumer's `on_task_request`: direct, ETA and rate-limited tasks alike. Prefetch
grows by one per GPU task held unacknowledged, by Celery's own mechanism for ETA tasks, and shrinks with them.
"""

import functools
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NoReturn

from celery.exceptions import TaskRevokedError
from celery.utils.functional import maybe_list
from celery.worker.state import (
    active_requests,
    reserved_requests,
    revoked,
    revoked_stamps,
    scheduled_requests,
    task_ready,
)

from bridge import closing
from bridge.errors import MessageInvalid, PayloadTooLarge
from bridge.worker import intake, visibility
from bridge.worker.fence_events import FenceEvents
from bridge.worker.redis_channel import ask_in_groups
from bridge.worker.supervisor import GpuRequest

logger = logging.getLogger(__name__)

#: Pause between two looks for expired requests, in seconds, at least.
LOOK_AGAIN_S = 0.05


class Slots:
    """GPU tasks one worker holds at once; requests beyond wait here, in order.

    Like kombu's semaphore, but it starts waiting requests in a loop: when thousands have expired, each start ends at
    once and gives its slot to the next.
    """

    def __init__(self, count: int, start: Callable[[Any], None]) -> None:
        self.count = self.free = count
        self._start = start
        self._waiting: deque[Any] = deque()
        self._is_starting = False

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    def take(self, request: Any) -> None:
        """Start a request, now or when a slot is free."""
        self._waiting.append(request)
        self._start_waiting()

    def give(self) -> None:
        """A slot is free again."""
        self.free = min(self.count, self.free + 1)
        self._start_waiting()

    def reset(self, used: int) -> None:
        """Forget who waits; `used` slots are still taken."""
        self._waiting.clear()
        self.free = max(0, self.count - used)

    def _start_waiting(self) -> None:
        if self._is_starting:
            return
        self._is_starting, errors = True, list[Exception]()
        try:
            while self.free and self._waiting:
                self.free -= 1
                try:
                    self._start(self._waiting.popleft())
                except Exception as error:
                    errors.append(error)  # the others start all the same
        finally:  # also when a signal ends this: nothing would ever start again
            self._is_starting = False
        if errors:
            raise errors[0]


class HybridConsumer:
    """Mixed into the worker's consumer class."""

    pool: Any
    qos: Any
    qos_global: bool | None
    connection: Any
    app: Any
    controller: Any
    task_consumer: Any
    timer: Any
    task_buckets: Any
    event_dispatcher: Any
    _maximum_prefetch_restored: bool

    def __init__(self, on_task_request: Any, *args: Any, **kwargs: Any) -> None:
        self._on_cpu_request = on_task_request
        self._slots = Slots(kwargs["pool"].gpu_slots, self._start)
        self._held: dict[Any, Any] = {}  # request -> the qos object it has widened
        self._waiting: dict[Any, GpuRequest] = {}  # requests in the driver that no actor has taken
        self._in_hand: set[Any] = set()  # requests with a slot
        self._look_due = math.inf  # when expired ones are looked for
        self._is_cautioned = False
        self._dropped: set[str] = set()  # ids of tasks that have just turned out to be another worker's
        self._fence_events = FenceEvents()
        super().__init__(self._route, *args, **kwargs)  # type: ignore[call-arg]

    def connection_for_read(self, heartbeat: Any = None) -> Any:
        """The connection tasks are consumed from."""
        connection = self.app.connection_for_read(heartbeat=heartbeat)
        if self.pool.marks:
            ask_in_groups(connection)
        self.pool.vitals.connecting(connection)
        return self.ensure_connected(connection)  # type: ignore[attr-defined]

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's message handler behind ours, which lets no message end the worker."""
        handler = super().create_task_handler(*args, **kwargs)  # type: ignore[misc]
        if not self.pool.marks:
            return handler
        self.task_consumer.channel.largest_body = self.pool.settings.max_body_bytes
        intake.bound_decoding(self.pool.settings.max_body_bytes)
        intake.shorten_logs()
        return intake.guarded(self, handler, self.pool.settings.max_body_bytes, self._close)

    def _close(self, message: Any) -> None:
        """A GPU task's large body: only the executor reads it."""
        name = message.headers.get("task")
        if name in self.pool.marks:
            closing.close(message, self.app.tasks[name], self.pool.settings.raw_body_bytes)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """A body that cannot be decompressed or decoded."""
        if isinstance(exc, intake.TooMuch):
            limit = self.pool.settings.max_body_bytes
            intake.refuse(self, message, PayloadTooLarge(str(message.headers.get("task", "")), limit))
        else:
            super().on_decode_error(message, exc)  # type: ignore[misc]

    def holds(self, message: Any) -> bool:
        """Whether a request of this message waits or runs here."""
        return any(each.message is message for each in (*reserved_requests, *scheduled_requests, *self._held))

    def _route(self, request: Any) -> None:
        if not self.pool.is_gpu(request):
            self._on_cpu_request(request)
            return
        texts = closing.texts_of(request.message)
        if texts is not None:
            request._body = texts  # what `execute_using_pool` hands on
        self._widen(request)
        self._slots.take(request)

    def _start(self, request: Any) -> None:
        """A slot is free: hand the request to the pool, unless it was revoked or has expired meanwhile."""
        try:
            handle: GpuRequest = request.execute_using_pool(self.pool)
        except TaskRevokedError:
            self._end(request)
        except Exception as error:  # it cannot be sent to the driver: its headers hold what cannot be pickled
            self._end(request)
            task_ready(request)
            refused = MessageInvalid(f"{request.type}: its message cannot be passed on ({type(error).__name__})")
            intake.refuse(self, request.message, refused)
        else:
            handle.on_accepted = lambda: self._accepted(request)
            handle.on_end = lambda: self._end(request)
            self._in_hand.add(request)
            self._waiting[request] = handle
            if request.expires:
                self._look_at(time.monotonic() + _seconds_until(request.expires))

    def _accepted(self, request: Any) -> None:
        self._waiting.pop(request, None)
        if request.acknowledged:
            self._narrow(request)

    def _end(self, request: Any) -> None:
        self._in_hand.discard(request)
        self._waiting.pop(request, None)
        self._narrow(request)
        self._slots.give()

    def withdraw_revoked(self) -> None:
        """Take back what waits for a GPU and has expired or been revoked meanwhile, by id or by a stamped header.

        The driver says whether it still waits; if so it starts again here, where Celery looks first and announces it.
        """
        for request, handle in list(self._waiting.items()):
            if _may_be_revoked(request):
                self.pool.gpu.withdraw(handle, lambda request=request: self._start(request))

    def _look_at(self, due: float) -> None:
        """Look for expired requests at `due`; one timer for the earliest, for kombu keeps each until its time."""
        if due < self._look_due:
            self._look_due = due
            self.timer.call_after(max(0.0, due - time.monotonic()), self._look, (due,))

    def _look(self, due: float) -> None:
        if due != self._look_due:
            return  # an earlier one has taken its place
        self._look_due = math.inf
        self.withdraw_revoked()
        expiring = [_seconds_until(request.expires) for request in self._waiting if request.expires]
        if expiring:
            self._look_at(time.monotonic() + max(LOOK_AGAIN_S, min(expiring)))

    def _widen(self, request: Any) -> None:
        """Let one more message in for this one, while it is neither acknowledged nor one of a CPU child's share."""
        if len(self._held) < self.pool.gpu_slots and not self._prefetch_is_fixed():
            self._held[request] = self.qos
            _shift(self.qos, 1)

    def _prefetch_is_fixed(self) -> bool:
        """RabbitMQ's quorum queues: a live consumer cannot change its prefetch count."""
        return self.qos_global is False and self.connection.transport.driver_type == "amqp"

    def _narrow(self, request: Any) -> None:
        qos = self._held.pop(request, None)
        if qos is not None and qos is self.qos:  # each connection has its own
            _shift(qos, -1)

    def on_ready(self) -> None:
        """Consuming starts; with ``--disable-prefetch`` a message is taken while both kinds have room."""
        super().on_ready()  # type: ignore[misc]
        self._keep_visible()
        self.pool.vitals.consumes(self.task_consumer.channel, lambda: self._slots.waiting)
        self.pool.gpu.listen(self._tell_fences)
        if self.app.conf.worker_disable_prefetch and self.connection.transport.driver_type == "redis":
            qos = self.task_consumer.channel.qos
            qos.can_consume = lambda: self._has_room() and bool(type(qos).can_consume(qos))

    def _keep_visible(self) -> None:
        """On Redis: what this worker holds is not given to others while its event loop turns."""
        transport = self.connection.transport
        if isinstance(getattr(transport, "cycle", None), visibility.RenewingPoller):
            transport.cycle.start_renewing(self.timer, self._lost, lambda: not self._has_room())
            self.pool.is_lost = functools.partial(self._is_lost, transport.cycle)
        if not self._is_cautioned:
            self._is_cautioned = True
            timeout_s = getattr(self.task_consumer.channel, "visibility_timeout", math.inf)
            limits_s = [task.time_limit or 0 for name in self.pool.marks if (task := self.app.tasks[name]).acks_late]
            for text in visibility.cautions(self.app, transport.driver_type, timeout_s, limits_s):
                logger.warning("%s", text)

    def _is_lost(self, cycle: visibility.RenewingPoller, task_id: str) -> bool:
        """Whether a task that is about to start turns out to be another worker's."""
        self._dropped.clear()
        cycle.renew_if_overdue()
        return task_id in self._dropped

    def _lost(self, tags: list[Any]) -> None:
        """Others hold these messages: what has not started here is dropped, what runs goes on and ends twice."""
        waiting = [request for bucket in self.task_buckets.values() if bucket for request, _ in bucket.contents]
        for request in {*reserved_requests, *scheduled_requests, *self._held, *waiting}:
            if request.message.delivery_tag not in tags:
                continue
            request._on_ack = request._on_reject = _ignore
            runs = request in active_requests
            logger.warning(
                "%s[%s] is another worker's by now, for this one was silent for longer than visibility_timeout: %s",
                request.type, request.id, "it goes on here and may end twice" if runs else "it is dropped here",
            )  # fmt: skip
            if not runs:
                self._dropped.add(request.id)
                task_ready(request)
                request.execute_using_pool = functools.partial(_drop, request)
                if request in self._waiting:
                    self.pool.gpu.withdraw(self._waiting[request], functools.partial(self._start, request))

    def _tell_fences(self) -> None:
        if self.event_dispatcher:
            for kind, fields in self._fence_events.changes(self.pool.gpu.report["actors"]):
                self.event_dispatcher.send(kind, **fields)

    def _has_room(self) -> bool:
        children: int = getattr(self.controller, "max_concurrency", None) or self.pool.num_processes
        if len(reserved_requests) < min(children, self.pool.gpu_slots):
            return True
        reserved = tuple(reserved_requests)
        gpu = sum(self.pool.is_gpu(request) for request in reserved)
        has_room: bool = gpu < self.pool.gpu_slots and len(reserved) - gpu < children
        return has_room

    def on_close(self) -> None:
        """The connection is gone: what has not started will be delivered again. At shutdown the pool asks for it."""
        super().on_close()  # type: ignore[misc]
        self.pool.vitals.loses_broker()
        if self.connection is None:  # at shutdown it is still there
            self.pool.gpu.flush_requests()
            self._in_hand -= self._waiting.keys()  # flushed: nobody will say that they have ended
        self._held.clear()
        self._waiting.clear()
        self._look_due = math.inf
        self._slots.reset(self.pool.gpu.in_flight)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """The broker gives what has not started to others from now on: the driver hears of it first."""
        self.pool.vitals.loses_broker()
        self.pool.gpu.flush_requests()
        for request in self._in_hand:  # nobody takes their acknowledgement any more, and kombu's Redis chokes on it
            request._on_ack = request._on_reject = _ignore
        try:
            super().on_connection_error_after_connected(exc)  # type: ignore[misc]
        except AttributeError:
            # kombu 5.7: closing a Redis connection that is gone while messages are in hand asks it for its host name.
            # That would end the worker. Celery has forgotten the connection by then: the second time nothing is closed.
            if self.connection is not None:
                raise
            super().on_connection_error_after_connected(exc)  # type: ignore[misc]

    def _restore_prefetch_count_after_connection_restart(self, p: Any, *args: Any) -> None:
        """Celery sets the count anew, step by step, to the children's window; GPU tasks' share comes on top."""
        if not self._maximum_prefetch_restored:
            with self.qos._mutex:
                super()._restore_prefetch_count_after_connection_restart(p, *args)  # type: ignore[misc]
                self.qos.value += self._wider

    @property
    def _new_prefetch_count(self) -> int:
        count: int = super()._new_prefetch_count  # type: ignore[misc]
        return count - self._wider

    @property
    def _wider(self) -> int:
        return sum(qos is self.qos for qos in self._held.values())

    def cancel_active_requests(self) -> None:
        """Soft and cold shutdown: nothing has been read during the wait, so hear first what has finished."""
        self.pool.gpu.on_readable()
        super().cancel_active_requests()  # type: ignore[misc]

    @property
    def initial_prefetch_count(self) -> int:
        """The prefetch count a connection starts with; where it cannot change later, the slots are in it."""
        fixed = self._initial_prefetch_count and self._prefetch_is_fixed()
        return self._initial_prefetch_count + (self.pool.gpu_slots if fixed else 0)

    @initial_prefetch_count.setter
    def initial_prefetch_count(self, value: int) -> None:
        self._initial_prefetch_count = value


class HybridAutoscaler:
    """Mixed into the worker's autoscaler class: children are counted for CPU tasks only."""

    pool: Any

    @property
    def qty(self) -> int:
        """CPU tasks reserved."""
        return sum(not self.pool.is_gpu(request) for request in tuple(reserved_requests))


def _ignore(*_: Any) -> None:
    pass


def _drop(request: Any, *_: Any, **__: Any) -> NoReturn:
    """In place of a request's own start: the way out that Celery has for one that was revoked, without saying so."""
    task_ready(request)
    raise TaskRevokedError(request.id)


def _shift(qos: Any, change: int) -> None:
    """Prefetch by one more or less; `worker_eta_task_limit` bounds ETA tasks, so it moves along."""
    with qos._mutex:
        if qos.value:  # 0 means no limit
            qos.value = max(1, qos.value + change)
            if qos.max_prefetch is not None:
                qos.max_prefetch += change


def _may_be_revoked(request: Any) -> bool:
    """Whether Celery's own look, which cannot be taken back, is worth it."""
    if request.id in revoked or (request.expires and _seconds_until(request.expires) <= 0):
        return True
    stamps = [(request.stamps.get(name), revoked_stamps.get(name)) for name in request.stamped_headers or ()]
    return any(not set(maybe_list(own) or ()).isdisjoint(maybe_list(gone) or ()) for own, gone in stamps)


def _seconds_until(moment: datetime) -> float:
    return (moment - datetime.now(UTC if moment.tzinfo else None)).total_seconds()


def hybrid_consumer(base: type) -> type:
    """The worker's consumer class with GPU slots."""
    return base if issubclass(base, HybridConsumer) else type("HybridConsumer", (HybridConsumer, base), {})


def hybrid_autoscaler(base: type) -> type:
    """The worker's autoscaler class that counts CPU tasks only."""
    return base if issubclass(base, HybridAutoscaler) else type("HybridAutoscaler", (HybridAutoscaler, base), {})
