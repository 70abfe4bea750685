"""Messages in groups on a real Redis, beside stock kombu: the same keys, the same order, nothing lost or doubled."""

import contextlib
import json
import logging
import random
import socket
import time
from collections import Counter

import pytest
import redis
from kombu import Connection, Consumer, Producer, Queue

from bridge.worker.redis_channel import GroupedChannel, ask_in_groups
from bridge.worker.redis_qos import GroupedQoS
from bridge.worker.taking import READ_BYTES
from tests.support.services import RedisServer, wait_for

FAST = {"polling_interval": 0.05}


class Desk:
    """A consumer of some queues, in groups or stock, and what it has received."""

    def __init__(self, url, *queues, prefetch=0, grouped=True, no_ack=False, is_second=False, **options):
        self.connection = Connection(url, transport_options={**FAST, **options})
        if grouped:
            ask_in_groups(self.connection)
        self.other_channel = self.connection.channel() if is_second else None
        self.channel = self.connection.default_channel
        assert isinstance(self.channel, GroupedChannel) == grouped
        self.channel.basic_qos(0, prefetch, False)
        self.received = []
        self.on_message = lambda message: None
        self.consumer = Consumer(
            self.channel, [Queue(name, routing_key=name) for name in queues], on_message=self._take, no_ack=no_ack
        )
        self.consumer.consume()

    def _take(self, message):
        self.on_message(message)
        self.received.append(message)

    @property
    def bodies(self):
        return [message.payload for message in self.received]

    def turn(self):
        """One turn of the loop; False when nothing came."""
        before = len(self.received)
        with contextlib.suppress(socket.timeout):
            self.connection.drain_events(timeout=0.05)
        return len(self.received) > before

    def drain(self):
        while self.turn() or self.turn():  # one may only find out that Redis has to be asked otherwise
            pass
        return self.bodies


@pytest.fixture
def server(redis_server):
    redis_server.client.flushall()
    return redis_server


@pytest.fixture
def desk(server):
    """``desk(*queues)`` opens a consumer; it is closed after the test."""
    opened = []

    def open_desk(*queues, url=server.url, **options):
        opened.append(Desk(url, *(queues or ("q",)), **options))
        return opened[-1]

    yield open_desk
    for each in opened:
        each.connection.close()


def publish(url, bodies, queue="q", priority=None, **options):
    with Connection(url, transport_options=options) as connection:
        producer = Producer(connection)
        for body in bodies:
            producer.publish(body, routing_key=queue, priority=priority, serializer="json")


def calls(client):
    """How often each command was asked since the last look."""
    counts = {name[8:]: row["calls"] for name, row in client.info("commandstats").items()}
    client.config_resetstat()
    return Counter(counts)


def noted(client, prefix=""):
    """Tag and text of what Redis knows as unacknowledged; both keys name the same."""
    texts = client.hgetall(f"{prefix}unacked")
    assert set(texts) == set(client.zrange(f"{prefix}unacked_index", 0, -1))
    return {tag.decode(): json.loads(text) for tag, text in texts.items()}


def test_a_backlog_costs_few_questions_and_redis_holds_what_kombu_would_have_put_there(server, desk):
    publish(server.url, range(64))
    raw = [json.loads(text) for text in reversed(server.client.lrange("q", 0, -1))]
    one = desk()
    calls(server.client)
    assert one.drain() == list(range(64))
    asked = calls(server.client)
    assert asked["evalsha"] <= 12 and asked["brpop"] <= 12, asked
    expected = {text["properties"]["delivery_tag"]: [text, "", "q"] for text in raw}
    assert noted(server.client) == expected
    now = float(server.client.time()[0])
    assert all(abs(score - now) < 60 for _, score in server.client.zrange("unacked_index", 0, -1, withscores=True))
    for message in one.received:
        message.ack()
    one.turn()
    asked = calls(server.client)
    assert (asked["zrem"], asked["hdel"]) == (1, 1), "one question for all acknowledgements of a turn"
    assert noted(server.client) == {}


