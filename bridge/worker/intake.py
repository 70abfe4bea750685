"""In the worker: what a message must be before Celery looks at it, and what becomes of one that is refused.

Size limits come before decoding. A message that would end Celery's worker, or a log line that would hold what is in a
message, does not get that far: here it costs only itself.
"""

import bz2
import decimal
import json
import logging
import lzma
import math
import re
import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
from celery import signals
from celery.app.task import Context
from celery.exceptions import InvalidTaskError
from celery.worker.consumer import consumer as celery_consumer
from kombu import compression
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.transport import redis as kombu_redis
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import register_type
from redis.exceptions import DataError

from bridge.errors import MessageInvalid, PayloadTooLarge, TaskError

logger = logging.getLogger(__name__)

#: Headers of one message: characters in all, and how deep they may be nested; Celery's own need hundreds and three.
MOST_HEADER_CHARS, MOST_HEADER_DEPTH = 1 << 20, 50
#: Characters of a task's name or id.
MOST_NAME_CHARS = 1024
#: Characters of a foreign error's text in a log line.
MOST_TEXT_CHARS = 200


#: Digits before or after the point of a number; Python's own bound for texts that become an int.
MOST_DIGITS = 4300
#: What kombu raises where a text in a queue is no message, or one with odd properties.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, DataError)


#: Of larger messages, in bytes, the body is read apart from the rest.
LARGE_BODY = 1 << 16
#: What marks a message of kombu's whose body has been cut out.
CUT = "bridge-body-cut"
_BODY = re.compile(rb'"body"\s*:\s*"')


class TooMuch(Exception):
    """A compressed body holds more than the limit."""


# ---- is it one?


def refusal(message: Any, limit: int) -> TaskError | None:
    """Why a message is refused; None if Celery may have it.

    Args:
        message: kombu's, its body not decoded yet.
        limit: bytes of a body, decompressed.
    """
    headers = message.headers
    if not isinstance(headers, dict) or not isinstance(message.properties, dict):
        return MessageInvalid("a message whose headers or properties are no mapping")
    if not isinstance(message.body, str | bytes | bytearray | memoryview):
        return MessageInvalid("a message whose body is no text")
    if not _is_small(headers) or not _is_small(message.properties):
        return MessageInvalid(
            f"a message whose headers are too large ({MOST_HEADER_CHARS} characters) or nested too deeply "
            f"({MOST_HEADER_DEPTH}); put data into arguments"
        )
    name = headers.get("task", "")
    if not _is_name(name) or (name and not _is_name(headers.get("id"))):
        return MessageInvalid("a message whose task or id is no text, or is longer than a name")
    if len(message.body) > limit or CUT in getattr(message, "_raw", ()):
        return PayloadTooLarge(name, limit)
    reason = _odd_header(headers)
    return MessageInvalid(f"{name}: {reason}") if reason else None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MOST_NAME_CHARS


def _is_small(value: Any) -> bool:
    """Whether headers are bounded; looks at no more of them than that takes."""
    left, level = MOST_HEADER_CHARS, [value]
    for _ in range(MOST_HEADER_DEPTH):
        below: list[Any] = []
        for each in level:
            kind = type(each)
            if kind is str or kind is bytes:
                left -= len(each)
            elif kind is dict:
                below += each
                below += each.values()
            elif kind is list or kind is tuple:
                below += each
            else:
                left -= 8
        if left < len(below):
            return False
        if not below:
            return True
        level = below
    return False


def _odd_header(headers: dict[str, Any]) -> str:
    """What would end Celery's worker later, where nobody knows any more which task it was; else empty."""
    if not _is_name(headers.get("shadow") or ""):
        return "shadow must be a name"
    limits = headers.get("timelimit")
    if limits and not (isinstance(limits, list | tuple) and len(limits) == 2 and all(map(_is_limit, limits))):
        return "timelimit must be two finite numbers of seconds, hard and soft, or null"
    stamps = headers.get("stamped_headers")
    if stamps and not (isinstance(stamps, list | tuple) and all(isinstance(each, str) for each in stamps)):
        return "stamped_headers must be a list of names"
    return ""


