"""Whatever lies in a Redis list, through the real channel and Celery's own consumer: nothing is raised or stays."""

import json
import tracemalloc
import uuid
from types import SimpleNamespace

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError
from celery.worker import state
from celery.worker.consumer import Consumer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kombu import Connection
from kombu.asynchronous.timer import Timer
from kombu.common import QoS

from bridge.worker.consumer import hybrid_consumer
from bridge.worker.redis_channel import ask_in_groups
from tests.support import hostile
from tests.support.services import wait_for

pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated:DeprecationWarning")  # Celery's, of redis-py

QUEUE = "fuzzed"
LIMIT = 10_000
KINDS = ("messages.gpu.same", "messages.cpu.same")


def same(value):
    return value


class Handle:
    on_end = on_accepted = None


class Pool:
    """Takes requests and runs nothing."""

    gpu_slots = 100
    is_green = False
    marks = {KINDS[0]: None}
    settings = SimpleNamespace(max_body_bytes=LIMIT, raw_body_bytes=0)

    def __init__(self):
        self.started = []

    def is_gpu(self, request):
        return request.type in self.marks

    def apply_async(self, trace, args, **options):
        self.started.append(args[0])
        return Handle()


class Intake:
    """A worker from Redis to its pool, without event loop and processes."""

    def __init__(self, server):
        self.redis = server.client
        self.app = Celery("fuzzed", broker=server.url, backend=server.url, set_as_current=False)
        for name in KINDS:
            self.app.task(name=name, acks_late=True)(same)
        self.app.finalize()
        self.pool = Pool()
        controller = SimpleNamespace(state=state, semaphore=None, statedb=None, use_eventloop=False, app=self.app)
        self.consumer = hybrid_consumer(Consumer)(
            self._start_cpu, app=self.app, pool=self.pool, controller=controller, hostname="fuzzed@host",
            timer=Timer(), initial_prefetch_count=100, disable_rate_limits=True,
        )  # fmt: skip
        self.consumer.connection = self.connection = Connection(
            server.url, transport_options={"polling_interval": 0.01}
        )
        ask_in_groups(self.connection)
        self.consumer.qos = QoS(lambda **_: None, 100)
        self.consumer.event_dispatcher = None
        self.consumer.update_strategies()
        tasks = self.consumer.task_consumer = self.app.amqp.TaskConsumer(
            self.connection.default_channel, [self.app.amqp.queues.select_add(QUEUE)],
            on_decode_error=self.consumer.on_decode_error,
        )  # fmt: skip
        tasks.on_message = self.consumer.create_task_handler()
        tasks.consume()

    def _start_cpu(self, request):
        try:
            request.execute_using_pool(self.pool)
        except TaskRevokedError:
            return
        request.acknowledge()

    def turn(self):
        """Take what has arrived; whether anything had."""
        try:
            self.connection.drain_events(timeout=0.05)
        except TimeoutError:
            return False
        return True

    def take(self, raw):
        """Put a text into the queue, take it, and end what started; names of tasks that did."""
        self.redis.lpush(QUEUE, raw)
        self.pool.started.clear()
        for _ in range(20):
            self.turn()  # one may only find out that BRPOP has to ask
            if not self.redis.llen(QUEUE):
                break
        for request in list(self.consumer._in_hand):
            request.acknowledge()
            self.consumer._end(request)
        for request in list(state.scheduled_requests):
            request.acknowledge()
        state.reset_state()
        self.connection.default_channel.qos.send_acks()
        assert self.redis.llen(QUEUE) == 0
        return list(self.pool.started)


@pytest.fixture(scope="module")
def intake(redis_server):
    redis_server.client.flushall()
    made = Intake(redis_server)
    yield made
    made.connection.close()
    made.app.close()
    state.reset_state()