def test_the_keys_are_those_of_stock_kombu(server, desk):
    """The same messages through both: not a byte of difference in what another worker finds."""
    found = []
    for grouped in (False, True):
        server.client.flushall()
        with Connection(server.url) as connection:
            channel = connection.default_channel
            for number in range(3):
                message = channel.prepare_message(f'{{"ünï": "☃", "n": {number}}}', headers={"h": None, "x": [1.5e300]})
                channel._inplace_augment_message(message, "ex/ch", 'rk"')
                message["properties"]["delivery_tag"] = f"tag-{number}"
                channel._put("q", message)
        one = desk(grouped=grouped)
        one.drain()
        found.append(server.client.hgetall("unacked"))
        one.connection.close()
    assert len(found[0]) == 3
    assert {tag: json.loads(text) for tag, text in found[0].items()} == {
        tag: json.loads(text) for tag, text in found[1].items()
    }


def test_prefetch_is_the_limit(server, desk):
    publish(server.url, range(20))
    one = desk(prefetch=5)
    assert one.drain() == [0, 1, 2, 3, 4]
    assert (len(noted(server.client)), server.client.llen("q")) == (5, 15)
    for message in one.received[:2]:
        message.ack()
    assert one.drain() == [0, 1, 2, 3, 4, 5, 6]
    assert (len(noted(server.client)), server.client.llen("q")) == (5, 13)
    one.channel.basic_qos(0, 8, False)  # as for GPU and ETA tasks in hand
    assert len(one.drain()) == 10
    assert len(noted(server.client)) == 8


def test_with_a_backlog_one_question_per_turn_is_enough(server, desk):
    """What was acknowledged leaves with the question that fills its place; nobody waits for BRPOP."""
    publish(server.url, range(100))
    one = desk(prefetch=10)
    while len(one.received) < 10:
        one.turn()
    calls(server.client)
    for _ in range(5):
        for message in one.received[-10:]:
            message.ack()
        assert one.turn()
    assert one.bodies == list(range(60))
    asked = calls(server.client)
    assert asked["evalsha"] <= 7 and asked["brpop"] == 0, asked  # kombu's own lock for restoring messages asks, too
    assert len(noted(server.client)) == 10


def test_only_half_of_what_waits_is_taken_at_once(server, desk):
    publish(server.url, range(11))
    one, two = desk(), desk(grouped=False)
    one.turn()
    assert one.bodies == [0, 1, 2, 3, 4, 5]
    assert two.drain() == [6, 7, 8, 9, 10]


@pytest.mark.parametrize("strategy", ["round_robin", "sorted", "priority"])
@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_kombus(server, desk, strategy, seed):
    """Any mixture of queues and priorities is delivered as stock kombu delivers it, message by message."""
    dice = random.Random(seed)
    sent = [(dice.choice("cab"), dice.choice([0, 0, 3, 4, 9]), number) for number in range(60)]
    orders = []
    for grouped in (False, True):
        server.client.flushall()
        for queue, priority, number in sent:
            publish(server.url, [number], queue, priority)
        one = desk("c", "a", "b", grouped=grouped, queue_order_strategy=strategy)
        orders.append(one.drain())
        for message in one.received:
            message.ack()
        one.connection.close()
    assert orders[0] == orders[1]
    assert len(orders[1]) == 60


def test_every_key_has_the_global_prefix(server, desk):
    publish(server.url, range(9), global_keyprefix="mine:")
    one = desk(global_keyprefix="mine:")
    assert one.drain() == list(range(9))
    assert len(noted(server.client, "mine:")) == 9
    assert all(key.startswith(b"mine:") for key in server.client.scan_iter())
    for message in one.received:
        message.ack()
    one.turn()
    assert noted(server.client, "mine:") == {}