def _is_limit(value: Any) -> bool:
    try:
        return value is None or math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def without_large_body(raw: bytes, limit: int) -> bytes:
    """A message as it lies in Redis; a body beyond the limit is cut out, so that it is never parsed nor noted.

    Args:
        raw: JSON text, of any size.
        limit: bytes of a body, which travels as base64.
    """
    if len(raw) <= limit * 4 // 3 + 2 * MOST_HEADER_CHARS:
        return raw
    found = _BODY.search(raw)
    start = found.end() if found else len(raw)
    end = raw.find(b'"', start)  # base64 has none; after any other body the rest is no JSON
    rest = len(raw) - (end - start)
    if end < 0 or rest > 2 * MOST_HEADER_CHARS:
        return b""
    return b'{"%s": true, ' % CUT.encode() + raw[:start].lstrip()[1:] + raw[end:]


#: How kombu begins a message, and what stands for a body that has been taken out of it.
_BEGIN, _TAKEN_OUT = b'{"body": "', "bridge-body-taken-out"


class BoundedChannel:
    """Mixed into kombu's channel classes for Redis: large bodies are taken out of what BRPOP brings.

    Those beyond the limit are never looked at again. Others are put back by `decode_body`, for `json` would read them
    much slower.
    """

    largest_body = math.inf
    brpop_text: Any = b""  # what BRPOP has just brought
    _taken_out: Any = b""  # a body of it, in its quotes

    def _create_client(self, *args: Any, **kwargs: Any) -> Any:
        client = super()._create_client(*args, **kwargs)  # type: ignore[misc]
        parse = client.parse_response

        def parse_response(connection: Any, command_name: str, **options: Any) -> Any:
            answer = parse(connection, command_name, **options)
            if command_name != "BRPOP" or not answer or not self.is_consumed(self._list_queue(answer[0])):
                return answer
            limit = self.largest_body
            self.brpop_text = answer[1] if limit == math.inf else without_large_body(answer[1], int(limit))
            return answer[0], self.without_body(self.brpop_text)

        client.parse_response = parse_response
        return client

    def _list_queue(self, key: Any) -> str:
        return str(bytes_to_str(key)).rsplit(self.sep, 1)[0]  # type: ignore[attr-defined]

    def is_consumed(self, queue: str) -> bool:
        """Whether a message of a queue comes to this channel; else kombu reads it on any other, and gives it back."""
        return queue in getattr(self.connection, "_callbacks", ())  # type: ignore[attr-defined]

    def without_body(self, raw: bytes) -> bytes:
        """The text of the message that is delivered next; `decode_body` has its body."""
        short, self._taken_out = take_body(raw)
        return short

    def decode_body(self, body: Any, encoding: Any = None) -> Any:
        """A body's bytes; kombu's base64 is read several times faster than Python does."""
        is_out = body == _TAKEN_OUT and bool(self._taken_out)
        if encoding == "base64" and isinstance(body, str):
            try:
                return msgspec.json.decode(self._taken_out, type=bytes) if is_out else msgspec.convert(body, bytes)
            except msgspec.ValidationError:  # with line breaks, say, which Python's own reader skips
                pass
        body = msgspec.json.decode(self._taken_out) if is_out else body
        return super().decode_body(body, encoding)  # type: ignore[misc]

    def complete(self, message: Any) -> None:
        """Before kombu writes down what it has read: the body as it came."""
        if message._raw.get("body") == _TAKEN_OUT and self._taken_out:
            message._raw["body"] = msgspec.json.decode(self._taken_out)

    def forget_body(self) -> None:
        """The message is delivered."""
        self.brpop_text = self._taken_out = b""


