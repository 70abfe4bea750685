"""What may enter the worker: slots, prefetch and autoscale per kind, with a make-believe consumer and pool."""

import threading
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from celery.exceptions import TaskRevokedError
from celery.worker import state

from bridge.worker import intake
from bridge.worker.consumer import HybridAutoscaler, HybridConsumer, hybrid_autoscaler, hybrid_consumer


class Qos:
    max_prefetch = None

    def __init__(self):
        self.value = 100
        self._mutex = threading.RLock()

    @property
    def wider(self):
        return self.value - 100


class Handle:
    on_accepted = on_end = staticmethod(lambda: None)

    wanted_back = None


class Timer:
    def __init__(self):
        self.calls = []

    def call_after(self, seconds, function, args):
        self.calls.append((seconds, lambda: function(*args)))


class Gpu:
    in_flight = 0
    reads = flushes = 0

    def flush_requests(self):
        self.flushes += 1

    def on_readable(self):
        self.reads += 1

    def withdraw(self, handle, on_given_back):
        handle.wanted_back = on_given_back


class Vitals:
    channel = None

    def connecting(self, connection):
        pass

    def consumes(self, channel, count_waiting):
        self.channel = channel

    def loses_broker(self):
        self.channel = None


class Pool:
    def __init__(self, slots=2):
        self.vitals = Vitals()
        self.gpu_slots = slots
        self.marks = {"gpu": None}
        self.gpu = Gpu()

    def is_gpu(self, request):
        return request.name in self.marks


class Request:
    """A Celery request as far as the consumer looks at it."""

    def __init__(self, name="gpu", error=None, expires=None):
        self.name, self.error, self.expires = name, error, expires
        self.type, self.message = name, None
        self.id, self.stamped_headers, self.stamps = f"id-{id(self)}", [], {}
        self.starts = 0
        self.acknowledged = False
        self.handle = None

    def execute_using_pool(self, pool):
        if self.error:
            raise self.error
        self.starts += 1
        self.handle = Handle()
        return self.handle

    def accept(self, acknowledge=False):
        self.acknowledged = acknowledge
        self.handle.on_accepted()

    def end(self):
        self.acknowledged = True
        self.handle.on_end()


class Connection:
    class transport:
        driver_type = "redis"


class Amqp:
    class transport:
        driver_type = "amqp"


class BaseConsumer:
    qos_global = False
    connection = Connection
    close_error = error_before_closing = None
    losses = 0

    def __init__(self, on_task_request, pool):
        self.on_task_request = on_task_request
        self.pool = pool
        self.qos = Qos()
        self.timer = Timer()
        self.closed = self.cancelled = 0

    def on_close(self):
        self.closed += 1

    def on_connection_error_after_connected(self, exc):
        self.losses += 1
        if self.error_before_closing:
            raise self.error_before_closing
        connection, self.connection = self.connection, None
        if connection and self.close_error:
            raise self.close_error

    def cancel_active_requests(self):
        assert self.pool.gpu.reads == 1, "what has finished must be heard before anything is cancelled"
        self.cancelled += 1


@pytest.fixture
def cpu():
    return []


@pytest.fixture
def refused(monkeypatch):
    errors = []
    monkeypatch.setattr(intake, "refuse", lambda consumer, message, error: errors.append(error))
    return errors


@pytest.fixture
def consumer(cpu):
    return hybrid_consumer(BaseConsumer)(cpu.append, pool=Pool())


def test_tasks_that_are_not_marked_go_on_as_ever(consumer, cpu):
    request = Request("cpu")
    consumer.on_task_request(request)
    assert cpu == [request]
    assert consumer.qos.wider == 0


def test_no_more_gpu_tasks_enter_than_there_are_slots(consumer, cpu):
    requests = [Request() for _ in range(5)]
    for request in requests:
        consumer.on_task_request(request)
    assert [request.handle is not None for request in requests] == [True, True, False, False, False]
    assert cpu == []
    requests[0].end()
    assert requests[2].handle is not None
    requests[1].end(), requests[2].end()
    assert requests[3].handle and requests[4].handle