def test_a_dead_workers_messages_are_restored_by_stock_kombu(server, desk):
    publish(server.url, range(10), priority=3)
    before = sorted(server.client.lrange("q\x06\x163", 0, -1))
    one = desk()
    one.drain()
    one.channel.qos._delivered.clear()  # what a killed process does at its end: nothing
    other = desk("other", grouped=False, visibility_timeout=0, unacked_restore_limit=100)
    other.channel.qos.restore_visible(num=100)
    after = server.client.lrange("q\x06\x163", 0, -1)
    assert len(after) == 10 and noted(server.client) == {}

    def plain(texts):
        messages = [json.loads(text) for text in texts]
        for message in messages:
            message["headers"].pop("redelivered", None)
            message["properties"]["delivery_info"].pop("redelivered", None)
        return sorted(messages, key=json.dumps)

    assert plain(after) == plain(before)


def test_what_cannot_be_delivered_goes_back_when_the_channel_is_closed(server, desk):
    publish(server.url, range(16))
    one = desk()

    def fail_at_five(message):
        if message.payload == 5:
            raise LookupError("the consumer's own error")

    one.on_message = fail_at_five
    with pytest.raises(LookupError):
        one.drain()
    assert one.bodies == [0, 1, 2, 3, 4]
    for message in one.received:
        message.ack()
    one.connection.close()
    assert noted(server.client) == {}
    again = desk()
    assert sorted(again.drain()) == list(range(5, 16))


def test_a_queue_cancelled_meanwhile_gets_its_messages_back(server, desk):
    publish(server.url, range(6), "a")
    publish(server.url, range(6), "b")
    one = desk("a", "b")

    def cancel(message):
        one.connection.transport.cycle._in_protected_read = False  # as with the worker's event loop
        one.consumer.cancel_by_queue("b")

    one.on_message = cancel
    one.drain()
    assert {message.delivery_info["routing_key"] for message in one.received} == {"a"}
    assert (len(one.received), server.client.llen("b"), len(noted(server.client))) == (6, 6, 6)
    assert one.channel.qos.can_consume_max_estimate() is None
    assert len(one.channel.qos._delivered) - len(one.channel.qos._dirty) == 6


@pytest.mark.parametrize("how", ["script", "brpop"])
def test_a_large_message_of_a_cancelled_queue_goes_back_whole(server, desk, how):
    """kombu reads what nobody consumes on the connection's first channel, which is not the consuming one."""
    one = desk(is_second=True, polling_interval=10)
    if how == "brpop":
        one.channel._refused_until = time.monotonic() + 1000
    wait_for(lambda: not one.turn() and one.channel._in_poll, "it to ask")
    large = "x" * READ_BYTES
    publish(server.url, [large])
    if how == "script":
        one.channel._brpop_start()
        wait_for(lambda: noted(server.client), "Redis to have answered")
    assert server.client.llen("q") == 0
    one.consumer.cancel()
    wait_for(lambda: one.turn() or server.client.llen("q"), "it to go back")
    assert (one.received, noted(server.client)) == ([], {})
    assert desk(grouped=False).drain() == [large]


def test_scripts_flushed_under_a_running_worker(server, desk):
    one = desk()
    for _ in range(2):
        server.client.script_flush()
        publish(server.url, range(9))
        one.drain()
    assert one.bodies == [*range(9), *range(9)]
    assert len(noted(server.client)) == 18


def test_where_no_script_may_be_loaded_kombu_goes_on_alone(server, desk, caplog):
    server.client.script_flush()
    with server.client.lock("any"):  # loads the one script that kombu itself cannot do without
        pass
    server.client.execute_command("ACL", "SETUSER", "plain", "on", "nopass", "~*", "&*", "+@all", "-script")
    try:
        one = desk(url=server.url.replace("redis://", "redis://plain:x@"))
        publish(server.url, range(9))
        assert one.drain() == list(range(9))
        assert "Redis refused a script" in caplog.text
        one.connection.close()
    finally:
        server.client.acl_deluser("plain")


def test_without_emulated_acknowledgements_kombu_goes_on_alone(server, desk):
    one = desk(ack_emulation=False)
    publish(server.url, range(9))
    assert one.drain() == list(range(9))
    assert noted(server.client) == {}


