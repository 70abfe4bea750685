"""What may enter the worker: slots, prefetch and autoscale per kind, with a make-believe consumer and pool."""

import pytest
from celery.exceptions import TaskRevokedError
from celery.worker import state

from bridge.consumer import HybridAutoscaler, HybridConsumer, hybrid_autoscaler, hybrid_consumer


class Qos:
    def __init__(self):
        self.wider = 0

    def increment_eventually(self, n=1):
        self.wider += n

    def decrement_eventually(self, n=1):
        self.wider -= n


class Handle:
    on_accepted = on_end = staticmethod(lambda: None)


class Gpu:
    running = 0


class Pool:
    def __init__(self, slots=2):
        self.gpu_slots = slots
        self.marks = {"gpu": None}
        self.gpu = Gpu()


class Request:
    """A Celery request as far as the consumer looks at it."""

    def __init__(self, name="gpu", error=None):
        self.name, self.error = name, error
        self.acknowledged = False
        self.handle = None

    def execute_using_pool(self, pool):
        if self.error:
            raise self.error
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

    def __init__(self, on_task_request, pool):
        self.on_task_request = on_task_request
        self.pool = pool
        self.qos = Qos()
        self.closed = 0

    def on_close(self):
        self.closed += 1


@pytest.fixture
def cpu():
    return []


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


def test_an_error_while_starting_gives_the_slot_back_and_is_raised(consumer):
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            consumer.on_task_request(Request(error=ZeroDivisionError()))
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
    consumer.pool.gpu.running = 1
    consumer.on_close()
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
    monkeypatch.setattr("bridge.consumer.reserved_requests", requests)
    scaler = hybrid_autoscaler(Base)()
    assert isinstance(scaler, HybridAutoscaler)
    assert scaler.qty == 2
    assert hybrid_autoscaler(type(scaler)) is type(scaler)
    assert state.reserved_requests is not None