@pytest.fixture(autouse=True)
def nothing_stays(intake):
    yield
    assert intake.redis.zcard("unacked_index") == intake.redis.hlen("unacked") == 0
    assert intake.consumer._slots.free == Pool.gpu_slots and not intake.consumer._held
    for name in KINDS:
        assert intake.take(good(name)) == [name], "a good message is taken as before"


def good(name, /, **headers):
    body = hostile.encoded([[7], {}, {}])
    return hostile.envelope(QUEUE, {"task": name, "id": str(uuid.uuid4()), **headers}, body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
header_names = st.sampled_from(
    ["task", "id", "eta", "expires", "timelimit", "retries", "group", "compression", "stamped_headers", "shadow",
     "ignore_result", "argsrepr", "root_id", "lang"]
)  # fmt: skip
headers = st.dictionaries(header_names | st.text(max_size=10), json_values, max_size=5)
bodies = st.one_of(
    st.binary(max_size=50).map(hostile.encoded),
    st.tuples(json_values, json_values, json_values).map(lambda body: hostile.encoded(list(body))),
    st.dictionaries(header_names | st.sampled_from(["args", "kwargs"]), json_values, max_size=4).map(hostile.encoded),
    st.text(max_size=30),
    json_values,
)
parts = st.dictionaries(
    st.sampled_from(["headers", "body", "properties", "content-type", "content-encoding"]), json_values, max_size=2
)
content_types = st.sampled_from(
    ["application/json", "application/x-python-serialize", "application/x-yaml", "application/data", "text/plain"]
)
fuzz = settings(
    max_examples=120, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@fuzz
@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_in_the_queue(intake, raw):
    assert intake.take(raw) == []


@fuzz
@given(parts, st.sampled_from(KINDS))
def test_any_part_of_an_envelope(intake, changes, name):
    message = {**json.loads(good(name)), **changes}
    assert set(intake.take(json.dumps(message).encode())) <= {name}


@fuzz
@given(headers, st.sampled_from(KINDS))
def test_any_headers(intake, changes, name):
    started = intake.take(good(name, **changes))
    assert all(each == changes.get("task", name) and each in KINDS for each in started)


@fuzz
@given(bodies, content_types, st.sampled_from([*KINDS, None]))
def test_any_body(intake, body, content_type, name):
    own = {"task": name, "id": str(uuid.uuid4())} if name else {}
    raw = hostile.envelope(QUEUE, own, body, **{"content-type": content_type})
    started = intake.take(raw)
    assert set(started) <= {name} if name else set(started) <= set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_the_listed_ones(intake, name, tmp_path):
    trap = str(tmp_path / "trap")
    for raw in (*hostile.no_messages(QUEUE), *hostile.odd_headers(QUEUE, name), *hostile.odd_bodies(QUEUE, name, trap)):
        assert set(intake.take(raw)) <= {*KINDS, "celery.map", "celery.chord_unlock"}
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("name", KINDS)
def test_large_bodies(intake, name):
    for own, raw in hostile.large_bodies(QUEUE, name, LIMIT):
        assert intake.take(raw) == []
        stored = json.loads(intake.redis.get(f"celery-task-meta-{own}"))
        assert (stored["status"], stored["result"]["exc_type"]) == ("FAILURE", "PayloadTooLarge")


@pytest.mark.parametrize("name", KINDS)
def test_a_very_large_body_is_cut_out_before_it_is_parsed(intake, name):
    own = str(uuid.uuid4())
    body = hostile.encoded(b"x" * 50_000_000)
    tracemalloc.start()
    assert intake.take(hostile.envelope(QUEUE, {"task": name, "id": own}, body)) == []
    wait_for(lambda: (intake.turn(), intake.redis.exists(f"celery-task-meta-{own}"))[1], "the failure to be stored")
    intake.connection.default_channel.qos.send_acks()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * len(body), "sending takes some; kombu alone would make it seven times"
    stored = json.loads(intake.redis.get(f"celery-task-meta-{own}"))
    assert (stored["status"], stored["result"]["exc_type"]) == ("FAILURE", "PayloadTooLarge")