def test_where_the_script_may_not_run_kombu_goes_on_alone(server, desk, caplog):
    server.client.execute_command("ACL", "SETUSER", "plain", "on", "nopass", "~*", "&*", "+@all", "-lindex")
    try:
        publish(server.url, range(9))
        one = desk(url=server.url.replace("redis://", "redis://plain:x@"))
        assert one.drain() == list(range(9))
        assert len(noted(server.client)) == 9
        assert caplog.text.count("Redis refused a script") == 1
        for message in one.received:
            message.ack()
        one.turn()
        assert noted(server.client) == {}
        one.connection.close()
    finally:
        server.client.acl_deluser("plain")


def test_a_full_redis_loses_no_message(server, desk):
    publish(server.url, [f"{number} " + "x" * 1000 for number in range(40)])
    one = desk()
    server.client.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.OutOfMemoryError):
            server.client.set("any", "thing")

        def all_received():
            with contextlib.suppress(redis.OutOfMemoryError):  # kombu's lock for restoring messages
                one.turn()
            return len(one.received) == 40

        wait_for(all_received, "all messages")
        assert len(noted(server.client)) == 40
        for message in one.received:
            message.ack()
        with contextlib.suppress(redis.OutOfMemoryError):
            one.turn()
        assert noted(server.client) == {}
    finally:
        server.client.config_set("maxmemory", 0)


def test_a_large_message_is_left_to_kombu_and_nothing_overtakes_it(server, desk):
    large = "x" * READ_BYTES
    publish(server.url, [0, 1, large, 3, large, large, 6, 7])
    one = desk()
    assert one.drain() == [0, 1, large, 3, large, large, 6, 7]
    assert len(noted(server.client)) == 8


@pytest.mark.parametrize("may_run_scripts", [True, False])
def test_a_large_message_is_noted_as_it_came_and_comes_again_whole(server, desk, may_run_scripts):
    """Its body is read apart from it, which Redis must not see."""
    large = [{"n": number, "text": "ü" * 100_000} for number in range(3)]
    server.client.execute_command(
        "ACL", "SETUSER", "plain", "on", "nopass", "~*", "&*", "+@all", *([] if may_run_scripts else ["-lindex"])
    )
    try:
        publish(server.url, large)
        raw = [json.loads(text) for text in reversed(server.client.lrange("q", 0, -1))]
        one = desk(url=server.url.replace("redis://", "redis://plain:x@"))
        assert one.drain() == large
        assert sorted(noted(server.client).values(), key=str) == sorted(([text, "", "q"] for text in raw), key=str)
        one.received[0].ack()
        one.received[1].requeue()
        one.connection.close()
    finally:
        server.client.acl_deluser("plain")
    assert sorted(desk(grouped=False).drain(), key=str) == large[1:]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\x00garbage",
        b"[1, 2]",
        b'{"properties": 5}',
        b'{"properties": {"delivery_tag": 5, "delivery_info": {"exchange": "", "routing_key": "q"}}}',
        b'{"properties": {"delivery_tag": "t", "delivery_info": {"exchange": null}}}',
        b'{"a": 0x10, "properties": {"delivery_tag": "t", "delivery_info": {"exchange": "", "routing_key": "q"}}}',
        b'{"a": "\xff", "properties": {"delivery_tag": "\xfe", "delivery_info": {"exchange": "", "routing_key": "q"}}}',
        b'{"body": "*", "properties": {"body_encoding": "base64", "delivery_tag": "t", "delivery_info": '
        b'{"exchange": "", "routing_key": "q"}}}',
    ],
)
def test_what_is_no_message_costs_only_itself_as_with_kombu(server, desk, garbage):
    """Kombu drops it and raises; here it is dropped and said, whatever Redis' own JSON thinks of it."""
    ends = []
    for grouped in (False, True):
        server.client.flushall()
        publish(server.url, range(3))
        server.client.lpush("q", garbage)
        publish(server.url, range(3, 12))
        one = desk(grouped=grouped)
        errors, silent = [], 0
        while silent < 3:
            try:
                silent = 0 if one.turn() else silent + 1
            except Exception as error:
                errors.append(type(error))
        one.drain()
        good = [message.payload for message in one.received if message.content_type]
        for message in one.received:
            message.ack()
        one.turn()
        ends.append((sorted(good), len(one.received), noted(server.client)))
        one.connection.close()
    assert ends[0][0] == list(range(12))
    assert ends[0] == ends[1]
    assert not errors, "what a grouped channel raises would end the worker"