def take_body(raw: bytes) -> tuple[bytes, Any]:
    """A message with a mark in the place of a large body, and that body in its quotes; or the message itself."""
    end = raw.find(b'"', len(_BEGIN)) if len(raw) > LARGE_BODY and raw.startswith(_BEGIN) else -1
    if end < 0 or raw.find(b"\\", len(_BEGIN), end) >= 0:
        return raw, b""
    return _BEGIN + _TAKEN_OUT.encode() + raw[end:], memoryview(raw)[len(_BEGIN) - 1 : end + 1]


def drop_unreadable(error: Exception, is_message: bool) -> None:
    """Something in a queue that is no message, or has odd properties, must not end the worker.

    Args:
        error: raised while it was delivered.
        is_message: kombu had made a message of it before: the error is somebody else's, and is raised.
    """
    if is_message:
        raise error
    logger.error("dropped what is no message of kombu's (%s)", type(error).__name__)


# ---- on its way to Celery


def guarded(
    consumer: Any, handle: Callable[[Any], Any], limit: int, close: Callable[[Any], None] = lambda _: None
) -> Callable[[Any], Any]:
    """The consumer's message handler, which raises only what concerns the connection.

    Args:
        close: called with each message that is let in, before its body is decoded.
    """
    # KeyError is among kombu's connection errors since 5.7: one message would break the connection again and again.
    passes = tuple(
        each for each in (*consumer.connection_errors, *consumer.connection.channel_errors) if each is not KeyError
    )

    def on_task_received(message: Any) -> Any:
        error = refusal(message, limit)
        if error is None:
            try:
                close(message)
                return handle(message)
            except passes:
                raise
            except Exception as unforeseen:
                if message.acknowledged:  # Celery had refused it and could not store that
                    logger.error("the failure of a message could not be stored: %s", type(unforeseen).__name__)
                    return None
                if consumer.holds(message):
                    raise
                logger.debug("a message could not be taken", exc_info=True)
                name = message.headers.get("task", "")
                error = MessageInvalid(f"{name}: its message cannot be taken ({type(unforeseen).__name__})")
        refuse(consumer, message, error)
        return None

    return on_task_received


def refuse(consumer: Any, message: Any, error: TaskError) -> None:
    """Store the failure where the headers name the task, say it, and take the message off the broker."""
    logger.error("refused a message: %s", error)
    headers = message.headers if isinstance(message.headers, dict) else {}
    task_id, name = headers.get("id"), headers.get("task")
    if isinstance(task_id, str) and isinstance(name, str) and 0 < len(task_id) <= MOST_NAME_CHARS:
        try:
            _store(consumer.app, task_id, name, headers, error)
        except Exception as unstored:
            logger.error("the failure of %s[%s] could not be stored: %s", name, task_id, type(unstored).__name__)
        if consumer.event_dispatcher:
            consumer.event_dispatcher.send("task-failed", uuid=task_id, exception=repr(error))
    if not message.acknowledged:
        message.reject_log_error(logger, consumer.connection_errors)
    signals.task_rejected.send(sender=consumer, message=message, exc=error)


def _store(app: Any, task_id: str, name: str, headers: dict[str, Any], error: TaskError) -> None:
    task = app.tasks.get(name)
    ignored = headers.get("ignore_result", getattr(task, "ignore_result", False))
    if not ignored or getattr(task, "store_errors_even_if_ignored", False):
        app.backend.mark_as_failure(task_id, error, request=Context(id=task_id, task=name))


# ---- small texts that become large


