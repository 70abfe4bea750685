"""Crash counts and dead letters on a real Redis: bounds, expiry, replay, and a Redis that is away."""

import json
import pickle
import signal
import threading
import time
import uuid
from datetime import UTC, datetime, timedelta
from queue import Queue

import pytest
import redis
from celery import Celery
from kombu.serialization import disable_insecure_serializers, enable_insecure_serializers

from actors.contract import LogLine
from actors.data.shared_redis import shared_redis
from bridge.dead.replay import NotReplayed, payload_of, replay
from bridge.driver.dead_letters import LOG_BYTES, Bounds, Crash, DeadLetters, last_words, letter_of
from bridge.driver.ledger import Ledger
from bridge.link import Run
from bridge.settings import settings
from tests.support.services import RedisServer, wait_for

BOUNDS = Bounds(letters=3, letters_bytes=100_000, letters_s=1000, crashes_s=500)
CRASH = Crash(1.0, "signal 9 (SIGKILL)", "w@here", 0, "node")


@pytest.fixture
def namespace():
    return f"n-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def store(redis_server, namespace):
    def make(**bounds):
        return DeadLetters(redis_server.client, "", namespace, BOUNDS._replace(**bounds))

    return make


def run_of(task_id, body=b'[[1], {"a": 2}, {}]', content_type="application/json", **request):
    request = {"id": task_id, "task": "t.t", "delivery_info": {"exchange": "", "routing_key": "q"}, **request}
    return Run(1, "t.t", task_id, request, body, content_type, "utf-8" if content_type else None, None, None, 0)


def letter(task_id, size=10, at=None, **request):
    made = letter_of(run_of(task_id, b"[" + b" " * (size - 2) + b"]", **request), "why", [CRASH], "last words", "json")
    return made._replace(at=at or made.at)


# ---- crashes


def test_a_crash_told_twice_counts_once_and_those_of_all_drivers_are_told(store, redis_server, namespace):
    first, second = store(), store()
    assert first.add_crashes("a", {"d1.1.0": CRASH}) == {"d1.1.0": CRASH}
    assert first.add_crashes("a", {"d1.1.0": CRASH}) == {"d1.1.0": CRASH}
    later = CRASH._replace(at=2.0)
    assert second.add_crashes("a", {"d2.7.0": later}) == {"d1.1.0": CRASH, "d2.7.0": later}
    assert store().crashes(["a", "b"]) == [{"d1.1.0": CRASH, "d2.7.0": later}, {}]
    assert 400 < redis_server.client.ttl(f"{namespace}-crashes-a") <= 500
    store().forget_crashes("a")
    assert store().crashes(["a"]) == [{}]


# ---- letters


def test_the_oldest_go_beyond_the_number(store):
    letters = store()
    for n in range(5):
        letters.keep(letter(str(n), at=float(n + 1)))
    assert letters.ids() == ["2", "3", "4"] and letters.get("0") is None
    letters.keep(letter("3", at=9.0))
    assert letters.ids() == ["2", "4", "3"], "the same task once more is its newest"
    assert [each.id for each in letters.letters()] == ["2", "4", "3"]


def test_the_oldest_go_beyond_the_bytes_and_what_is_too_large_alone_leaves_no_body(store):
    letters = store(letters_bytes=10_000)
    for n in range(3):
        letters.keep(letter(str(n), size=3000, at=float(n + 1)))
    assert letters.ids() == ["1", "2"]
    letters.keep(letter("large", size=20_000))
    kept = letters.get("large")
    assert (kept.body, kept.size_bytes, kept.has_body) == ("", 20_000, False) and "20000 bytes" in kept.not_kept
    store(letters=0).keep(letter("none"))
    assert letters.get("none") is None


def test_letters_expire_by_themselves(store, redis_server, namespace):
    letters = store()
    letters.keep(letter("a"))
    letters.keep(letter("b"))
    ttls = [redis_server.client.ttl(f"{namespace}-dead-letter{end}") for end in ("-a", "-b", "s")]
    assert all(900 < ttl <= 1000 for ttl in ttls)
    redis_server.client.pexpire(f"{namespace}-dead-letter-a", 1)
    wait_for(lambda: letters.get("a") is None, "Redis to let it expire")
    assert letters.ids() == ["b"]
    assert redis_server.client.zrange(f"{namespace}-dead-letters", 0, -1) == [b"b"], "nor does its id stay"


