"""What a message must be before Celery looks at it; bounds of what small texts become; what log lines may hold."""

import base64
import bz2
import decimal
import gzip
import json
import logging
import lzma
import zlib
from types import SimpleNamespace

import pytest
from celery.exceptions import InvalidTaskError
from celery.worker.consumer import consumer as celery_consumer
from hypothesis import given
from hypothesis import strategies as st
from kombu import compression
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.transport import redis as kombu_redis
from kombu.utils import json as kombu_json

from bridge.errors import MessageInvalid, PayloadTooLarge
from bridge.worker import intake

LIMIT = 1000
SECRET = "SECRET"


def message(headers=None, body=b"[]", properties=None):
    return SimpleNamespace(headers=headers, body=body, properties=properties or {}, acknowledged=False)


def refused(headers, **changes):
    return intake.refusal(message({"task": "shop.add", "id": "1", **headers}, **changes), LIMIT)


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"timelimit": [None, None]}, {"timelimit": ["30", 20.5]}, {"timelimit": []}, {"stamped_headers": ["a"]},
        {"eta": "soon"}, {"retries": "1"}, {"meta": {"a": [1, {"b": None}]}}, {"argsrepr": "x" * 10_000},
    ],
)  # fmt: skip
def test_what_celery_may_have(headers):
    assert refused(headers) is None
    assert intake.refusal(message({}), LIMIT) is None, "protocol 1 has its name in the body"


@pytest.mark.parametrize(
    "headers",
    [
        {"task": ["shop.add"]}, {"task": 5}, {"task": None}, {"id": None}, {"id": 5}, {"id": "x" * 2000},
        {"timelimit": 5}, {"timelimit": [1, 2, 3]}, {"timelimit": ["soon", None]}, {"timelimit": [10**400, None]},
        {"timelimit": [float("nan"), None]}, {"stamped_headers": 5}, {"stamped_headers": [[]]}, {"shadow": [SECRET]},
        {"large": SECRET * 400_000}, {"many": list(range(200_000))}, {"deep": json.loads("[" * 60 + "]" * 60)},
    ],
)  # fmt: skip
def test_odd_headers(headers):
    error = refused(headers)
    assert isinstance(error, MessageInvalid)
    assert SECRET not in str(error) and len(str(error)) < 300


def test_a_message_of_odd_parts():
    for odd in (None, 5, [], "text"):
        assert isinstance(intake.refusal(message(odd), LIMIT), MessageInvalid)
    assert isinstance(refused({}, body=5), MessageInvalid)
    assert isinstance(refused({}, properties=[1]), MessageInvalid)


def test_the_size_of_a_body():
    assert refused({}, body=b"x" * LIMIT) is None
    error = refused({}, body=b"x" * (LIMIT + 1))
    assert isinstance(error, PayloadTooLarge)
    assert "shop.add" in str(error) and "BRIDGE_MAX_BODY_BYTES" in str(error) and str(LIMIT) in str(error)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_any_header_is_judged(value):
    for name in ("task", "id", "timelimit", "stamped_headers", "other"):
        error = refused({name: value})
        assert error is None or isinstance(error, MessageInvalid)


@pytest.fixture
def bounded(monkeypatch):
    """kombu's registries with our bounds, for one test."""
    monkeypatch.setattr(compression, "_decoders", dict(compression._decoders))
    monkeypatch.setattr(kombu_json, "_decoders", dict(kombu_json._decoders))
    monkeypatch.setattr(kombu_json, "_encoders", dict(kombu_json._encoders))
    intake.bound_decoding(LIMIT)


COMPRESS = {"gzip": zlib.compress, "bzip2": bz2.compress, "lzma": lzma.compress}


