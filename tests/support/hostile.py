"""Messages that nobody should send, as bytes in a Redis list; each carries a marker that must show up nowhere."""

import base64
import bz2
import json
import lzma
import pickle
import uuid
import zlib

MARKER = "SECRET-payload"
DEEP = 100_000


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def encoded(body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return base64.b64encode(data).decode()


def envelope(queue, headers, body="", **changes):
    """A message as kombu writes it; `changes` replace what stands in it, None takes it out."""
    message = {
        "headers": headers,
        "body": body,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "properties": {
            "body_encoding": "base64", "delivery_tag": str(uuid.uuid4()), "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
        },
    }  # fmt: skip
    message.update(changes)
    return json.dumps({key: value for key, value in message.items() if value is not None}).encode()


def nested(depth, inner="0"):
    return "[" * depth + inner + "]" * depth


def no_messages(queue):
    """What is no message at all, or has odd parts where kombu looks first."""
    good = {"task": "messages.gpu.pid", "id": str(uuid.uuid4())}
    body = encoded([[MARKER], {}, {}])
    whole = json.loads(envelope(queue, good, body))
    properties = whole["properties"]
    yield from (b"", b"null", b"5", b"[]", b"{}", b"nonsense " + MARKER.encode(), b"\xff\xfe\x00", b'"text"')
    yield nested(DEEP).encode()
    yield b'{"headers": ' + nested(DEEP).encode() + b', "properties": {}}'
    yield json.dumps(whole).encode()[:-20]
    for odd in (None, 5, "text", [], {"a": 1}):
        for name in ("headers", "body", "properties", "content-type", "content-encoding"):
            yield json.dumps({**whole, name: odd}).encode()
        for name in ("delivery_tag", "delivery_info", "body_encoding", "priority"):
            yield json.dumps({**whole, "properties": {**properties, name: odd}}).encode()
        for name in ("exchange", "routing_key"):
            info = {**properties["delivery_info"], name: odd}
            yield json.dumps({**whole, "properties": {**properties, "delivery_info": info}}).encode()
    for name in properties:
        yield json.dumps(
            {**whole, "properties": {key: value for key, value in properties.items() if key != name}}
        ).encode()
    yield json.dumps(whole).encode()  # twice the same id and tag
    yield json.dumps(whole).encode()


def odd_headers(queue, name):
    """A header of a kind that nobody expects, one at a time; and names that look like code."""
    body = encoded([[MARKER], {}, {}])
    for header in (
        "task", "id", "eta", "expires", "timelimit", "group", "group_index", "retries", "lang", "shadow", "root_id",
        "parent_id", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers",
        "stamps", "compression", "delivery_info", "headers", "meth", "chord",
    ):  # fmt: skip
        is_told = header in ("task", "id", "eta", "expires", "shadow")  # in logs, where it means nothing
        marker = "odd" if is_told else MARKER
        for odd in ([marker], {marker: 1}, 10**400, -1, 1e308, True, "", marker, [[None, {}], 5], "9" * 400):
            yield envelope(queue, {"task": name, "id": str(uuid.uuid4()), header: odd}, body)
    for code in ("os.system", "__import__", "builtins.eval", f"{name}.__globals__", "celery.map", "celery.chord_unlock",
                 "../../etc/passwd", "messages.gpu.\x00", "\ud800", "x" * 100_000):  # fmt: skip
        yield envelope(queue, {"task": code, "id": str(uuid.uuid4()), MARKER: MARKER}, body)
        yield envelope(queue, {"task": code}, body)
    own = str(uuid.uuid4())
    yield (
        b'{"headers": {"task": "%s", "id": "%s", "timelimit": [NaN, Infinity]}, ' % (name.encode(), own.encode())
        + (envelope(queue, None, body)[1:])
    )
    for depth in (60, 900):
        yield envelope(queue, {"task": name, "id": str(uuid.uuid4()), "deep": json.loads(nested(depth))}, body)
    yield envelope(queue, {"task": name, "id": str(uuid.uuid4()), "large": MARKER * 800_000}, body)
    yield envelope(queue, {"task": name, "id": str(uuid.uuid4()), **{str(n): n for n in range(300_000)}}, body)


def odd_bodies(queue, name, trap):
    """Bodies that cannot be decoded, or are something else than they seem."""

    def put(body, headers=None, **changes):
        return envelope(queue, {"task": name, "id": str(uuid.uuid4()), **(headers or {})}, body, **changes)

    whole = encoded([[MARKER], {}, {}])
    yield from (put(whole[:-5]), put("!!!" + MARKER), put("A"), put(""), put(MARKER, properties={}))
    for content_type in ("application/x-python-serialize", "application/data", "text/plain", "application/x-yaml",
                         "application/x-msgpack", "x" * 10_000, "", "application/x-signed"):  # fmt: skip
        yield put(whole, **{"content-type": content_type})
        yield put(encoded(pickle.dumps([[Trap(trap)], {}, {}])), **{"content-type": content_type})
    for encoding in ("binary", "utf-16", "rot13", "idna", "unicode_escape", "odd"):
        yield put(whole, **{"content-encoding": encoding})
    for text in (
        nested(DEEP), nested(900), "9" * 10_000, "[[NaN, Infinity, -Infinity], {}, {}]", "{}", "null", "[]", "5",
        '"text"', "[[1], {}]", "[[1], {}, {}, {}]", "[5, 5, 5]", "[null, null, null]", '[{}, [], "x"]', '{"args": 5}',
        '{"args": [1], "kwargs": 5, "task": 5}', f'{{"task": "os.system", "x": "{MARKER}"}}',
    ):  # fmt: skip
        yield put(encoded(text.encode()))
        yield envelope(queue, {}, encoded(text.encode()))
    yield put(encoded(b"\xff\xfe" + MARKER.encode() * 100))
    for embed in (5, [], "text", {"callbacks": 5}, {"callbacks": [[MARKER]]}, {"errbacks": {"a": 1}}, {"chain": 5},
                  {"chain": [{"task": "os.system", "args": [MARKER], "kwargs": {}, "options": {}}]}, {"chord": 5},
                  {"chord": {"task": 5}}, {"callbacks": [{"task": "os.system", "args": [MARKER]}]}):  # fmt: skip
        yield put(encoded([[1], {}, embed]))
    for kind, value in (
        ("os.system", f"touch {trap}"), ("base64", 5), ("bytes", None), ("uuid", {"hex": MARKER}), (5, 5), ({}, []),
        ("decimal", "1e999999999"), ("decimal", MARKER), ("datetime", MARKER), ("__custom__", {}),
    ):  # fmt: skip
        yield put(encoded([[{"__type__": kind, "__value__": value}], {}, {}]))
    for kwargs in ({"self": 1}, {"__class__": MARKER}, {"": 1}, {"value": 1, "task": 2, "request": 3}):
        yield put(encoded([[], kwargs, {}]))


def large_bodies(queue, name, limit):
    """(task id, message) of bodies beyond the limit, as they are and compressed a thousandfold."""
    text = json.dumps([[MARKER * (limit // len(MARKER) + 1)], {}, {}]).encode()
    far = b"[" + b" " * (100 * limit)
    for compression, data in (
        (None, text), ("application/x-gzip", zlib.compress(far)), ("application/x-bz2", bz2.compress(far)),
        ("application/x-lzma", lzma.compress(far)), ("gzip", zlib.compress(far)),
    ):  # fmt: skip
        own = str(uuid.uuid4())
        headers = {"task": name, "id": own, **({"compression": compression} if compression else {})}
        yield own, envelope(queue, headers, encoded(data))
