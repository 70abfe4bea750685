"""Waiting without taking on a real Redis: who dies or is cut off takes no message along, and nobody waits longer."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import redis

from bridge.worker import redis_channel
from bridge.worker.taking import READ_BYTES, REMEDY, Watch, trial
from tests.integration.test_redis_channel import Desk, calls, desk, noted, publish, server  # noqa: F401 - fixtures
from tests.support.services import ROOT, RedisServer, wait_for

#: A question is repeated after this long, in seconds: never, as far as these tests go.
NEVER_S = 1000
CONSUMER = """
import sys
from tests.integration.test_redis_channel import Desk
desk = Desk(sys.argv[1], "q", grouped=sys.argv[2] == "grouped", polling_interval=None)
print("consumes", flush=True)
while True:
    desk.turn()
"""


def waits(one):
    """A consumer that waits for Redis to say something; it is not asked anew."""
    one.channel.brpop_timeout = NEVER_S
    wait_for(lambda: not one.turn() and one.channel._is_waiting() and not one.channel._more_waits, "it to wait")
    return one


def said(one):
    """What Redis has sent that is not read yet."""
    sock = one.channel.client.connection._sock
    return sock.recv(1 << 16, socket.MSG_PEEK) if select.select([sock], [], [], 0)[0] else b""


def somewhere(client):
    """How many messages Redis still has, in lists or noted as unacknowledged."""
    return sum(client.llen(key) for key in client.scan_iter("q*")) + len(noted(client))


@pytest.mark.parametrize("how", ["stock", "grouped"])
def test_a_process_killed_at_the_moment_of_delivery(server, how):  # noqa: F811
    """With stock kombu the message is in nobody's hands: what this is all about."""
    found = [left_by_one_killed(server, how) for _ in range(3)]
    if how == "grouped":
        assert found == [1, 1, 1]
    else:  # once a second it is between two BRPOPs, and loses nothing then
        assert 0 in found


def left_by_one_killed(redis_server, how):
    """A consumer is stopped while it waits, a message comes, and it is killed: how many are there afterwards."""
    command = [sys.executable, "-c", CONSUMER, redis_server.url, how]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        waiting_for = {"stock": "brpop", "grouped": "exists"}[how]
        wait_for(lambda: any(each["cmd"] == waiting_for for each in redis_server.client.client_list()), "it to wait")
        os.kill(process.pid, signal.SIGSTOP)
        publish(redis_server.url, [0])
    finally:
        process.kill()
        process.communicate()
    found = somewhere(redis_server.client)
    redis_server.client.flushdb()
    return found


@pytest.mark.parametrize("options", [{}, {"priority": 9}, {"body": "x" * READ_BYTES}, {"disable_prefetch": True}])
def test_a_connection_cut_at_the_moment_of_delivery(server, desk, options):  # noqa: F811
    body = options.get("body", 0)
    one = waits(desk("other", "q", prefetch=1))
    if "disable_prefetch" in options:
        one.channel.qos.can_consume = lambda: True
    publish(server.url, [body], priority=options.get("priority"))
    wait_for(lambda: b"invalidate" in said(one), "Redis to say that a list has changed")
    one.channel.client.connection.disconnect()
    assert somewhere(server.client) == 1
    one.channel.brpop_timeout = 0.05
    assert one.drain() == [body]
    assert list(noted(server.client)) == [one.received[0].delivery_tag]


def test_the_descriptor_of_a_cut_connection_is_forgotten(server, desk):  # noqa: F811
    """Its number is another's meanwhile, or nobody's; kombu looked for it when no more messages were wanted: EBADF."""
    one = waits(desk(prefetch=1))
    number = one.channel.client.connection._sock.fileno()
    one.channel.client.connection.disconnect()
    with contextlib.ExitStack() as files:
        while files.enter_context(open(os.devnull)).fileno() < number:  # the next connection gets another number
            pass
        publish(server.url, range(2))
        one.channel.brpop_timeout = 0.05
        assert one.drain() == [0]
    assert not one.turn(), "it has as many as it may"
    one.received[0].ack()
    assert one.drain() == [0, 1]


