"""In the worker: what a message must be before Celery looks at it, and what becomes of one that is refused.

Size limits come before decoding. A message that would end Celery's worker, or a log line that would hold what is in a
message, does not get that far: here it costs only itself.
"""

import bz2
import logging
import lzma
import math
import zlib
from collections.abc import Callable
from typing import Any

from celery import signals
from celery.app.task import Context
from celery.worker.consumer import consumer as celery_consumer
from kombu import compression
from kombu.transport import redis as kombu_redis
from redis.exceptions import DataError

from bridge.errors import MessageInvalid, PayloadTooLarge, TaskError

logger = logging.getLogger(__name__)

#: Headers of one message: characters in all, and how deep they may be nested; Celery's own need hundreds and three.
MOST_HEADER_CHARS, MOST_HEADER_DEPTH = 1 << 20, 50
#: Characters of a task's name or id.
MOST_NAME_CHARS = 1024
#: Characters of a foreign error's text in a log line.
MOST_TEXT_CHARS = 200


#: What kombu raises where a text in a queue is no message, or one with odd properties.
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, DataError)


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
    if len(message.body) > limit:
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
            if isinstance(each, dict):
                below += each.keys()
                below += each.values()
            elif isinstance(each, list | tuple):
                below += each
            else:
                left -= len(each) if isinstance(each, str | bytes) else 8
            if left - len(below) < 0:
                return False
        if not below:
            return True
        level = below
    return False


def _odd_header(headers: dict[str, Any]) -> str:
    """What would end Celery's worker later, where nobody knows any more which task it was; else empty."""
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


def guarded(consumer: Any, handle: Callable[[Any], Any], limit: int) -> Callable[[Any], Any]:
    """The consumer's message handler, which raises only what concerns the connection."""
    # KeyError is among kombu's connection errors since 5.7: one message would break the connection again and again.
    passes = tuple(
        each for each in (*consumer.connection_errors, *consumer.connection.channel_errors) if each is not KeyError
    )

    def on_task_received(message: Any) -> Any:
        error = refusal(message, limit)
        if error is None:
            try:
                return handle(message)
            except passes:
                raise
            except Exception as unforeseen:
                if message.acknowledged or consumer.holds(message):
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


# ---- compressed bodies


def limit_decompression(limit: int) -> None:
    """Let kombu, in this process, decompress no more than a body may have; brotli's library has no such bound."""
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

    _TEXTS = (
        celery_consumer.UNKNOWN_FORMAT,
        celery_consumer.UNKNOWN_TASK_ERROR,
        celery_consumer.INVALID_TASK_ERROR,
        celery_consumer.MESSAGE_DECODE_ERROR,
        "Could not restore message: %r",
    )

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; it is always logged."""
        if record.msg in self._TEXTS:
            found = record.args if isinstance(record.args, tuple) else (record.args,)
            record.args = tuple(map(_short, found))
            record.exc_info = record.exc_text = None
        return True


def _short(value: Any) -> Any:
    if isinstance(value, BaseException):
        # kombu's DecodeError repeats what it wraps, and some of those quote all they were given
        text = str(value) if isinstance(value, KeyError | celery_consumer.InvalidTaskError) else ""
        text = text or str(getattr(value, "reason", "") or "")
        return f"{type(value).__name__}: {text[:MOST_TEXT_CHARS]}" if text else type(value).__name__
    if value is None or isinstance(value, int | float):
        return value
    return f"({len(value)} long, not shown)" if isinstance(value, str | bytes | dict | list) else type(value).__name__