@pytest.mark.parametrize("name", COMPRESS)
def test_decompression_ends_at_the_limit(bounded, name):
    compress = COMPRESS[name]
    assert compression.decompress(compress(b"x" * LIMIT), name) == b"x" * LIMIT
    assert compression.decompress(compress(b""), name) == b""
    for size in (LIMIT + 1, 10_000_000):
        with pytest.raises(intake.TooMuch):
            compression.decompress(compress(b"x" * size), name)
    with pytest.raises(EOFError):
        compression.decompress(compress(b"x" * 100)[:-3], name)
    with pytest.raises((zlib.error, OSError, lzma.LZMAError)):
        compression.decompress(b"nonsense", name)


@pytest.mark.parametrize("name", ["bzip2", "lzma"])
def test_several_streams_count_together(bounded, name):
    stream = COMPRESS[name](b"x" * 400)
    assert compression.decompress(stream * 2, name) == b"x" * 800
    with pytest.raises(intake.TooMuch):
        compression.decompress(stream * 3, name)


def test_what_kombu_compresses_is_read(bounded):
    for name in COMPRESS:
        body, content_type = compression.compress("text", name)
        assert compression.decompress(body, content_type) == b"text"
    with pytest.raises(zlib.error):
        compression.decompress(gzip.compress(b"kombu calls zlib gzip, and never reads gzip's format"), "gzip")


def test_a_short_text_that_means_a_long_number(bounded):
    for number in (decimal.Decimal("1.10"), decimal.Decimal("1e400"), decimal.Decimal("NaN")):
        assert str(kombu_json.loads(kombu_json.dumps(number))) == str(number)
    for text in ("1e999999999", "1e-999999999"):
        with pytest.raises(InvalidTaskError):
            kombu_json.loads(json.dumps({"__type__": "decimal", "__value__": text}))


@pytest.fixture
def said(caplog):
    """``said(logger, text, *args)``: the log line that comes of it."""
    intake.shorten_logs()
    intake.shorten_logs()

    def log(logger, text, *args):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            try:
                raise ValueError(SECRET)
            except ValueError:
                logger.error(text, *args, exc_info=True)
        return caplog.text

    yield log
    for logger in (celery_consumer.logger, kombu_redis.logger):
        assert sum(isinstance(each, intake._Shorten) for each in logger.filters) == 1


HEADERS = {"task": "shop.add", "id": "the-id", "token": SECRET}
QUOTING = UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, "invalid start byte")


@pytest.mark.parametrize(
    ("text", "args", "shown"),
    [
        (celery_consumer.UNKNOWN_FORMAT, (SECRET,), "6 characters"),
        (celery_consumer.UNKNOWN_TASK_ERROR, (KeyError("shop.ad"), SECRET, HEADERS, {"routing_key": "gpu"}),
         ["shop.ad", "the-id", "gpu"]),
        (celery_consumer.INVALID_TASK_ERROR, (ContentDisallowed("type pickle"), SECRET), "type pickle"),
        (celery_consumer.INVALID_TASK_ERROR, (DecodeError(QUOTING), SECRET), "invalid start byte"),
        (celery_consumer.INVALID_TASK_ERROR, (DecodeError(ValueError("Unsupported", SECRET)), SECRET), "ValueError"),
        (celery_consumer.MESSAGE_DECODE_ERROR, (QUOTING, "application/json", "utf-8", SECRET, SECRET),
         ["application/json", "invalid start byte"]),
    ],
)  # fmt: skip
def test_celerys_lines_about_messages_hold_nothing_of_them(said, text, args, shown):
    line = said(celery_consumer.logger, text, *args)
    assert SECRET not in line
    assert all(each in line for each in ([shown] if isinstance(shown, str) else shown))


def test_kombus_line_about_a_message_that_cannot_go_back(said):
    line = said(kombu_redis.logger, "Could not restore message: %r", {"body": SECRET, "id": "5"})
    assert SECRET not in line and "Could not restore" in line


def test_other_lines_are_left_alone(said):
    assert "anything 5" in said(celery_consumer.logger, "anything %s", 5)