def test_prefetch_grows_with_each_unacknowledged_gpu_task_up_to_the_slots_and_shrinks_again(consumer):
    requests = [Request() for _ in range(4)]
    for request in requests:
        consumer.on_task_request(request)
    assert consumer.qos.wider == 2
    for request in requests:
        request.end()
    assert consumer.qos.wider == 0


def test_an_early_acknowledgement_gives_the_prefetch_back_but_not_the_slot(consumer):
    first, second, third = requests = [Request() for _ in range(3)]
    for request in requests:
        consumer.on_task_request(request)
    first.accept(acknowledge=True)
    assert consumer.qos.wider == 1
    assert third.handle is None
    first.end()
    assert third.handle is not None
    assert consumer.qos.wider == 1, "given back once only"
    assert second.handle is not None


def test_late_acknowledgement_keeps_the_prefetch_until_the_end(consumer):
    request = Request()
    consumer.on_task_request(request)
    request.accept(acknowledge=False)
    assert consumer.qos.wider == 1
    request.end()
    assert consumer.qos.wider == 0


def test_a_revoked_task_gives_its_slot_back(consumer):
    for _ in range(3):
        consumer.on_task_request(Request(error=TaskRevokedError("revoked")))
    request = Request()
    consumer.on_task_request(request)
    assert request.handle is not None
    assert consumer.qos.wider == 1


def test_an_error_while_starting_gives_the_slot_back_and_costs_one_task(consumer, refused):
    for _ in range(3):
        consumer.on_task_request(Request(error=ZeroDivisionError()))
    assert [str(error) for error in refused] == ["gpu: its message cannot be passed on (ZeroDivisionError)"] * 3
    request = Request()
    consumer.on_task_request(request)
    assert request.handle is not None
    assert consumer.qos.wider == 1


@pytest.mark.parametrize(("qos_global", "wider"), [(False, 0), (True, 1)])
def test_a_live_consumer_of_a_quorum_queue_keeps_its_prefetch(consumer, qos_global, wider):
    consumer.connection, consumer.qos_global = Amqp, qos_global
    request = Request()
    consumer.on_task_request(request)
    assert consumer.qos.wider == wider
    request.end()
    assert consumer.qos.wider == 0


def test_after_a_lost_connection_what_waited_is_forgotten_and_what_runs_keeps_its_slot(consumer):
    running, waiting, queued = requests = [Request() for _ in range(3)]
    for request in requests:
        consumer.on_task_request(request)
    running.accept()
    consumer.pool.gpu.in_flight = 1
    connection, consumer.connection = consumer.connection, None
    consumer.on_close()
    consumer.connection = connection
    assert consumer.pool.gpu.flushes == 1
    assert consumer._in_hand == {running}, "what was flushed is forgotten"
    assert consumer.closed == 1
    old, consumer.qos = consumer.qos, Qos()
    new = [Request() for _ in range(2)]
    for request in new:
        consumer.on_task_request(request)
    assert [request.handle is not None for request in new] == [True, False]
    running.end()
    assert new[1].handle is not None
    assert queued.handle is None, "the broker delivers it again"
    assert consumer.qos.wider == 2
    assert old.wider == 2, "a connection that is gone is left alone"
    assert waiting.handle is not None


def test_a_class_is_wrapped_once():
    once = hybrid_consumer(BaseConsumer)
    assert issubclass(once, (HybridConsumer, BaseConsumer))
    assert hybrid_consumer(once) is once


def test_the_autoscaler_counts_cpu_tasks_only(monkeypatch):
    class Base:
        pool = Pool()

    requests = [Request("gpu"), Request("cpu"), Request("cpu")]
    monkeypatch.setattr("bridge.worker.consumer.reserved_requests", requests)
    scaler = hybrid_autoscaler(Base)()
    assert isinstance(scaler, HybridAutoscaler)
    assert scaler.qty == 2
    assert hybrid_autoscaler(type(scaler)) is type(scaler)
    assert state.reserved_requests is not None


@pytest.fixture
def revoked():
    """Celery's record of what was revoked."""
    yield state.revoked
    state.revoked.clear(), state.revoked_stamps.clear()


