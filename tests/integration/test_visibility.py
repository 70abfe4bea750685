"""What renewing asks of a real Redis: own messages only, never one that is acknowledged, never another worker's."""

import logging
import time
from types import SimpleNamespace

import pytest
from kombu.transport import redis as stock

from bridge.worker.redis_clock import RedisClock
from bridge.worker.visibility import cautions
from tests.integration.test_redis_channel import calls, desk, noted, publish, server  # noqa: F401 - fixtures

OLD = 1000.0
DAY_S = 86400.0


@pytest.fixture
def age(server):  # noqa: F811
    """``age()`` lets all messages look as if they had been noted long ago."""

    def make_old(prefix="", by=OLD):
        key = f"{prefix}unacked_index"
        for tag, score in server.client.zrange(key, 0, -1, withscores=True):
            server.client.zadd(key, {tag: score - by})

    return make_old


def scores(client, prefix=""):
    return {tag.decode(): score for tag, score in client.zrange(f"{prefix}unacked_index", 0, -1, withscores=True)}


def tags(messages):
    return {message.delivery_tag for message in messages}


@pytest.mark.parametrize("prefix", ["", "shop:"])
def test_all_that_is_held_is_noted_anew_in_one_question(server, desk, age, prefix):  # noqa: F811
    publish(server.url, range(20), global_keyprefix=prefix)
    one = desk(global_keyprefix=prefix)
    one.drain()
    one.channel.qos.renew()  # Redis knows the script from now on
    age(prefix)
    calls(server.client)
    one.channel.qos.renew()
    asked = calls(server.client)
    assert asked["evalsha"] == 1 and asked["zadd"] == 20
    assert tags(one.received) == scores(server.client, prefix).keys()
    assert min(scores(server.client, prefix).values()) > time.time() - OLD / 2


def test_what_is_acknowledged_is_not_brought_back(server, desk, age):  # noqa: F811
    publish(server.url, range(4))
    one = desk()
    one.drain()
    one.received[0].ack(), one.received[1].reject()
    assert one.channel.qos._noted.keys() == tags(one.received[2:]), "nothing is kept until the next renewal"
    server.client.delete("unacked_index")  # as if all acknowledgements were with Redis, and more
    one.channel.qos.renew()
    assert scores(server.client) == {}


def test_what_another_worker_has_is_let_go_and_stays_its_own(server, desk, age):  # noqa: F811
    publish(server.url, range(3))
    one = desk(visibility_timeout=60)
    one.drain()
    lost = []
    one.connection.transport.cycle.on_lost = lost.extend
    age()
    other = desk(visibility_timeout=60)
    other.channel.qos.restore_visible(interval=1)
    assert sorted(other.drain()) == [0, 1, 2]
    before = scores(server.client)
    assert tags(one.received) == before.keys(), "a message keeps its tag, whoever has it"
    one.channel.qos.renew()
    assert set(lost) == before.keys()
    assert scores(server.client) == before
    one.connection.close()
    assert noted(server.client).keys() == before.keys() and server.client.llen("q") == 0, "it gave nothing back"


def test_a_worker_that_slept_renews_before_it_looks_for_dead_ones(server, desk, age, monkeypatch):  # noqa: F811
    publish(server.url, range(3))
    one = desk(visibility_timeout=60)
    one.drain()
    age()
    one.channel.qos._renewed_at -= 100
    one.channel.qos.restore_visible(interval=1)
    assert len(noted(server.client)) == 3 and server.client.llen("q") == 0


def test_the_end_gives_back_only_what_is_still_its_own(server, desk, age):  # noqa: F811
    publish(server.url, range(2))
    one = desk(visibility_timeout=60)
    one.drain()
    others = one.received[1]
    server.client.zadd("unacked_index", {others.delivery_tag: time.time() + 50}, xx=True)
    one.channel.qos._renewed_at -= 100
    one.connection.close()
    assert noted(server.client).keys() == {others.delivery_tag}
    assert server.client.llen("q") == 1


def test_a_redis_without_scripts_is_asked_without(server, desk, age, caplog):  # noqa: F811
    publish(server.url, range(3))
    one = desk()
    one.drain()
    age()
    server.client.execute_command("ACL", "SETUSER", "default", "-evalsha")
    try:
        one.channel.qos.renew()
    finally:
        server.client.execute_command("ACL", "SETUSER", "default", "+evalsha")
    assert min(scores(server.client).values()) > time.time() - OLD / 2


def test_a_full_redis_is_said_and_asked_again(server, desk, age, caplog):  # noqa: F811
    publish(server.url, range(3))
    one = desk()
    one.drain()
    age()
    server.client.config_set("maxmemory", 1)
    try:
        with caplog.at_level(logging.WARNING):
            assert one.connection.transport.cycle._tick()
        assert "could not be renewed" in caplog.text
    finally:
        server.client.config_set("maxmemory", 0)
    one.connection.transport.cycle._tick()
    assert min(scores(server.client).values()) > time.time() - OLD / 2


def test_many_more_than_one_script_looks_at(server, desk, age, monkeypatch):  # noqa: F811
    monkeypatch.setattr("bridge.worker.visibility.MOST_TAGS", 7)
    publish(server.url, range(20))
    one = desk()
    one.drain()
    one.channel.qos.renew()
    age()
    calls(server.client)
    one.channel.qos.renew()
    assert calls(server.client)["evalsha"] == 3
    assert min(scores(server.client).values()) > time.time() - OLD / 2