class Consumer:
    connection_errors = (OSError, KeyError)

    class connection:
        channel_errors = (LookupError,)

    event_dispatcher = None

    def __init__(self, held=False):
        self.held = held
        self.stored = {}
        backend = SimpleNamespace(mark_as_failure=lambda task_id, error, request: self.stored.update({task_id: error}))
        self.app = SimpleNamespace(tasks={}, backend=backend)

    def holds(self, message):
        return self.held


class Delivered:
    body = b""
    acknowledged = False
    rejects = 0

    def __init__(self, headers):
        self.headers, self.properties = headers, {}

    def reject_log_error(self, logger, errors):
        self.rejects += 1


def handle(error, consumer, headers=None):
    def raises(message):
        raise error

    delivered = Delivered(headers=headers or {"task": "shop.add", "id": "own"})
    intake.guarded(consumer, raises, LIMIT)(delivered)
    return delivered


def test_what_celery_raises_about_a_message_costs_that_message(caplog):
    for error in (TypeError(SECRET), RecursionError(), MemoryError(), ValueError(SECRET)):
        consumer = Consumer()
        assert handle(error, consumer).rejects == 1
        assert type(error).__name__ in str(consumer.stored["own"])
    assert SECRET not in caplog.text and SECRET not in str(consumer.stored)


def test_a_lost_connection_is_the_workers_matter():
    for error in (ConnectionResetError(), IndexError()):
        with pytest.raises(type(error)):
            handle(error, Consumer())


def test_a_key_error_is_none():
    """kombu 5.7 calls it one: the message would break the connection, come back, and break it again."""
    consumer = Consumer()
    consumer.connection = SimpleNamespace(channel_errors=())
    assert handle(KeyError("id"), consumer, headers={"no": "task"}).rejects == 1
    assert consumer.stored == {}, "nobody knows which task"


def test_an_error_of_a_task_that_is_held_is_raised():
    with pytest.raises(ZeroDivisionError):
        handle(ZeroDivisionError(), Consumer(held=True))


def test_what_celery_has_refused_is_done_with_though_it_could_not_be_stored():
    consumer = Consumer()

    def refuses(message):
        message.acknowledged = True
        raise ZeroDivisionError

    intake.guarded(consumer, refuses, LIMIT)(Delivered({"task": "shop.add", "id": "own"}))
    assert consumer.stored == {}


def test_a_backend_that_is_away_does_not_keep_the_message():
    consumer = Consumer()
    consumer.app.backend.mark_as_failure = lambda *_, **__: 1 / 0
    assert handle(TypeError(), consumer).rejects == 1


@pytest.mark.parametrize(
    ("headers", "task", "stored"),
    [
        ({}, None, True),
        ({"ignore_result": True}, None, False),
        ({}, SimpleNamespace(ignore_result=True), False),
        ({"ignore_result": False}, SimpleNamespace(ignore_result=True), True),
        ({}, SimpleNamespace(ignore_result=True, store_errors_even_if_ignored=True), True),
    ],
)
def test_results_nobody_wants_are_not_stored(headers, task, stored):
    consumer = Consumer()
    consumer.app.tasks = {"shop.add": task} if task else {}
    handle(TypeError(), consumer, headers={"task": "shop.add", "id": "own", **headers})
    assert bool(consumer.stored) is stored


def raw(body, **more):
    return json.dumps({"body": body, "headers": {"task": "shop.add", "id": "own"}, "properties": {}, **more}).encode()


def test_a_large_message_loses_its_body_before_it_is_parsed():
    assert intake.without_large_body(raw("x" * LIMIT), LIMIT) == raw("x" * LIMIT)
    stub = json.loads(intake.without_large_body(raw("x" * 5_000_000), LIMIT))
    assert stub == {intake.CUT: True, **json.loads(raw(""))}
    cut = SimpleNamespace(**vars(message(stub["headers"], b"")), _raw=stub)
    assert isinstance(intake.refusal(cut, LIMIT), PayloadTooLarge)
    spaced = b'{ "headers": {}, "body" :\n"' + b"x" * 5_000_000 + b'"}'
    assert json.loads(intake.without_large_body(spaced, LIMIT))["body"] == ""