def test_a_letter_is_the_message_without_what_the_worker_added(store):
    headers = {"root_id": "r", "argsrepr": "(1,)", "retries": 1, "own": {"when": datetime(2030, 1, 1, tzinfo=UTC)}}
    added = {"hostname": "w", "reply_to": "x", "correlation_id": "y", "redelivered": True}
    properties = {
        "correlation_id": "a",
        "priority": 4,
        "delivery_tag": "t",
        "delivery_info": {},
        "body_encoding": "base64",
    }
    store().keep(letter("a", **headers, **added, properties=properties))
    kept = store().get("a")
    assert kept.headers == {"id": "a", "task": "t.t", **headers}
    assert kept.properties == {"correlation_id": "a", "priority": 4}
    assert kept.crashes == [CRASH]


def test_a_body_of_the_first_protocol_comes_decoded_and_is_written_anew():
    made = letter_of(run_of("a", ((1,), {"a": 2}, {"chain": None}), content_type=None), "why", [], "", "json")
    assert made.content_type == "application/json"
    assert json.loads(payload_of(made)["body"]) == [[1], {"a": 2}, {"chain": None}]
    odd = letter_of(run_of("a", ((object(),), {}, {}), content_type=None), "why", [], "", "json")
    assert not odd.has_body and "cannot be written as json" in odd.not_kept


def test_nothing_is_unpickled_to_show_it():
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    body = pickle.dumps(Trap())
    made = letter_of(
        run_of("a", body, "application/x-python-serialize")._replace(content_encoding="binary"), "", [], "", ""
    )
    assert "body_base64" in payload_of(made)


def test_last_words_are_the_end_of_what_was_logged():
    told = [pickle.dumps([LogLine(20, "l", f"line {n} " + "x" * 1000, False) for n in range(first, first + 5)])
            for first in (0, 5)]  # fmt: skip
    words = last_words([*told, pickle.dumps([("a wish",)])])
    assert len(words) == LOG_BYTES and "line 9" in words and "line 0" not in words


# ---- replay