def test_two_messages_with_one_tag_both_arrive(server, desk):
    publish(server.url, [0])
    twin = server.client.lpop("q")
    server.client.lpush("q", twin, twin, twin)
    one = desk()
    assert one.drain() == [0, 0, 0]
    for message in one.received:
        message.ack()
    one.turn()
    assert noted(server.client) == {}


def test_whoever_looks_anew_at_each_message_gets_one_at_a_time(server, desk):
    """--disable-prefetch."""
    publish(server.url, range(8))
    one = desk()
    qos = one.channel.qos
    qos.can_consume = lambda: len(one.received) < 3
    assert one.drain() == [0, 1, 2]
    assert server.client.llen("q") == 5


def test_without_acknowledgements_nothing_is_noted(server, desk):
    publish(server.url, range(8))
    one = desk(no_ack=True)
    assert one.drain() == list(range(8))
    assert noted(server.client) == {}


def test_a_queue_without_acknowledgements_that_is_cancelled_again_changes_nothing(server, desk):
    """Celery's mingle consumes one on the same channel while the worker starts."""
    one = desk()
    with Consumer(one.channel, [Queue("replies")], no_ack=True):
        publish(server.url, range(9))
        one.turn()
        assert one.bodies == [0]
    calls(server.client)
    assert one.drain() == list(range(9))
    assert calls(server.client)["lindex"] > 0


def test_rejected_messages_are_dropped_or_come_again(server, desk):
    publish(server.url, range(6))
    one = desk(prefetch=6)
    one.drain()
    one.received[0].reject()
    one.received[1].reject(requeue=True)
    for message in one.received[2:]:
        message.ack()
    one.drain()
    assert one.bodies == [0, 1, 2, 3, 4, 5, 1]
    assert one.received[-1].headers["redelivered"]
    assert len(noted(server.client)) == 1


def test_nothing_consumed_any_more_acknowledgements_leave_at_once(server, desk):
    """During a warm shutdown no turn of the loop comes."""
    publish(server.url, range(6))
    one = desk()
    one.drain()
    one.received[0].ack()
    assert len(noted(server.client)) == 6
    one.consumer.cancel()
    assert len(noted(server.client)) == 5
    one.received[1].ack()
    assert len(noted(server.client)) == 4


def test_what_is_given_back_has_kombus_order(server, desk):
    orders = []
    for grouped in (False, True):
        publish(server.url, range(9))
        one = desk(grouped=grouped)
        one.drain()
        one.connection.close()
        again = desk(grouped=False)
        orders.append(again.drain())
        for message in again.received:
            message.ack()
        again.connection.close()
    assert orders[0] == orders[1] and len(orders[0]) == 9


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_what_is_on_its_way_when_nothing_is_consumed_any_more_goes_back(server, desk, end):
    publish(server.url, range(40))
    one = desk(prefetch=10)
    while len(one.received) < 10:
        one.turn()
    for message in one.received:
        message.ack()
    one.connection.transport.cycle.on_poll_start()  # asks, and takes the acknowledgements along
    wait_for(lambda: len(noted(server.client)) == 10 and server.client.llen("q") == 20, "Redis to have answered")
    getattr(one.consumer if end == "cancel" else one.channel, end)()
    assert noted(server.client) == {}
    assert server.client.llen("q") == 30
    assert sorted(desk().drain()) == list(range(10, 40))


def test_a_question_lost_with_its_connection_is_asked_again_with_its_acknowledgements(server, desk):
    publish(server.url, range(40))
    one = desk(prefetch=10)
    while len(one.received) < 10:
        one.turn()
    for message in one.received:
        message.ack()
    one.connection.transport.cycle.on_poll_start()
    wait_for(lambda: server.client.llen("q") == 20, "Redis to have answered")
    one.channel.client.connection.disconnect()  # as kombu does with a connection it takes for dead
    one.channel.qos._ack_at = 0.0
    one.drain()
    acked = {message.delivery_tag for message in one.received[:10]}
    assert not acked & set(noted(server.client))
    assert one.bodies == [*range(10), *range(20, 30)]
    assert len(noted(server.client)) == 20, "ten that nobody has heard of come back after the visibility time-out"


