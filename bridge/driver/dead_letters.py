"""In Redis, for all workers of a namespace: who has crashed how often, and what was poisoned, good enough to replay.

Crashes are a hash per task id, one field per execution: telling one twice counts it once. Dead letters are a key each,
so that Redis itself lets them expire, and an index by age. No payload is unpickled here. Raises what redis-py raises.
"""

import base64
import json
import pickle
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from kombu.serialization import dumps as serialise
from kombu.utils.json import dumps, loads
from redis.exceptions import WatchError

from actors.closed import Texts
from actors.contract import LogLine
from bridge.link import Run

#: What of a body's last words is kept, in bytes.
LOG_BYTES = 8192
#: What the worker adds to a request beside the message's own headers.
_NOT_HEADERS = frozenset({"properties", "delivery_info", "hostname", "reply_to", "correlation_id", "redelivered"})
#: Properties that the transport makes anew, or that stand elsewhere in the letter.
_NOT_PROPERTIES = frozenset(
    {"delivery_info", "delivery_tag", "body_encoding", "application_headers", "content_type", "content_encoding"}
)
#: A replay that has not ended after this, in seconds, was killed: the next one may begin.
CLAIM_S = 60


class Crash(NamedTuple):
    """An executor's death that is charged to a task."""

    at: float  # as `time.time`
    how: str  # such as "signal 11 (SIGSEGV)"
    worker: str
    slot: int  # of the actor
    node: str


class Letter(NamedTuple):
    """A poisoned task: the message as it came, and how it died. `body` and some headers are the user's payload."""

    id: str
    task: str
    at: float  # as `time.time`
    reason: str
    crashes: list[Crash]
    logs: str  # the last words of its body, as far as they were told
    exchange: str
    routing_key: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    content_type: str
    content_encoding: str
    body: str  # base64, decompressed; "" when it is not kept
    size_bytes: int  # of the body
    not_kept: str = ""  # why there is no body

    @property
    def has_body(self) -> bool:
        """Whether it can be replayed."""
        return not self.not_kept


class Bounds(NamedTuple):
    """How much is kept, and how long."""

    letters: int  # at most; 0 keeps none
    letters_bytes: int  # all together
    letters_s: float
    crashes_s: float  # after the last one


class DeadLetters:
    """The crashes and dead letters of one namespace; thread-safe as the client is."""

    def __init__(self, client: Any, prefix: str, namespace: str, bounds: Bounds) -> None:
        self._client, self._bounds = client, bounds
        self._index = f"{prefix}{namespace}-dead-letters"
        self._letter = f"{prefix}{namespace}-dead-letter-"
        self._crashes = f"{prefix}{namespace}-crashes-"
        self._claim = f"{prefix}{namespace}-replays-"

    # ---- crashes

    def add_crashes(self, task_id: str, crashes: dict[str, Crash]) -> dict[str, Crash]:
        """Note crashes by execution; all that are known of the task then."""
        key = f"{self._crashes}{task_id}"
        with self._client.pipeline() as pipe:
            pipe.hset(key, mapping={execution: json.dumps(crash) for execution, crash in crashes.items()})
            pipe.expire(key, max(1, int(self._bounds.crashes_s)))
            pipe.hgetall(key)
            return _crashes(pipe.execute()[-1])

    def crashes(self, task_ids: Iterable[str]) -> list[dict[str, Crash]]:
        """What is known of each task, by execution; one question for all."""
        with self._client.pipeline(transaction=False) as pipe:
            for task_id in task_ids:
                pipe.hgetall(f"{self._crashes}{task_id}")
            return [_crashes(found) for found in pipe.execute()]

    def forget_crashes(self, task_id: str) -> None:
        """The task begins at none."""
        self._client.delete(self._crashes + task_id)

    # ---- letters

    def keep(self, letter: Letter) -> None:
        """Keep a letter, in place of an older one of the same task; beyond the bounds the oldest go."""
        if not self._bounds.letters:
            return
        text = dumps(letter._asdict())
        if len(text) > self._bounds.letters_bytes:
            why = f"its body of {letter.size_bytes} bytes does not fit into BRIDGE_DEAD_LETTERS_BYTES"
            text = dumps(_without_body(letter, why)._asdict())
        seconds = max(1, int(self._bounds.letters_s))
        with self._client.pipeline() as pipe:
            pipe.set(self._letter + letter.id, text, ex=seconds)
            pipe.zadd(self._index, {letter.id: letter.at})
            pipe.expire(self._index, seconds)
            pipe.execute()
        self._drop_oldest()

    def ids(self) -> list[str]:
        """Ids of the letters there are, the oldest first."""
        return list(self._sizes())

    def letters(self) -> list[Letter]:
        """All of them, the oldest first; one at a time, for each may be large."""
        found = (self.get(task_id) for task_id in self.ids())
        return [letter for letter in found if letter is not None]

    def get(self, task_id: str) -> Letter | None:
        """One letter; None where there is none."""
        text = self._client.get(self._letter + task_id)
        return _letter(text) if text is not None else None

    def drop(self, task_id: str) -> None:
        """Remove a letter, and what is known of the task's crashes."""
        self._remove([task_id])
        self.forget_crashes(task_id)

    def drop_if_same(self, letter: Letter) -> bool:
        """Remove a letter that has been replayed, unless the task has been poisoned once more meanwhile."""
        key = self._letter + letter.id
        with self._client.pipeline() as pipe:
            try:
                pipe.watch(key)
                text = pipe.get(key)
                if text is None or _letter(text).at != letter.at:
                    return False
                pipe.multi()
                pipe.delete(key)
                pipe.zrem(self._index, letter.id)
                pipe.execute()
            except WatchError:
                return False
        return True

    def claim(self, task_id: str) -> bool:
        """Begin a replay; False while another one of the same task is under way."""
        return bool(self._client.set(self._claim + task_id, "1", nx=True, ex=CLAIM_S))

    def release(self, task_id: str) -> None:
        """The replay has ended."""
        self._client.delete(self._claim + task_id)

    def _sizes(self) -> dict[str, int]:
        """Bytes of each letter, the oldest first; the index loses what has expired."""
        ids = [_text(each) for each in self._client.zrange(self._index, 0, -1)]
        with self._client.pipeline(transaction=False) as pipe:
            for task_id in ids:
                pipe.strlen(self._letter + task_id)
            sizes = dict(zip(ids, pipe.execute(), strict=True))
        expired = [task_id for task_id, size in sizes.items() if not size]
        if expired:
            self._client.zrem(self._index, *expired)
        return {task_id: size for task_id, size in sizes.items() if size}

    def _drop_oldest(self) -> None:
        sizes = self._sizes()
        number, size, dropped = len(sizes), sum(sizes.values()), []
        for task_id, bytes_ in sizes.items():
            if number <= self._bounds.letters and size <= self._bounds.letters_bytes:
                break
            dropped.append(task_id)
            number, size = number - 1, size - bytes_
        self._remove(dropped)

    def _remove(self, task_ids: list[str]) -> None:
        if task_ids:
            with self._client.pipeline() as pipe:
                pipe.delete(*(self._letter + task_id for task_id in task_ids))
                pipe.zrem(self._index, *task_ids)
                pipe.execute()