def test_a_request_revoked_while_it_waits_is_wanted_back_and_looked_at_again(consumer, revoked):
    consumer._slots.count = consumer._slots.free = 4
    other, by_id, by_stamp, running = requests = [Request() for _ in range(4)]
    by_stamp.stamped_headers = other.stamped_headers = ["house"]
    by_stamp.stamps, other.stamps = {"house": ["six", "seven"]}, {"house": "eight"}
    for request in requests:
        consumer.on_task_request(request)
    running.accept()
    revoked.update([by_id.id, running.id])
    state.revoked_stamps["house"] = ["seven"]
    consumer.withdraw_revoked()
    assert [bool(r.handle.wanted_back) for r in requests] == [False, True, True, False]
    by_id.error = TaskRevokedError()  # Celery has announced it
    by_id.handle.wanted_back()
    by_stamp.handle.wanted_back()
    assert by_id not in consumer._waiting and consumer._slots.free == 1
    assert by_stamp.starts == 2 and consumer._waiting[by_stamp] is by_stamp.handle


@pytest.mark.parametrize("zone", [None, UTC])
def test_expiry_is_looked_at_again_when_it_is_due(consumer, zone):
    request = Request(expires=datetime.now(zone) + timedelta(seconds=60))
    consumer.on_task_request(request)
    ((seconds, fire),) = consumer.timer.calls
    assert 58 < seconds <= 60
    fire()
    assert not request.handle.wanted_back, "a timer that is early looks again"
    request.expires = datetime.now(zone)
    consumer.timer.calls[-1][1]()
    assert request.handle.wanted_back


def test_one_timer_serves_all_that_expire(consumer):
    consumer._slots.count = consumer._slots.free = 1000
    now = datetime.now(UTC)
    requests = [Request(expires=now + timedelta(seconds=60 + n)) for n in range(500)]
    for request in requests:
        consumer.on_task_request(request)
    assert len(consumer.timer.calls) == 1, "kombu keeps every timer until its time"
    sooner = Request(expires=now + timedelta(seconds=10))
    consumer.on_task_request(sooner)
    (_, at_60), (seconds, at_10) = consumer.timer.calls
    assert 8 < seconds <= 10
    sooner.end()
    at_10()
    seconds, at_60_again = consumer.timer.calls[-1]
    assert len(consumer.timer.calls) == 3 and 58 < seconds <= 60
    at_60()
    assert len(consumer.timer.calls) == 3, "its place was taken"
    for request in requests:
        request.end()
    at_60_again()
    assert len(consumer.timer.calls) == 3, "nothing expires any more"


def test_expiry_of_what_has_ended_or_started_or_was_dropped_changes_nothing(consumer):
    ended, started = (Request(expires=datetime.now(UTC)) for _ in range(2))
    consumer.on_task_request(ended), consumer.on_task_request(started)
    ended.end(), started.accept()
    dropped = Request(expires=datetime.now(UTC))
    consumer.on_task_request(dropped)
    consumer.on_close()
    assert consumer.pool.gpu.flushes == 0, "at shutdown the pool asks the driver"
    for _, fire in list(consumer.timer.calls):
        fire()
    consumer.withdraw_revoked()
    assert [request.handle.wanted_back for request in (ended, started, dropped)] == [None, None, None]


def test_a_lost_connection_that_cannot_be_closed_does_not_end_the_worker(consumer):
    """kombu's `'NoneType' object has no attribute 'hostname'` when Redis is gone and messages are in hand."""
    running = Request()
    consumer.on_task_request(running)
    running.accept()
    consumer.close_error = AttributeError("'NoneType' object has no attribute 'hostname'")
    consumer.on_connection_error_after_connected(OSError("gone"))
    assert (consumer.connection, consumer.losses, consumer.pool.gpu.flushes) == (None, 2, 1)
    running._on_ack("logger", "errors")  # the same error would come from there, and end the worker a second time
    consumer.connection, consumer.error_before_closing = Connection, AttributeError("another")
    with pytest.raises(AttributeError, match="another"):
        consumer.on_connection_error_after_connected(OSError("gone"))