def test_a_connection_cut_before_the_answer_is_read(server, desk):  # noqa: F811
    one = waits(desk())
    publish(server.url, range(4))
    one.channel._brpop_start()
    wait_for(lambda: len(noted(server.client)) == 2, "Redis to have answered")
    one.channel.client.connection.disconnect()
    assert somewhere(server.client) == 4
    assert one.drain() == [2, 3], "the others come back after the visibility time-out"
    assert somewhere(server.client) == 4


@pytest.mark.parametrize(("queue", "priority"), [("a", None), ("b", 3), ("b", 9), ("c", 6)])
def test_a_message_in_any_list_ends_the_wait(server, desk, queue, priority):  # noqa: F811
    one = waits(desk("a", "b", "c"))
    for number in range(3):
        publish(server.url, [number], queue, priority)
        wait_for(one.turn, "the message")
    assert one.bodies == [0, 1, 2]


def test_a_queue_consumed_later_is_waited_for_too(server, desk):  # noqa: F811
    one = waits(desk())
    from kombu import Queue

    one.consumer.add_queue(Queue("later", routing_key="later"))
    one.consumer.consume()
    waits(one)
    publish(server.url, [1], "later")
    wait_for(one.turn, "its message")
    one.consumer.cancel()
    assert not one.channel._is_waiting(), "nobody would read what Redis says"
    publish(server.url, [2], "later")
    one.turn()
    assert (one.bodies, server.client.llen("later")) == ([1], 1)
    one.consumer.consume()
    waits_again = wait_for(one.turn, "its message")
    assert waits_again and one.bodies == [1, 2]


def test_what_is_rejected_to_its_queue_ends_the_wait(server, desk):  # noqa: F811
    one = desk()
    publish(server.url, [0])
    one.drain()
    waits(one)
    one.received[0].reject(requeue=True)
    wait_for(one.turn, "it to come again")
    assert one.bodies == [0, 0]


def test_a_change_that_comes_with_the_answer_is_heard(server, desk):  # noqa: F811
    one = waits(desk())
    one.channel._brpop_start()
    wait_for(lambda: said(one), "the answer")
    publish(server.url, [1])
    wait_for(lambda: b"invalidate" in said(one), "the change, in the same read")
    wait_for(lambda: one.turn() or one.received, "the message")


def test_at_the_limit_nothing_is_taken_asked_or_cut(server, desk):  # noqa: F811
    one = desk(prefetch=1)
    publish(server.url, [0])
    one.drain()
    waits_on = one.channel.client.connection._sock
    publish(server.url, range(1, 4))
    for _ in range(3):
        one.turn()
    assert (one.bodies, server.client.llen("q")) == ([0], 3)
    assert one.channel._brpop_sent_at is None, "no answer is overdue"
    for number in range(3):
        one.received[number].ack()
        wait_for(one.turn, "the next")
    assert one.bodies == [0, 1, 2, 3]
    assert one.channel.client.connection._sock is waits_on


def test_a_connection_closed_while_nothing_is_wanted_is_made_anew(server, desk):  # noqa: F811
    """Redis closes idle ones; were it raised, Celery would connect anew and run late-acknowledged tasks again."""
    one = desk(prefetch=1)
    publish(server.url, [0, 1])
    one.drain()
    wait_for(lambda: not one.turn() and one.channel._is_waiting(), "it to wait")
    host, port = one.channel.client.connection._sock.getsockname()
    server.client.client_kill(f"{host}:{port}")
    wait_for(lambda: not one.turn() and one.channel._is_due(), "it to have waited for long")
    one.received[0].ack()
    wait_for(one.turn, "the next message, without an error")
    assert one.bodies == [0, 1]


def test_no_health_check_goes_before_a_question(server, desk):  # noqa: F811
    """Where redis-py may connect anew in the middle of it, replies would be one out of step."""
    one = waits(desk())
    calls(server.client)
    connection = one.channel.client.connection
    for ask in (one.channel._brpop_start, lambda: one.channel._watch.end(connection)):
        connection.next_health_check = -1
        ask()
        one.turn() if one.channel._asked else connection.disconnect()
    assert calls(server.client)["ping"] == 0


