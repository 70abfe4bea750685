"""In the worker: the consuming connection asks Redis about many messages at once, where kombu asks thrice about each.

It waits without taking anything (taking.py); then one script takes messages and notes them as unacknowledged, as
many as the prefetch count lets in; acknowledgements leave together, once per turn of the event loop. Redis holds what
stock kombu would have put there, so workers without this share queues with this one. It never holds a message back,
never takes what kombu would not have taken next, and leaves every message it cannot read, and every Redis that does not
do this, to kombu's BRPOP.
"""

import logging
import time
from collections import deque
from contextlib import suppress
from queue import Empty
from typing import Any, NamedTuple

import redis
from kombu.transport import redis as stock
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from kombu.utils.scheduling import priority_cycle, round_robin_cycle, sorted_cycle
from redis.exceptions import NoScriptError, RedisError, ResponseError

from bridge.errors import as_text
from bridge.worker.intake import UNREADABLE, BoundedChannel, drop_unreadable, without_large_body
from bridge.worker.redis_qos import GroupedQoS
from bridge.worker.taking import LARGEST_BYTES, MOST_BYTES, READ_BYTES, REMEDY, TAKE, Watch, lasts, read_reply, speaks_3
from bridge.worker.visibility import RENEW, RenewingPoller

logger = logging.getLogger(__name__)

#: After Redis has refused a script it is asked without for this long, in seconds.
REFUSED_PAUSE_S = 60.0
#: While Redis is silent it is asked anew after this long, in seconds, unless kombu says otherwise.
ASK_AGAIN_S = 1.0
#: A worker in which a task would wait for a child or a slot leaves what comes to others for this long, in seconds: many
#: times what one that is idle needs to take it.
GIVE_WAY_S = 0.005
#: Who was told of messages so often in a row and came too late asks only after this long, in seconds: with many idle
#: workers Redis would be asked by all of them about each message.
MOST_VAIN, VAIN_PAUSE_S = 20, 0.05


class _Asked(NamedTuple):
    """A question Redis has not answered yet."""

    queues: list[str]
    room: int
    acks: list[Any]
    is_first: bool  # of those that look, on this connection
    looks: bool


