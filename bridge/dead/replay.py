"""A dead letter is sent again: the message its producer sent, to where it was sent, and only then the letter goes."""

import base64
import json
from datetime import UTC, datetime
from typing import Any

from celery.utils.time import maybe_iso8601
from kombu.exceptions import OperationalError

from bridge.driver.dead_letters import DeadLetters, Letter
from bridge.errors import as_text

#: How long the broker may take to connect, and Redis to answer, in seconds.
CONNECT_S = 5.0


class NotReplayed(Exception):
    """It was not sent, and its letter is still there; the text says why."""


def replay(app: Any, letters: DeadLetters, task_id: str, ignore_expiry: bool = False) -> Letter:
    """Send a letter's message again; crashes are counted from none.

    Raises:
        NotReplayed: it cannot be sent, or the broker has not taken it.
        redis.RedisError: where letters are kept does not answer.
    """
    if not letters.claim(task_id):
        raise NotReplayed("somebody else is replaying it")
    try:
        letter = letters.get(task_id)
        if letter is None:
            raise NotReplayed("it is not there any more")
        headers = _headers(letter, ignore_expiry)
        letters.forget_crashes(task_id)
        _send(app, letter, headers)
        letters.drop_if_same(letter)
        return letter
    finally:
        letters.release(task_id)


def payload_of(letter: Letter) -> dict[str, Any]:
    """Headers and arguments for people; nothing is unpickled, so what is not text stays base64."""
    headers = {"headers": json.dumps(letter.headers, default=str)}
    if not letter.has_body:
        return headers
    try:
        return headers | {"body": base64.b64decode(letter.body).decode(letter.content_encoding or "utf-8")}
    except (LookupError, UnicodeDecodeError):
        return headers | {"body_base64": letter.body}


def _headers(letter: Letter, ignore_expiry: bool) -> dict[str, Any]:
    if not letter.has_body:
        raise NotReplayed(f"its message was not kept: {letter.not_kept}")
    headers, expires = dict(letter.headers), letter.headers.get("expires")
    if expires is None or not _is_past(expires):
        return headers
    if not ignore_expiry:
        raise NotReplayed(f"it has expired ({expires}), so a worker would revoke it; --ignore-expiry sends it anyway")
    return headers | {"expires": None}


def _is_past(expires: Any) -> bool:
    try:
        moment = maybe_iso8601(expires)
        return bool((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) < datetime.now(UTC))
    except (TypeError, ValueError, AttributeError):
        return False  # a worker knows what to do with it


def _send(app: Any, letter: Letter, headers: dict[str, Any]) -> None:
    properties = dict(letter.properties)
    compression = headers.pop("compression", None)  # the worker has got it decompressed
    if "expiration" in properties:
        properties["expiration"] = int(properties["expiration"]) / 1000  # kombu takes seconds and sends milliseconds
    try:
        with app.connection_for_write(connect_timeout=CONNECT_S) as connection:
            is_amqp = connection.transport.driver_type == "amqp"
            if is_amqp:
                connection.transport_options["confirm_publish"] = True  # else it may be lost on its way
            else:
                connection.transport_options |= {"socket_timeout": CONNECT_S, "socket_connect_timeout": CONNECT_S}
            connection.ensure_connection(max_retries=1, timeout=CONNECT_S)
            with connection.Producer(auto_declare=False) as producer:
                producer.publish(
                    base64.b64decode(letter.body),
                    exchange=letter.exchange,
                    routing_key=letter.routing_key,
                    content_type=letter.content_type,
                    content_encoding=letter.content_encoding,
                    headers=headers,
                    compression=compression,
                    mandatory=is_amqp,  # no queue for it is an error, not the end of the message
                    declare=_queues(app, letter),
                    confirm_timeout=CONNECT_S,
                    **properties,
                )
    except Exception as error:
        if isinstance(error, OperationalError | OSError) or _is_of_broker(error):
            raise NotReplayed(f"the broker has not taken it: {as_text(error, 160)}") from error
        raise


def _is_of_broker(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in ("amqp", "kombu", "redis")


def _queues(app: Any, letter: Letter) -> list[Any]:
    """The app's queues that the message goes to, so that they are there."""
    found = app.amqp.queues.values()
    if not letter.exchange:
        return [queue for queue in found if queue.name == letter.routing_key]
    return [each for each in found if (each.exchange.name, each.routing_key) == (letter.exchange, letter.routing_key)]