def letter_of(run: Run, reason: str, crashes: Iterable[Crash], logs: str, serializer: str) -> Letter:
    """A request as a letter; `serializer` is for a body that came decoded, as in Celery's first message protocol."""
    request = run.request
    info = request.get("delivery_info") or {}
    data, content_type, encoding, not_kept = _body(run, serializer)
    return Letter(
        id=str(run.id),
        task=run.task,
        at=time.time(),
        reason=reason,
        crashes=sorted(crashes),
        logs=logs,
        exchange=info.get("exchange") or "",
        routing_key=info.get("routing_key") or "",
        headers={key: value for key, value in request.items() if key not in _NOT_HEADERS},
        properties={k: v for k, v in (request.get("properties") or {}).items() if k not in _NOT_PROPERTIES},
        content_type=content_type,
        content_encoding=encoding,
        body=base64.b64encode(data).decode(),
        size_bytes=len(data),
        not_kept=not_kept,
    )


def last_words(told: Iterable[bytes]) -> str:
    """What a body logged before it died, from the news of it; the end of it, if it was much."""
    lines = [wish.text for wishes in told for wish in pickle.loads(wishes) if isinstance(wish, LogLine)]
    return "\n".join(lines)[-LOG_BYTES:]


def _body(run: Run, serializer: str) -> tuple[bytes, str, str, str]:
    """Bytes, content type and encoding of a body, and why it cannot be kept if so."""
    body, content_type, encoding = run.body, run.content_type or "", run.content_encoding or ""
    if isinstance(body, Texts):
        body = body.joined()
    if not content_type:
        try:
            content_type, encoding, body = serialise(body, serializer=serializer)
        except Exception as error:
            return b"", "", "", f"its arguments cannot be written as {serializer}: {type(error).__name__}"
    return body.encode() if isinstance(body, str) else bytes(body), content_type, encoding, ""


def _without_body(letter: Letter, why: str) -> Letter:
    """The arguments stand in two headers, too, shortened; they stay."""
    return letter._replace(body="", not_kept=why)


def _letter(text: str | bytes) -> Letter:
    values = loads(text)
    values["crashes"] = [Crash(*each) for each in values["crashes"]]
    return Letter(**values)


def _crashes(found: dict[Any, Any]) -> dict[str, Crash]:
    return {_text(execution): Crash(*json.loads(crash)) for execution, crash in found.items()}


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