def bound_decoding(limit: int) -> None:
    """Let kombu, in this process, decompress no more than a body may have; brotli's library has no such bound.

    And no JSON text of a few characters becomes a number of a billion digits, which takes hours to make an int of.
    """
    register_type(decimal.Decimal, "decimal", str, _decimal)
    bounds: dict[str, Callable[[], Any]] = {
        "application/x-gzip": zlib.decompressobj,
        "application/x-bz2": bz2.BZ2Decompressor,
        "application/x-lzma": lzma.LZMADecompressor,
    }
    zstd = getattr(compression, "zstd", None)
    if zstd is not None:
        bounds["application/zstd"] = zstd.ZstdDecompressor
    for content_type, make in bounds.items():
        encode, _ = compression.get_encoder(content_type)
        compression.register(encode, _bounded(make, limit), content_type)


def _decimal(text: str) -> decimal.Decimal:
    number = decimal.Decimal(text)
    if number.is_finite() and abs(number.adjusted()) > MOST_DIGITS:
        raise InvalidTaskError(f"numbers of more than {MOST_DIGITS} digits are refused")
    return number


def _bounded(make: Callable[[], Any], limit: int) -> Callable[[bytes], bytes]:
    """A decompressor of one or more streams that stops beyond `limit` bytes."""

    def decompress(data: bytes) -> bytes:
        parts: list[bytes] = []
        left = limit + 1
        while data and left > 0:
            stream = make()
            parts.append(stream.decompress(data, left))
            left -= len(parts[-1])
            if not stream.eof and left > 0:
                raise EOFError("compressed data ended before its end")
            data = stream.unused_data if stream.eof else b""
        if left <= 0:
            raise TooMuch
        return b"".join(parts)

    return decompress


# ---- what is logged


def shorten_logs() -> None:
    """Celery and kombu write whole messages into their logs when they cannot use them; from now on their sizes."""
    for each in (celery_consumer.logger, kombu_redis.logger):
        if not any(isinstance(known, _Shorten) for known in each.filters):
            each.addFilter(_Shorten())


class _Shorten(logging.Filter):
    """Takes what a producer wrote out of a record: bodies, headers, and errors that quote them."""

    #: Celery's and kombu's texts, and which of their arguments may be shown.
    _SHOWN: ClassVar[dict[str, tuple[int, ...]]] = {
        celery_consumer.UNKNOWN_FORMAT: (),
        celery_consumer.UNKNOWN_TASK_ERROR: (0, 3),  # the name; the queue
        celery_consumer.INVALID_TASK_ERROR: (0,),  # the reason
        celery_consumer.MESSAGE_DECODE_ERROR: (0, 1, 2),  # the reason; content type and encoding
        "Could not restore message: %r": (),
    }

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; it is always logged."""
        shown = self._SHOWN.get(record.msg) if isinstance(record.msg, str) else None
        if shown is not None:
            found = record.args if isinstance(record.args, tuple) else (record.args,)
            if record.msg == celery_consumer.UNKNOWN_TASK_ERROR and isinstance(found[0], KeyError):
                found = (str(found[0]), *found[1:])  # the name
            record.args = tuple(_short(each) if n in shown else _size(each) for n, each in enumerate(found))
            record.exc_info = record.exc_text = None
        return True


def _size(value: Any) -> str:
    """In place of a body or headers; of headers the id is told."""
    if isinstance(value, dict):
        return f"({len(value)} headers, not shown; id {str(value.get('id'))[:MOST_TEXT_CHARS]})"
    return f"({len(value)} characters, not shown)" if isinstance(value, str) else f"({type(value).__name__}, not shown)"


def _short(value: Any) -> str:
    if isinstance(value, DecodeError) and value.args and isinstance(value.args[0], Exception):
        value = value.args[0]  # what it wraps
    if not isinstance(value, BaseException):
        return str(value)[:MOST_TEXT_CHARS]
    # Others may quote what they were given: a body that is no UTF-8, a value of an unknown type, a header.
    quotes_nothing = isinstance(value, InvalidTaskError | ContentDisallowed | json.JSONDecodeError)
    text = str(value) if quotes_nothing else str(getattr(value, "reason", ""))
    return f"{type(value).__name__}: {text}"[:MOST_TEXT_CHARS] if text else type(value).__name__