def test_closing_sends_acknowledgements_before_it_gives_back(server, desk):
    publish(server.url, range(6))
    one = desk()
    one.drain()
    for message in one.received[:4]:
        message.ack()
    one.channel.close()
    assert noted(server.client) == {}
    assert sorted(desk().drain()) == [4, 5]


def test_many_acknowledgements_do_not_wait_for_the_turns_end(server, desk):
    publish(server.url, range(600))
    one = desk()
    one.drain()
    for message in one.received:
        message.ack()
    assert len(noted(server.client)) == 100


def test_refused_acknowledgements_are_sent_again(server, desk, caplog):
    publish(server.url, range(6))
    one = desk()
    one.drain()
    server.client.replicaof("127.0.0.1", 1)  # as in a failover: what was the master takes no writes
    try:
        for message in one.received:
            message.ack()
        one.channel.qos.send_acks()
        assert "they are sent again" in caplog.text and "ReadOnlyError" in caplog.text
        assert len(noted(server.client)) == 6
    finally:
        server.client.replicaof("NO", "ONE")

    def all_sent():
        one.channel.qos.send_acks()
        return not noted(server.client)

    wait_for(all_sent, "the acknowledgements")


def test_a_lost_connection_costs_the_acknowledgements_and_nothing_is_raised(tmp_path, caplog):
    server = RedisServer(tmp_path)
    try:
        publish(server.url, range(6))
        one = Desk(server.url, "q")
        one.drain()
        server.client.close()
        server.kill_group()
        for message in one.received:
            message.ack()
        with caplog.at_level(logging.CRITICAL):
            one.channel.qos.send_acks()
        assert "Couldn't ack 6 messages" in caplog.text
        assert one.channel.qos.can_consume()
        with pytest.raises(one.connection.connection_errors):
            one.drain()
        one.channel.qos._delivered.clear()
        one.connection.collect()
    finally:
        server.kill_group()


def test_redis_restarted_under_a_consumer(tmp_path):
    server = RedisServer(tmp_path)
    one = Desk(server.url, "q")
    try:
        publish(server.url, range(5))
        assert one.drain() == list(range(5))
        for message in one.received:
            message.ack()
        one.turn()
        server.client.close()
        server.kill_group()
        with pytest.raises(one.connection.connection_errors):
            one.drain()
        server = RedisServer(tmp_path, port=server.port)
        publish(server.url, range(5, 14))
        assert one.drain() == list(range(14))
        assert len(noted(server.client)) == 9
    finally:
        one.connection.close()
        server.client.close()
        server.kill_group()


@pytest.mark.parametrize("url", ["memory://", "amqp://"])
def test_other_brokers_stay_as_they_are(url):
    with Connection(url) as plain, Connection(url) as connection:
        ask_in_groups(connection)
        assert type(connection.transport) is type(plain.transport)
        assert vars(connection.transport).keys() == vars(plain.transport).keys()


@pytest.mark.parametrize("url", ["redis://", "rediss://", "sentinel://"])
def test_every_kind_of_redis_is_asked_in_groups(url):
    with Connection(url, ssl=url.startswith("rediss")) as connection:
        stock = connection.create_transport().Channel
        ask_in_groups(connection)
        assert issubclass(connection.transport.Channel, GroupedChannel) and issubclass(
            connection.transport.Channel, stock
        )
        assert connection.transport.Channel.QoS is GroupedQoS


def test_a_failover_to_another_url_is_asked_in_groups_too(server):
    with Connection(f"redis://127.0.0.1:1/0;{server.url}") as connection:
        ask_in_groups(connection)
        connection.ensure_connection(max_retries=3, interval_start=0)
        assert isinstance(connection.default_channel.qos, GroupedQoS)