def test_what_others_hold_before_the_answer_is_read_is_let_go(server, desk):  # noqa: F811
    one = waits(desk())
    publish(server.url, [0])
    one.channel._brpop_start()
    wait_for(lambda: noted(server.client), "Redis to have answered")
    (tag,) = noted(server.client)
    server.client.zadd("unacked_index", {tag: time.time()})  # as another worker would, that got it after a time-out
    lost = []
    one.connection.transport.cycle.on_lost = lost.extend
    wait_for(one.turn, "the message")
    one.channel.qos.renew()
    assert lost == [tag]


def test_while_it_waits_one_question_is_asked_in_each_period(server, desk):  # noqa: F811
    one = waits(desk())
    asked_at = one.channel._answered_at
    one.turn()
    assert one.channel._answered_at == asked_at
    one.channel.brpop_timeout = 0.001
    wait_for(lambda: not one.turn() and one.channel._answered_at > asked_at, "an answer")


# ---- where it cannot be done


def test_where_redis_says_nothing_brpop_waits(server, desk, caplog):  # noqa: F811
    server.client.execute_command("ACL", "SETUSER", "deaf", "on", "nopass", "~*", "&*", "+@all", "-client")
    try:
        one = desk(url=server.url.replace("redis://", "redis://deaf:x@"))
        one.drain()
        publish(server.url, range(9))
        assert one.drain() == list(range(9))
        assert len(noted(server.client)) == 9
        assert caplog.text.count("Redis does not say when a list changes (NoPermissionError") == 1
        assert caplog.text.count(REMEDY) == 1
        assert is_asked_by_brpop(server)
        assert "NoPermissionError" in trial(one.channel.async_pool.get_connection(), "trial")
        one.connection.close()
    finally:
        server.client.acl_deluser("deaf")


def is_asked_by_brpop(redis_server):
    return any(each["cmd"] == "brpop" for each in redis_server.client.client_list())


@pytest.fixture
def old_client(monkeypatch):
    """redis-py before 8 speaks protocol 2 unless it is told otherwise."""
    for each in (redis.connection, redis.utils):
        monkeypatch.setattr(each, "DEFAULT_RESP_VERSION", 2, raising=False)  # an old one has no such name


def test_where_the_client_speaks_protocol_2_the_consuming_connection_does_not(old_client, server, desk):  # noqa: F811
    one, stock = desk(), desk("other", grouped=False)
    for each in (one, stock):
        each.turn()
    assert [each.channel.client.connection.protocol for each in (one, stock)] == [3, 2]
    waits(one)
    publish(server.url, range(3))
    assert one.drain() == [0, 1, 2]
    assert trial(one.channel.async_pool.get_connection(), "trial") == ""
    assert not list(server.client.scan_iter("trial*")), "a trial leaves nothing"


def test_a_server_that_speaks_protocol_2_only_is_asked_by_brpop_and_that_is_said(old_client, tmp_path, caplog):
    own = RedisServer(tmp_path, options=['rename-command HELLO ""'])
    one = Desk(own.url, "q")
    try:
        publish(own.url, range(9))
        assert one.drain() == list(range(9))
        assert own.client.hlen("unacked") == 9
        assert is_asked_by_brpop(own)
        assert caplog.text.count("Redis does not say when a list changes") == caplog.text.count(REMEDY) == 1
        assert "protocol 2" in trial(one.channel.async_pool.get_connection(), "trial")
    finally:
        one.connection.close()
        own.client.close()
        own.kill_group()


def test_a_url_that_asks_for_protocol_2_has_it(tmp_path, caplog):
    own = RedisServer(tmp_path, options=[f"unixsocket {tmp_path / 'redis.sock'}"])
    one = Desk(f"redis+socket://{tmp_path / 'redis.sock'}?protocol=2", "q")
    try:
        publish(own.url, range(9))
        assert one.drain() == list(range(9))
        assert is_asked_by_brpop(own) and caplog.text.count(REMEDY) == 1
    finally:
        one.connection.close()
        own.client.close()
        own.kill_group()