class GroupedChannel(BoundedChannel):
    """Mixed into kombu's channel classes for Redis."""

    QoS = GroupedQoS
    _plain_client: Any = None
    _reads = False  # inside BRPOP's delivery, where further messages are welcome
    _refused_until = 0.0
    _is_full = False  # the last question was answered in full: more is to be expected
    _more_waits = False  # or may wait: nothing is to be waited for
    _is_left = False  # the script could not read the next message
    _asked: Any = None
    _answered_at = 0.0
    _way_until: float | None = None  # until then others are given way
    _vain = 0  # questions without a message, one after the other, as fast as Redis has spoken
    _brpop_sent_at: Any = None
    is_built = False  # the text being delivered has become a message

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._taken: deque[tuple[str, str, bytes]] = deque()  # queue, delivery tag, text
        self._without_ack: set[str] = set()  # queues
        self._said: set[str] = set()  # why messages are not taken as they should be
        self._watch = Watch()
        super().__init__(*args, **kwargs)
        self._take = redis.Redis().register_script(TAKE)
        self.renew_script = redis.Redis().register_script(RENEW)

    def _get_pool(self, asynchronous: bool = False) -> Any:
        """The consuming connections ask for protocol 3: redis-py before 8 speaks 2, in which Redis says nothing."""
        pool = super()._get_pool(asynchronous)  # type: ignore[misc]
        options = pool.connection_kwargs
        if asynchronous and "protocol" not in options and not speaks_3(pool.connection_class(**options)):
            options["protocol"] = 3
            try:
                pool.release(pool.get_connection())
            except ResponseError:  # a server or proxy without HELLO; `_brpop_start` says so
                options["protocol"] = 2
                pool.reset()
        return pool

    @property
    def plain_client(self) -> Any:
        """A client on kombu's pool that is kept and leaves keys as they are: kombu makes one per question."""
        pool = self.pool  # type: ignore[attr-defined]
        if self._plain_client is None or self._plain_client.connection_pool is not pool:
            self._plain_client = redis.Redis(connection_pool=pool)
        return self._plain_client

    def prefixed(self, key: str) -> str:
        """A key as it is called in Redis."""
        return f"{self.global_keyprefix}{key}"  # type: ignore[attr-defined]

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        """Consume a queue; with `no_ack` nothing would ever remove what was noted of its messages."""
        (self._without_ack.add if no_ack else self._without_ack.discard)(queue)
        self._more_waits = True  # perhaps, there
        return super().basic_consume(queue, no_ack, *args, **kwargs)  # type: ignore[misc]

    def _basic_cancel(self, consumer_tag: str) -> Any:
        ret = super()._basic_cancel(consumer_tag)  # type: ignore[misc]
        if not self.active_queues:  # type: ignore[attr-defined]
            if self._asked is not None and self._in_poll:
                with suppress(Empty):
                    self._brpop_read()  # what was taken meanwhile goes back now: closing may be an hour away
            if isinstance(self._qos, GroupedQoS):  # type: ignore[attr-defined]
                self._qos.send_acks()  # type: ignore[attr-defined]
            if self._is_waiting():
                self.client.connection.disconnect()  # type: ignore[attr-defined]  # nobody reads what Redis says
        return ret

    def _brpop_start(self, timeout: Any = None) -> None:
        """Ask for messages; the answer is read when it is there. BRPOP asks where there is no other way to wait."""
        self.forget_question()
        connection = self.client.connection  # type: ignore[attr-defined]
        may_take = self._may_take() and not self._is_left
        may_wait = may_take and self._watch.may(connection)
        if may_wait or (may_take and self._is_full):
            self._ask(connection, looks=may_wait and not self._is_full)
            return
        if may_take and not speaks_3(connection):
            self._say("Redis does not say when a list changes", "it would only in its protocol 3", for_good=True)
        self._watch.end(connection)
        self._more_waits = self._is_full = self._is_left = False
        super()._brpop_start(timeout)  # type: ignore[misc]

    def ask_when_due(self) -> None:
        """Ask anew while Redis is silent, as often as BRPOP would; at once when messages are known to wait."""
        if self._is_waiting() and self.active_queues and self.qos.can_consume():  # type: ignore[attr-defined]
            is_due = self._is_due()
            if is_due:
                self._vain = 0
            if is_due or (self._more_waits and not self._gives_way()):
                self._brpop_start()

    def _is_due(self) -> bool:
        return time.monotonic() - self._answered_at >= (self.brpop_timeout or ASK_AGAIN_S)  # type: ignore[attr-defined]

    def drop_dead_connection(self) -> None:
        """Before Redis is asked after a pause: one it has closed meanwhile is made anew, which ends no consumer."""
        if self._is_waiting() and self.qos.can_consume() and self._is_due():  # type: ignore[attr-defined]
            with suppress(RedisError, OSError):
                self._watch.hear(self._in_poll)  # what was said is no news: the question follows

    def _gives_way(self) -> bool:
        """Whether others are to have what waits, for a moment: who is idle is not to lose it to who is not."""
        cycle, now = self.connection.cycle, time.monotonic()  # type: ignore[attr-defined]
        pause_s = GIVE_WAY_S if cycle.is_busy() else VAIN_PAUSE_S if self._vain >= MOST_VAIN else 0.0
        if self._is_full or not pause_s or cycle.timer is None:
            return False
        if self._way_until is None:
            self._way_until = now + pause_s
            cycle.timer.call_after(pause_s, self._take_what_is_left)
        return bool(now < self._way_until)

    def _take_what_is_left(self) -> None:
        with suppress(RedisError, OSError):  # the event loop sees it, too, and connects again
            self.ask_when_due()

    def _is_waiting(self) -> bool:
        """Whether Redis has answered, and says so when a list changes."""
        connection = self._in_poll
        return self._asked is None and bool(connection) and self._watch.is_on(connection)

    def _ask(self, connection: Any, looks: bool) -> None:
        room = self.qos.room  # type: ignore[attr-defined]
        keys, arguments, queues = self._question(room)
        before = self._watch.before(connection) if looks else []
        self._asked = asked = _Asked(queues, room, self.qos.next_acks(), bool(before), looks)  # type: ignore[attr-defined]
        take = ("EVALSHA", self._take.sha, len(keys), *keys, *arguments, *asked.acks)
        look = self._watch.look(keys[2:]) if looks else []
        self._in_poll, self._brpop_sent_at, self._way_until = connection, time.monotonic(), None
        sock = connection._sock
        # A health check might connect anew, unseen: replies would be one out of step.
        connection.send_packed_command(connection.pack_commands([*before, take, *look]), check_health=False)
        if connection._sock is not sock:  # the event loop does not know it
            connection.disconnect()

    def _brpop_read(self, **options: Any) -> Any:
        self._reads, self.is_built = True, False
        try:
            if self._is_waiting():  # a list has changed, or the connection is gone
                self._more_waits = True
                if self._gives_way():
                    self._watch.hear(self._in_poll)
                elif self.active_queues and not self._closing:  # type: ignore[attr-defined]
                    self._brpop_start()
                if self._asked is None:
                    raise Empty
            return super()._brpop_read(**options) if self._asked is None else self._read_answer()  # type: ignore[misc]
        except UNREADABLE as error:
            drop_unreadable(error, self.is_built)
            return True
        finally:
            self._reads = False
            self.forget_body()
            self._deliver_taken()

    def _read_answer(self) -> bool:
        """Read what Redis answers to the question of `_ask`.

        Raises:
            Empty: it has no message.
            RedisError, OSError: the connection is gone.
        """
        asked: _Asked = self._asked
        connection = self.client.connection  # type: ignore[attr-defined]
        try:
            self._see(asked, connection, [read_reply(connection) for _ in range(1 + asked.is_first + 2 * asked.looks)])
        except BaseException:
            connection.disconnect()  # as kombu does: the next turn connects again, or the worker does
            raise
        finally:
            self.forget_question()
            self._in_poll = None
            self._flush_brpop_reauth()  # type: ignore[attr-defined]
        if self._watch.is_on(connection):
            self._in_poll, self._brpop_sent_at, self._answered_at = connection, None, time.monotonic()
        if not self._taken:
            self._vain += 1
            raise Empty
        self._vain = 0
        return True

    def _see(self, asked: _Asked, connection: Any, replies: list[Any]) -> None:
        """Keep what was taken; know whether there is more, and whether Redis says so when there will be."""
        answer = replies.pop(asked.is_first)
        self._is_full = False
        if isinstance(answer, NoScriptError):
            try:
                self.plain_client.script_load(TAKE)
            except ResponseError as error:
                self._refused(error)
        elif isinstance(answer, ResponseError):
            self._refused(answer)
        else:
            self._asked = None
            self.keep(answer, asked.queues, asked.room)
        refusals = [each for each in replies if isinstance(each, ResponseError)]
        if refusals:
            self._say("Redis does not say when a list changes", as_text(refusals[0]), lasts(refusals[0]))
            self._watch.refuse(refusals[0], REFUSED_PAUSE_S)
        elif asked.looks:
            self._watch.begin(connection)
        is_known = asked.looks and not refusals and self._asked is None and not self._is_left
        self._more_waits = not is_known or replies[-1] > 0 or connection.can_read(0)  # a change came with the answer

    def forget_question(self) -> None:
        """A question that has no answer: its acknowledgements are sent again, which does no harm."""
        if self._asked is not None:
            self.qos.ack_again(self._asked.acks)  # type: ignore[attr-defined]
            self._asked = None

    def note(self, message: Any, delivery_tag: Any) -> tuple[list[Any], list[str], int] | None:
        """Note BRPOP's message as unacknowledged and take more, to `keep`; None: kombu has to note it."""
        if not self._reads or not self._may_take():
            return None
        info, count = message.delivery_info, self.qos.room - 1  # type: ignore[attr-defined]
        text = self._noted_as(message, info["exchange"], info["routing_key"])
        keys, arguments, queues = self._question(count, delivery_tag, text)
        try:
            return self._take(keys, arguments, client=self.plain_client), queues, count
        except ResponseError as error:
            self._refused(error)
            return None

    def _noted_as(self, message: Any, exchange: str, routing_key: str) -> bytes:
        """What kombu would note of a message: the text it came as saves writing a large one anew."""
        raw = self.brpop_text or dumps(message._raw).encode()
        return b"[%b, %b, %b]" % (raw, dumps(exchange).encode(), dumps(routing_key).encode())

    def _may_take(self) -> bool:
        cycle: Any = self._queue_cycle  # type: ignore[attr-defined]
        return (
            isinstance(self.qos, GroupedQoS)  # type: ignore[attr-defined]  # with `ack_emulation=False` nothing is noted
            and type(cycle) in (round_robin_cycle, priority_cycle, sorted_cycle)
            and time.monotonic() >= self._refused_until
            and self._without_ack.isdisjoint(self.active_queues)  # type: ignore[attr-defined]
        )

    def _refused(self, error: ResponseError) -> None:
        self._say("Redis refused a script", as_text(error), lasts(error))
        self._refused_until = time.monotonic() + REFUSED_PAUSE_S

    def _say(self, what: str, why: str, for_good: bool) -> None:
        """Say it once in this connection's life, and what to do if it will not pass by itself."""
        if f"{what}{why}" not in self._said:
            self._said.add(f"{what}{why}")
            logger.warning(
                "%s (%s), so BRPOP waits %s: a message on its way to this worker is lost if it is killed then%s",
                what, why, "from now on" if for_good else "for a while", f". Better: {REMEDY}" if for_good else "",
            )  # fmt: skip

    def _question(self, count: int, tag: Any = "", text: bytes = b"") -> tuple[list[str], list[Any], list[str]]:
        """Keys and arguments of the script, and the queues it may take from."""
        cycle: Any = self._queue_cycle  # type: ignore[attr-defined]
        queues: list[str] = cycle.consume(len(self.active_queues)) if count > 0 else []  # type: ignore[attr-defined]
        lists = [
            self._q_for_pri(queue, step)  # type: ignore[attr-defined]
            for step in self.priority_steps  # type: ignore[attr-defined]
            for queue in queues
        ]
        qos = self.qos  # type: ignore[attr-defined]
        keys = [self.prefixed(key) for key in (qos.unacked_index_key, qos.unacked_key, *lists)]
        rotates = int(type(cycle) is round_robin_cycle)
        bounds = (count, MOST_BYTES, READ_BYTES, LARGEST_BYTES)
        return keys, [len(queues), rotates, *bounds, tag, text], queues

    def keep(self, answer: list[Any], queues: list[str], count: int) -> float:
        """What the script has taken is to be delivered; with which time of Redis' clock it is noted."""
        is_left, noted_at, *taken = answer[0], float(answer[1]), *answer[2:]
        for number, tag, raw in zip(*[iter(taken)] * 3, strict=True):
            queue = queues[number - 1]
            self._queue_cycle.rotate(queue)  # type: ignore[attr-defined]
            self._taken.append((queue, tag.decode(), raw))
            self.qos.add_taken(tag.decode(), noted_at)  # type: ignore[attr-defined]
        self._is_left = is_left == 1
        self._is_full = len(taken) == 3 * count > 0
        return noted_at

    def _deliver_taken(self) -> None:
        """Deliver what was taken. Should that fail, the rest goes back to its queues when the channel is closed."""
        qos = self.qos  # type: ignore[attr-defined]
        while self._taken:
            queue, tag, raw = self._taken.popleft()
            if not self.is_consumed(queue):
                if self.connection is not None:  # type: ignore[attr-defined]  # else closing has done it
                    qos.reject(tag, requeue=True)
                continue
            self.is_built = False
            try:
                if len(raw) > self.largest_body:
                    raw = without_large_body(raw, int(self.largest_body))
                short = self.without_body(raw)
                self.connection._deliver(loads(bytes_to_str(short)), queue)  # type: ignore[attr-defined]
            except UNREADABLE as error:
                if qos.is_only_taken(tag):  # no message can be made of it: lost, as it would be with kombu
                    qos.ack(tag)
                drop_unreadable(error, self.is_built)
            qos.forget_taken(tag)
            self.forget_body()


class GroupedPoller(RenewingPoller):
    """Sends the acknowledgements of a turn of the event loop before it waits again."""

    def on_poll_start(self) -> None:
        """Called once per turn. What asks for messages takes acknowledgements along; the rest goes alone."""
        grouped = [channel for channel in self._channels if isinstance(channel._qos, GroupedQoS)]
        for channel in grouped:
            channel.drop_dead_connection()
        super().on_poll_start()
        for channel in self._channels:
            if isinstance(channel._qos, GroupedQoS):
                channel.ask_when_due()
                channel._qos.send_acks()


_CHANNELS: dict[Any, type] = {
    base: type(f"Grouped{base.__name__}", (GroupedChannel, base), {}) for base in (stock.Channel, stock.SentinelChannel)
}


def ask_in_groups(connection: Any) -> None:
    """Let a kombu connection that is not open yet ask Redis in groups; others are left as they are."""
    create = connection.create_transport

    def create_transport() -> Any:  # again after each failover to another URL
        transport = create()
        grouped = _CHANNELS.get(getattr(transport, "Channel", None))  # AMQP's makes its channels otherwise
        if grouped is not None:
            transport.Channel, transport.cycle = grouped, GroupedPoller()
        return transport

    connection.create_transport = create_transport