# ---- clocks


@pytest.fixture
def own_clocks(desk):  # noqa: F811
    """``own_clocks(n)`` opens consumers as in n processes; the time-out is a minute."""

    def open_desks(count):
        found = [desk(visibility_timeout=60) for _ in range(count)]
        for each in found:
            each.channel.qos.clock = RedisClock()
            each.channel.qos.renew()
        return found

    return open_desks


def redis_jumps(desks, by_s, age):
    """All that is noted, and all that was known of Redis' clock, is so much older now."""
    age(by=by_s)
    for each in desks:
        qos = each.channel.qos
        qos._noted = {tag: noted_at - by_s for tag, noted_at in qos._noted.items()}
        qos.clock._said -= by_s


@pytest.mark.parametrize("has_scripts", [True, False])
@pytest.mark.parametrize("off_s", [DAY_S, -DAY_S])
def test_a_hosts_clock_means_nothing(server, own_clocks, monkeypatch, has_scripts, off_s):  # noqa: F811
    one, other = own_clocks(2)
    publish(server.url, range(6))
    if not has_scripts:
        one.channel._refused_until = time.monotonic() + 1000
    real = time.time
    for module in (time, stock):
        monkeypatch.setattr(module, "time", lambda: real() + off_s)
    assert sorted(one.drain()) == list(range(6))
    for ask in (lambda: None, one.channel.qos.renew):
        ask()
        assert all(abs(score - real()) < 30 for score in scores(server.client).values())
        other.channel.qos.restore_visible(interval=1)
        assert len(noted(server.client)) == 6


def test_what_was_noted_by_a_clock_that_was_ahead_counts_from_now(server, own_clocks, age):  # noqa: F811
    dead, other = own_clocks(2)
    publish(server.url, range(3))
    assert len(dead.drain()) == 3
    age(by=-DAY_S)
    other.channel.qos.restore_visible(interval=1)
    assert len(noted(server.client)) == 3 and max(scores(server.client).values()) < time.time() + 30
    dead.channel.qos.renew()
    assert len(scores(server.client)) == 3, "and it is its own if it lives"
    age(by=61)
    other.channel.qos.restore_visible(interval=1)
    assert server.client.llen("q") == 3


@pytest.mark.parametrize("by_s", [DAY_S, -DAY_S])
def test_while_redis_clock_has_jumped_nothing_is_given_back(server, own_clocks, age, caplog, by_s):  # noqa: F811
    one, dead, other = desks = own_clocks(3)
    publish(server.url, range(3))
    one.drain()
    publish(server.url, range(3, 5))
    dead.drain()
    redis_jumps(desks, by_s, age)
    with caplog.at_level(logging.WARNING):
        other.channel.qos.restore_visible(interval=1)
    assert caplog.text.count("Redis' clock has jumped by") == 1
    one.channel.qos.renew()
    other.channel.qos.restore_visible(interval=1)
    assert len(noted(server.client)) == 5 and server.client.llen("q") == 0
    age(by=61)
    one.channel.qos._noted = {tag: noted_at - 61 for tag, noted_at in one.channel.qos._noted.items()}
    one.channel.qos.renew()
    other.channel.qos.clock._steady_at = 0.0  # a time-out later
    other.channel.qos.restore_visible(interval=1)
    assert noted(server.client).keys() == tags(one.received) and server.client.llen("q") == 2


def test_a_small_step_of_redis_clock_is_no_jump(server, own_clocks, age):  # noqa: F811
    dead, other = own_clocks(2)
    publish(server.url, range(2))
    dead.drain()
    age(by=61)
    other.channel.qos.clock._said -= 19
    other.channel.qos.restore_visible(interval=1)
    assert server.client.llen("q") == 2


def test_a_redis_that_does_not_tell_its_time(server, desk, age, caplog):  # noqa: F811
    publish(server.url, range(3))
    server.client.execute_command("ACL", "SETUSER", "timeless", "on", "nopass", "~*", "&*", "+@all", "-time")
    try:
        one = desk(url=server.url.replace("redis://", "redis://timeless:x@"), visibility_timeout=60)
        assert sorted(one.drain()) == [0, 1, 2]
        age()
        for _ in range(2):
            one.channel.qos.renew()
        assert min(scores(server.client).values()) > time.time() - OLD / 2
        assert caplog.text.count("Redis does not tell its time (NoPermissionError") == 1
        one.connection.close()
    finally:
        server.client.acl_deluser("timeless")


# ---- what is said


@pytest.mark.parametrize(
    ("driver_type", "timeout_s", "soft_s", "limits_s", "words"),
    [
        ("redis", 3600, 0, [], []),
        ("redis", 30, 19, [7200], []),
        ("redis", 1, 0, [], ["visibility_timeout is 1 s"]),
        ("redis", 30, 25, [], ["worker_soft_shutdown_timeout is 25 s"]),
        ("amqp", float("inf"), 600, [1800], []),
        ("amqp", float("inf"), 0, [60, 3600], ["consumer_timeout"]),
    ],
)
def test_what_is_said_at_start(driver_type, timeout_s, soft_s, limits_s, words):
    app = SimpleNamespace(conf=SimpleNamespace(worker_soft_shutdown_timeout=soft_s))
    found = cautions(app, driver_type, timeout_s, limits_s)
    assert len(found) == len(words) and all(word in text for word, text in zip(words, found, strict=True))