@pytest.mark.parametrize("large", [b"x" * 5_000_000, raw("", more="x" * 5_000_000), b'{"body": "' + b"x" * 5_000_000])
def test_what_is_large_and_has_no_large_body_is_no_message(large):
    with pytest.raises(json.JSONDecodeError):
        json.loads(intake.without_large_body(large, LIMIT))


# ---- large bodies of messages in Redis


class Channel:
    """The part of kombu's that reads bodies."""

    def decode_body(self, body, encoding=None):
        return base64.b64decode(body) if encoding else body


class Bounded(intake.BoundedChannel, Channel):
    pass


def as_it_lies(body, **more):
    return json.dumps(
        {"body": body, "headers": {"task": "shop.add"}, "properties": {"body_encoding": "base64"}, **more}
    )


def arrives(raw, encoding="base64"):
    """What kombu makes of a message's body."""
    channel = Bounded()
    short = channel.without_body(raw)
    read = json.loads(short)
    assert len(short) < 1000 or short == raw
    return channel.decode_body(read["body"], encoding), read


@pytest.mark.parametrize("size", [0, 10, intake.LARGE_BODY, 1_000_000])
def test_a_large_body_is_read_apart_from_its_message(size):
    data = bytes(n % 251 for n in range(size))
    body, read = arrives(as_it_lies(base64.b64encode(data).decode()).encode())
    assert body == data and read["headers"] == {"task": "shop.add"}


@given(st.binary(max_size=200), st.sampled_from([b"", b"\n"]))
def test_base64_is_read_as_python_reads_it(data, line_break):
    text = base64.b64encode(data)
    text = (text[:8] + line_break + text[8:]).decode()
    assert Bounded().decode_body(text, "base64") == data


def test_base64_with_line_breaks_and_bodies_that_are_none():
    data = bytes(range(256)) * 1000
    with_breaks = base64.encodebytes(data).decode()
    assert arrives(as_it_lies(with_breaks).encode())[0] == data
    text = "[[1], {}, {}] " * 10_000
    assert arrives(as_it_lies(text).encode(), None)[0] == text
    quoted = '[["ü"], {}, {}] ' * 10_000
    assert arrives(as_it_lies(quoted).encode(), None)[0] == quoted
    with pytest.raises(ValueError, match=r"[Pp]adding|base64"):
        arrives(as_it_lies("A" * 100_001).encode())


def test_a_body_elsewhere_in_the_message_is_left_where_it_is():
    text = base64.b64encode(b"x" * 100_000).decode()
    raw = json.dumps({"headers": {"body": "mine"}, "body": text}).encode()
    assert intake.take_body(raw) == (raw, b"")
    twice = as_it_lies(text)[:-1] + ', "body": "QUJD"}'
    assert arrives(twice.encode())[0] == b"ABC"  # the last one counts, for Python's json too


def test_nobody_gets_the_body_of_another_message():
    mark = as_it_lies("bridge-body-taken-out")
    with pytest.raises(ValueError):
        arrives(mark.encode())
    channel = Bounded()
    channel.without_body(as_it_lies(base64.b64encode(b"x" * 100_000).decode()).encode())
    channel.forget_body()
    with pytest.raises(ValueError):
        channel.decode_body("bridge-body-taken-out", "base64")


def test_what_kombu_notes_has_its_body_again():
    text = base64.b64encode(b"x" * 100_000).decode()
    channel = Bounded()
    read = SimpleNamespace(_raw=json.loads(channel.without_body(as_it_lies(text).encode())))
    channel.complete(read)
    assert read._raw == json.loads(as_it_lies(text))


def test_a_message_that_is_let_in_is_closed_before_celery_has_it():
    seen = []
    consumer = SimpleNamespace(connection_errors=(), connection=SimpleNamespace(channel_errors=()))
    handle = intake.guarded(consumer, lambda _: seen.append("handled"), LIMIT, lambda _: seen.append("closed"))
    handle(message({"task": "shop.add", "id": "1"}))
    assert seen == ["closed", "handled"]