@pytest.fixture
def app(redis_server):
    redis_server.client.flushdb()  # other modules of this session have used the same names for queues
    app = Celery("replays", broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    yield app
    app.close()


def received(app, queue, count=1):
    """Messages of a queue as a worker receives them."""
    got = []
    with app.connection_for_read() as connection:
        from kombu import Consumer
        from kombu import Queue as KombuQueue

        accept = ["json", "application/x-python-serialize"]
        with Consumer(connection, [KombuQueue(queue)], callbacks=[lambda _, m: got.append(m)], accept=accept):
            while len(got) < count:
                connection.drain_events(timeout=10)
        for message in got:
            message.ack()
    return got


@pytest.mark.parametrize("options", [
    {}, {"priority": 7, "headers": {"own": "header"}, "shadow": "alias"}, {"compression": "zlib"},
    {"serializer": "pickle"},
    {"countdown": 1, "expires": 1000, "reply_to": "somebody"},
])  # fmt: skip
def test_what_is_replayed_is_what_was_sent(app, store, options):
    """The message goes through a worker's `Request`, as it does in real life."""
    from celery.worker.request import Request

    enable_insecure_serializers()
    queue = f"q-{uuid.uuid4().hex[:8]}"
    sent = app.send_task("t.t", ["naïve", {"k": [1.5, None]}], {"x": 1}, queue=queue, **options)
    (original,) = received(app, queue)
    request = Request(original, app=app, task=app.Task())
    slim = {key: value for key, value in request.request_dict.items() if key not in ("args", "kwargs")}
    run = Run(1, "t.t", sent.id, slim, request.body, request.content_type, request.content_encoding, None, None, 0)
    letters = store()
    letters.add_crashes(sent.id, {"d.1.0": CRASH})
    letters.keep(letter_of(run, "why", [CRASH], "", "json"))
    replay(app, letters, sent.id)
    (again,) = received(app, queue)
    disable_insecure_serializers(["json"])
    assert again.headers == original.headers and again.body == original.body
    assert (again.content_type, again.content_encoding) == (original.content_type, original.content_encoding)
    own = {"delivery_tag", "delivery_info", "body_encoding"}
    assert {k: v for k, v in again.properties.items() if k not in own} == {
        k: v for k, v in original.properties.items() if k not in own
    }
    assert again.properties["delivery_info"] == original.properties["delivery_info"]
    assert letters.ids() == [] and letters.crashes([sent.id]) == [{}]


def test_a_letter_stays_when_the_broker_does_not_take_it(store, redis_server, tmp_path):
    away = RedisServer(tmp_path)
    away.kill_group()
    app = Celery("away", broker=away.url, backend=redis_server.url, set_as_current=False)
    store().keep(letter("a"))
    with pytest.raises(NotReplayed, match="the broker has not taken it"):
        replay(app, store(), "a")
    assert store().ids() == ["a"] and store().claim("a"), "nor is it kept from the next try"


def test_what_cannot_be_replayed_says_why(app, store):
    letters = store(letters_bytes=1000)
    letters.keep(letter("large", size=5000))
    with pytest.raises(NotReplayed, match="was not kept: its body of 5000 bytes"):
        replay(app, letters, "large")
    past = (datetime.now(UTC) - timedelta(seconds=5)).isoformat()
    store().keep(letter("old", expires=past))
    with pytest.raises(NotReplayed, match="it has expired"):
        replay(app, letters, "old")
    replay(app, letters, "old", ignore_expiry=True)
    assert received(app, "q")[0].headers["expires"] is None
    with pytest.raises(NotReplayed, match="not there any more"):
        replay(app, letters, "old")


def test_two_who_replay_the_same_send_it_once(app, store):
    store().keep(letter("a"))
    assert store().claim("a")
    with pytest.raises(NotReplayed, match="somebody else"):
        replay(app, store(), "a")
    store().release("a")


def test_a_task_that_was_poisoned_again_meanwhile_keeps_its_new_letter(store):
    old, new = letter("a", at=1.0), letter("a", at=2.0)
    store().keep(new)
    assert not store().drop_if_same(old) and store().get("a") == new
    assert store().drop_if_same(new) and store().get("a") is None


# ---- the ledger


@pytest.fixture
def ledger(namespace):
    """``ledger(url)`` and what it was told; ``ask(call)`` waits for one answer."""

    def make(broker, backend=None):
        told = Queue()
        app = Celery("ledger", broker=broker, backend=backend, set_as_current=False)
        return Ledger(app, settings(), namespace, told.put), told

    return make


def answer(told):
    answered = told.get(timeout=30)
    answered.then(answered.value)
    return answered.value


def test_looks_of_one_turn_are_one_question(ledger, redis_server):
    book, told = ledger(redis_server.url, redis_server.url)
    book.add("a", {"d.1.0": CRASH}, lambda _: None)
    assert answer(told) == {"d.1.0": CRASH}
    gate, got = threading.Event(), {}
    book._do(gate.wait)
    redis_server.client.config_resetstat()
    for name in ("a", "b", "c"):
        book.look(name, lambda crashes, name=name: got.update({name: crashes}))
    gate.set()
    for _ in range(3):
        answer(told)
    assert got == {"a": {"d.1.0": CRASH}, "b": {}, "c": {}}
    book.look("a", lambda crashes: got.update(late=crashes))
    answer(told)
    assert got["late"] == {"d.1.0": CRASH}


@pytest.mark.parametrize("how", ["gone", "stuck"])
def test_redis_away_is_an_answer_and_later_it_is_asked_again(ledger, tmp_path, monkeypatch, how):
    monkeypatch.setattr("bridge.driver.ledger.AWAY_PAUSE_S", 0.2)
    server = RedisServer(tmp_path)
    book, told = ledger(server.url, server.url)
    book.add("a", {"d.1.0": CRASH}, lambda _: None)
    assert answer(told) == {"d.1.0": CRASH}
    if how == "gone":
        server.kill_group()
    else:
        server.signal(signal.SIGSTOP)
    both = {"d.1.0": CRASH, "d.1.1": CRASH._replace(at=2.0)}
    book.add("a", both, lambda _: None)
    assert answer(told) is None
    book.look("b", lambda _: None)
    assert answer(told) is None
    if how == "gone":
        server = RedisServer(tmp_path, port=server.port)
    else:
        server.signal(signal.SIGCONT)
    time.sleep(0.2)  # the pause, not luck: nobody is asked before
    book.add("a", both, lambda _: None)
    assert answer(told) == both, "what was counted here meanwhile is told then, once"
    server.client.close()
    server.kill_group()


def test_letters_that_redis_does_not_take_wait_for_it_as_many_as_fit(ledger, tmp_path, namespace, monkeypatch, caplog):
    monkeypatch.setattr("bridge.driver.ledger.AGAIN_S", 0.2)
    server = RedisServer(tmp_path)
    book, told = ledger(server.url, server.url)
    book._bounds = book._bounds._replace(letters=2)
    server.client.close()
    server.kill_group()
    for each in (letter("a"), letter("b", at=1.0), letter("c"), letter("b", at=2.0)):
        book.bury(each, lambda _: None)
        assert answer(told) is None, "the task ends all the same"
    assert "the dead letter of a is lost: too many wait" in caplog.text
    server = RedisServer(tmp_path, port=server.port)
    there = DeadLetters(server.client, "", namespace, Bounds(9, 1 << 20, 60, 60))
    wait_for(lambda: set(there.ids()) == {"b", "c"}, "Redis to have what waited")
    assert there.get("b").at == 2.0, "the later one of a task"
    wait_for(lambda: not book._letters, "nothing to wait any more")
    server.client.close()
    server.kill_group()


def test_a_task_is_blamed_no_more_as_soon_as_redis_can_be_told(ledger, tmp_path, namespace, monkeypatch, caplog):
    """A success while Redis was away: else a later run would begin at the crashes of earlier ones."""
    monkeypatch.setattr("bridge.driver.ledger.AGAIN_S", 0.2)
    monkeypatch.setattr("bridge.driver.ledger.AWAY_PAUSE_S", 0.0)
    server = RedisServer(tmp_path, options=["appendonly yes", "appendfsync always"])
    book, told = ledger(server.url, server.url)
    for name in ("a", "b"):
        book.add(name, {"d.1.0": CRASH}, lambda _: None)
        assert answer(told) == {"d.1.0": CRASH}
    server.client.close()
    server.kill_group()
    book.forget("a"), book.forget("b")
    tried, forget = [], DeadLetters.forget_crashes
    monkeypatch.setattr(DeadLetters, "forget_crashes", lambda *args: (tried.append(args), forget(*args)))
    wait_for(lambda: len(tried) > 2, "it to be tried again")
    assert caplog.text.count("was not told that a is blamed no more") == 1, "and said once"
    server = RedisServer(tmp_path, port=server.port, options=["appendonly yes", "appendfsync always"])
    later = CRASH._replace(at=2.0)
    book.add("b", {"d.2.0": later}, lambda _: None)
    assert answer(told) == {"d.2.0": later}, "a run after that begins at none"
    there = DeadLetters(server.client, "", namespace, Bounds(9, 1 << 20, 60, 60))
    wait_for(lambda: there.crashes(["a"]) == [{}], "the crashes of a to be forgotten")
    assert there.crashes(["b"]) == [{"d.2.0": later}]
    server.client.close()
    server.kill_group()


def test_a_letter_that_redis_never_takes_holds_up_no_other(ledger, redis_server, monkeypatch, caplog):
    """It had waited for Redis, and cannot be written after all."""
    monkeypatch.setattr("bridge.driver.ledger.AGAIN_S", 0.1)
    book, told = ledger(redis_server.url, redis_server.url)
    tried, keep = [], DeadLetters.keep

    def keeps(store, each):
        tried.append(each.id)
        if len(tried) <= 2:
            raise redis.ConnectionError("away")
        if each.id == "odd":
            raise ValueError("not to be written")
        return keep(store, each)

    monkeypatch.setattr(DeadLetters, "keep", keeps)
    for each in (letter("odd"), letter("good")):
        book.bury(each, lambda _: None)
        assert answer(told) is None
    wait_for(lambda: not book._letters, "both to be settled")
    assert "the dead letter of odd is lost: ValueError" in caplog.text
    assert "Redis has taken the dead letter of good now" in caplog.text


def test_the_result_backend_is_preferred_else_the_broker_else_none(redis_server, tmp_path, ledger, namespace):
    def shared(broker, backend, **conf):
        app = Celery("s", broker=broker, backend=backend, set_as_current=False)
        app.conf.update(conf)
        return shared_redis(app)

    other = redis_server.url.removesuffix("/0") + "/3"
    options = {"global_keyprefix": "mine"}
    assert shared(redis_server.url, other).client.connection_pool.connection_kwargs["db"] == 3
    assert shared(redis_server.url, other, result_backend_transport_options=options).prefix == "mine_"
    by_broker = shared(other, "rpc://", broker_transport_options=options)
    assert by_broker.prefix == "mine" and by_broker.client.connection_pool.connection_kwargs["db"] == 3
    assert by_broker.client.ping()
    assert shared("memory://", "cache+memory://") is None
    book, _ = ledger("memory://", "cache+memory://")
    assert not book.is_shared
    book, told = ledger(redis_server.url, "rpc://")
    assert book.is_shared
    book.add("a", {"d.1.0": CRASH}, lambda _: None)
    assert answer(told) == {"d.1.0": CRASH}
    assert redis_server.client.exists(f"{namespace}-crashes-a")


def test_a_password_is_in_no_word_of_it(tmp_path):
    server = RedisServer(tmp_path, password="s3cret")
    app = Celery("s", broker=server.url, backend=server.url, set_as_current=False)
    shared = shared_redis(app)
    assert shared.client.ping() and "s3cret" not in shared.where
    app = Celery("s", broker=server.url.replace("s3cret", "wr0ng"), set_as_current=False)
    with pytest.raises((redis.AuthenticationError, Exception)) as caught:
        shared_redis(app)
    assert "wr0ng" not in str(caught.value)
    server.client.close()
    server.kill_group()