def test_while_redis_is_busy_it_is_let_be_and_then_waited_for_again(server, desk, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr(redis_channel, "REFUSED_PAUSE_S", 0.0)
    one = waits(desk())
    server.client.config_set("lua-time-limit", 1)

    def loop():
        with contextlib.suppress(redis.RedisError), redis.Redis.from_url(server.url) as client:
            client.eval("while true do end", 0)

    busy = threading.Thread(target=loop)
    busy.start()

    def is_refused():
        with contextlib.suppress(redis.ResponseError):  # BRPOP's
            one.channel._brpop_start()
            one.turn()
        return "does not say when a list changes" in caplog.text

    try:
        wait_for(is_refused, "Redis to refuse")
    finally:
        server.client.script_kill()
        busy.join()
        server.client.config_set("lua-time-limit", 5000)
    waits(one)


def test_only_protocol_3_can_say_it():
    assert not Watch().may(SimpleNamespace(protocol=2))
    assert not Watch().may(SimpleNamespace(protocol="2"))
    assert Watch().may(SimpleNamespace(protocol=3))


def test_while_the_script_is_refused_nothing_is_said(server, desk):  # noqa: F811
    """What Redis says of a list would be taken for BRPOP's answer, and the loop would wait for that."""
    one = waits(desk("q", "r"))
    one.channel._refused_until, one.channel.brpop_timeout = time.monotonic() + NEVER_S, 0.05
    publish(server.url, [0])
    wait_for(one.turn, "the message")
    wait_for(lambda: not one.turn() and one.channel._in_poll, "BRPOP")
    assert not any("t" in each["flags"] for each in server.client.client_list())


def test_a_key_that_is_no_list_is_the_error_it_is_with_kombu(server, desk):  # noqa: F811
    for grouped in (False, True):
        one = desk(grouped=grouped)
        server.client.set("q", "text")
        with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
            one.drain()
        server.client.delete("q")


# ---- who gets it


@pytest.fixture
def occupy(monkeypatch):
    """``occupy(consumer)`` makes it busy; ``occupy.is_over()`` ends the time in which it gives way."""
    monkeypatch.setattr(redis_channel, "GIVE_WAY_S", NEVER_S)
    timers = []

    def occupy_one(one):
        cycle = one.connection.transport.cycle
        cycle.is_busy = lambda: True
        cycle.timer = SimpleNamespace(call_after=lambda seconds, call: timers.append((one, call)))

    def is_over():
        for one, call in timers:
            one.channel._way_until = 0.0
            call()

    occupy_one.is_over = is_over
    return occupy_one


def test_who_is_busy_lets_others_have_it(server, desk, occupy):  # noqa: F811
    one, other = waits(desk()), waits(desk())
    occupy(one)
    publish(server.url, [0])
    assert not one.turn() and not one.turn()
    wait_for(other.turn, "the idle one to take it")
    occupy.is_over()
    assert (one.drain(), other.bodies) == ([], [0])


def test_what_nobody_wants_is_taken_all_the_same(server, desk, occupy):  # noqa: F811
    one = waits(desk())
    occupy(one)
    publish(server.url, [0])
    assert not one.turn() and not one.turn()
    occupy.is_over()
    wait_for(one.turn, "the message")


def test_who_is_not_busy_any_more_gives_no_way(server, desk, occupy):  # noqa: F811
    one = waits(desk())
    occupy(one)
    publish(server.url, [0])
    assert not one.turn()
    one.connection.transport.cycle.is_busy = lambda: False
    wait_for(one.turn, "the message")


def test_who_came_too_late_again_and_again_asks_less_often(server, desk, occupy, monkeypatch):  # noqa: F811
    monkeypatch.setattr(redis_channel, "MOST_VAIN", 2)
    monkeypatch.setattr(redis_channel, "VAIN_PAUSE_S", NEVER_S)
    one, other = waits(desk()), waits(desk())
    occupy(one)
    one.connection.transport.cycle.is_busy = lambda: False
    one.channel._vain = 0

    def asks(number):
        asked_at = one.channel._answered_at
        publish(server.url, [number])
        wait_for(lambda: b"invalidate" in said(one), "Redis to say that a list has changed")
        wait_for(other.turn, "the other one to take it")
        one.turn()
        return one.channel._answered_at > asked_at

    assert [asks(number) for number in range(3)] == [True, True, False]
    publish(server.url, [3])
    occupy.is_over()
    wait_for(lambda: one.turn() or one.received, "what is left")
    publish(server.url, [4])
    wait_for(one.turn, "the next, at once, for this time it was not too late")