def test_what_has_finished_is_heard_before_active_requests_are_cancelled(consumer):
    consumer.cancel_active_requests()
    assert consumer.cancelled == 1


def test_slots_are_in_the_first_prefetch_count_where_it_cannot_change(consumer):
    consumer.initial_prefetch_count = 8
    assert consumer.initial_prefetch_count == 8, "Redis"
    consumer.connection = Amqp
    assert consumer.initial_prefetch_count == 10, "quorum queues"
    consumer.qos_global = True
    assert consumer.initial_prefetch_count == 8, "classic queues"
    consumer.qos_global = False
    consumer.initial_prefetch_count = 0
    assert consumer.initial_prefetch_count == 0, "0 means no limit"


def test_the_limit_of_eta_tasks_is_not_one_of_gpu_tasks(consumer):
    consumer.qos.max_prefetch = 100
    requests = [Request() for _ in range(2)]
    for request in requests:
        consumer.on_task_request(request)
    assert (consumer.qos.value, consumer.qos.max_prefetch) == (102, 102)
    for request in requests:
        request.end()
    assert (consumer.qos.value, consumer.qos.max_prefetch) == (100, 100)
    consumer.qos.value = 0
    consumer.on_task_request(Request())
    assert consumer.qos.value == 0, "no limit"


def test_thousands_that_expired_while_they_waited_for_a_slot_end_one_after_the_other(consumer):
    consumer._slots.count = consumer._slots.free = 1
    running = Request()
    consumer.on_task_request(running)
    expired = [Request(error=TaskRevokedError()) for _ in range(5000)]
    last = Request()
    for request in [*expired, last]:
        consumer.on_task_request(request)
    running.end()
    assert last.handle is not None and consumer._slots.free == 0


def test_a_signal_that_ends_a_start_does_not_end_all_later_ones(consumer):
    consumer._slots.count = consumer._slots.free = 1
    with pytest.raises(SystemExit):
        consumer.on_task_request(Request(error=SystemExit()))
    consumer._slots.give()
    fine = Request()
    consumer.on_task_request(fine)
    assert fine.handle is not None


def test_a_request_that_cannot_start_keeps_no_other_from_it(consumer, refused):
    consumer._slots.count = consumer._slots.free = 1
    running, broken, fine = Request(), Request(error=ValueError("odd")), Request()
    for request in (running, broken, fine):
        consumer.on_task_request(request)
    running.end()
    assert len(refused) == 1
    assert fine.handle is not None


def test_what_others_have_is_dropped_here_unless_it_runs(consumer, caplog):
    consumer.task_buckets = {}
    running, waiting, queued, own = requests = [Request() for _ in range(4)]
    for tag, request in enumerate(requests):
        request.message = SimpleNamespace(delivery_tag=tag)
        state.reserved_requests.add(request)
        consumer.on_task_request(request)
    running.accept()
    state.active_requests.add(running)
    consumer._lost([0, 1, 2])
    assert [("goes on" in line, "dropped" in line) for line in caplog.messages].count((True, False)) == 1
    assert not running.handle.wanted_back
    waiting.handle.wanted_back()  # the driver gives it back
    assert waiting.starts == 1 and queued.starts == 0, "neither starts"
    assert own.starts == 1
    assert all(request._on_ack is request._on_reject is not None for request in (running, waiting, queued))
    running.end()
    own.end()
    assert consumer._slots.free == consumer._slots.count and not consumer._held
    state.active_requests.clear()
    state.reserved_requests.clear()


def test_a_worker_that_slept_looks_before_it_starts_a_task(consumer):
    consumer.task_buckets = {}
    slept, other = Request(), Request()
    for tag, request in enumerate((slept, other)):
        request.message = SimpleNamespace(delivery_tag=tag)
        state.reserved_requests.add(request)
    cycle = SimpleNamespace(renew_if_overdue=lambda: consumer._lost([0]))
    assert consumer._is_lost(cycle, slept.id)
    assert not consumer._is_lost(SimpleNamespace(renew_if_overdue=lambda: None), slept.id), "it has come back since"
    assert not consumer._is_lost(cycle, other.id)
    state.reserved_requests.clear()
