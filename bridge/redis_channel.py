"""In the worker: the consuming connection asks Redis about many messages at once, where kombu asks thrice about each.

After BRPOP has delivered a message, one script notes it as unacknowledged and takes further ones, as many as the
prefetch count lets in; acknowledgements leave together, once per turn of the event loop. Redis holds what stock kombu
would have put there, so workers without this share queues with this one. It never holds a message back, never takes
what kombu would not have taken next, and leaves every message it cannot read exactly to kombu.
"""

import logging
import time
from collections import deque
from contextlib import suppress
from typing import Any, NamedTuple

import redis
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from kombu.utils.scheduling import priority_cycle, round_robin_cycle, sorted_cycle
from redis.exceptions import NoScriptError, ResponseError

from bridge.intake import UNREADABLE, BoundedChannel, drop_unreadable
from bridge.visibility import RENEW, RenewingPoller, RenewingQoS

logger = logging.getLogger(__name__)

#: One script takes at most this many messages, and no further one when it has this many bytes.
MOST_MESSAGES, MOST_BYTES = 100, 1 << 20
#: A larger message is left to BRPOP: reading it would keep Redis from everybody else.
LARGEST_BYTES = 1 << 16
#: Acknowledgements leave in the middle of a turn when there are this many, and no more of them together.
MOST_ACKS = 500
#: After Redis has refused a script or acknowledgements it is asked again after this long, in seconds.
REFUSED_PAUSE_S, ACK_AGAIN_S = 60.0, 1.0

# Removes what is acknowledged, notes the message of BRPOP if there is one, then takes further ones as a series of
# BRPOPs would: most urgent list first, queues in turn. Only half of what waits, rounded up: other workers want theirs.
# cjson reads a message, whose tag must be plain ASCII; what is stored is its text, untouched. The ZREM needs no memory,
# and after a first write Redis lets a script finish: a full server would refuse to note what it gave away.
_TAKE = """
local now, queues, rotates = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1'
local count, bytes, largest = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])

local function note(tag, text)
  redis.call('ZREM', KEYS[1], tag)
  redis.call('ZADD', KEYS[1], now, tag)
  redis.call('HSET', KEYS[2], tag, text)
end

local function read(raw)
  local ok, message = pcall(cjson.decode, raw)
  local properties = ok and type(message) == 'table' and message.properties
  local info = type(properties) == 'table' and properties.delivery_info
  if type(info) ~= 'table' then return nil end
  local tag, exchange, key = properties.delivery_tag, info.exchange, info.routing_key
  if type(tag) ~= 'string' or type(exchange) ~= 'string' or type(key) ~= 'string' then return nil end
  if tag:find('[^ -~]') then return nil end
  return tag, '[' .. raw .. ', ' .. cjson.encode(exchange) .. ', ' .. cjson.encode(key) .. ']'
end

if #ARGV > 8 then
  redis.call('ZREM', KEYS[1], unpack(ARGV, 9))
  redis.call('HDEL', KEYS[2], unpack(ARGV, 9))
end
if ARGV[8] ~= '' then note(ARGV[7], ARGV[8]) end
local order, is_empty, waiting = {}, {}, 0
for queue = 1, queues do order[queue] = queue end
for k = 3, #KEYS do
  local length = redis.pcall('LLEN', KEYS[k])
  if type(length) == 'number' then waiting = waiting + length else is_empty[KEYS[k]] = true end
end

local function most_urgent()
  for first = 2, #KEYS - 1, queues do
    for place, queue in ipairs(order) do
      local key = KEYS[first + queue]
      local raw = not is_empty[key] and redis.call('LINDEX', key, -1)
      if raw then return key, raw, place end
      is_empty[key] = true
    end
  end
end

local taken = {}
for _ = 1, math.min(count, math.ceil(waiting / 2)) do
  local key, raw, place = most_urgent()
  if not key or #raw > largest or #raw > bytes then break end
  local tag, text = read(raw)
  if not tag then break end
  redis.call('RPOP', key)
  note(tag, text)
  bytes = bytes - #raw
  taken[#taken + 1] = order[place]
  taken[#taken + 1] = tag
  taken[#taken + 1] = raw
  if rotates then table.insert(order, table.remove(order, place)) end
end
return taken
"""


class GroupedQoS(RenewingQoS):
    """Which messages are unacknowledged; of one that was taken and not delivered yet, None stands for the message."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._acks: deque[Any] = deque()  # prefork acknowledges from a thread of its own while children end
        self._ack_at = 0.0

    def append(self, message: Any, delivery_tag: Any) -> None:
        """Note a message as unacknowledged, unless that was done when it was taken."""
        if self.is_only_taken(delivery_tag):
            virtual.QoS.append(self, message, delivery_tag)
            self.channel.is_built = True
            return
        answer = self.channel.note(message, delivery_tag)
        if answer is None:
            self.channel.complete(message)
            super().append(message, delivery_tag)
        else:  # in the order of their arrival, in which kombu gives them back
            virtual.QoS.append(self, message, delivery_tag)
            self.channel.keep(*answer)
        self.has_noted(delivery_tag)
        self.channel.is_built = True

    def is_only_taken(self, delivery_tag: Any) -> bool:
        """Whether a message was taken and is not delivered yet."""
        return self._delivered.get(delivery_tag, self) is None

    def add_taken(self, delivery_tag: Any) -> None:
        """Count a message from now on; closing the channel gives it back."""
        self._delivered[delivery_tag] = None
        self.has_noted(delivery_tag)

    def forget_taken(self, delivery_tag: Any) -> None:
        """It has gone another way."""
        if self.is_only_taken(delivery_tag):
            del self._delivered[delivery_tag]

    @property
    def room(self) -> int:
        """How many messages may come in."""
        if "can_consume" in vars(self):  # --disable-prefetch: Celery looks anew at each message
            return 0
        most = self.can_consume_max_estimate()
        return MOST_MESSAGES if most is None else min(MOST_MESSAGES, most)

    def ack(self, delivery_tag: Any) -> None:
        """Acknowledge with the others of this turn; at once when no turn will come, for nothing is consumed."""
        self._acks.append(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)
        if len(self._acks) >= MOST_ACKS or not self.channel.active_queues:
            self.send_acks()

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """Give back to the queue, at once, or drop as if acknowledged."""
        if requeue:
            super().reject(delivery_tag, requeue=True)
        else:
            self.ack(delivery_tag)

    def send_acks(self, again: bool = False) -> None:
        """Tell Redis which messages are done with; nothing is raised, as for kombu's `ack_log_error`.

        Args:
            again: also when Redis has just refused.
        """
        while self._acks and (again or time.monotonic() >= self._ack_at):
            tags = self.next_acks()
            try:
                # No transaction: a full server takes none. A tag in the index alone is cleared by whoever restores it.
                with self.channel.plain_client.pipeline(transaction=False) as pipe:
                    pipe.hdel(self.channel.prefixed(self.unacked_key), *tags)
                    pipe.zrem(self.channel.prefixed(self.unacked_index_key), *tags)
                    pipe.execute()
            except ResponseError as error:  # it is there and does not want to, as in the middle of a failover
                logger.error("Redis refused %d acknowledgements: %r; they are sent again", len(tags), error)
                self.ack_again(tags)
                return
            except Exception as error:  # the connection is gone: the broker will deliver the messages again
                logger.critical("Couldn't ack %d messages, reason:%r", len(tags), error, exc_info=True)
            except BaseException:  # this process is told to stop
                self.ack_again(tags)
                raise

    def next_acks(self) -> list[Any]:
        """Acknowledgements to be sent together, or `ack_again`."""
        tags: list[Any] = []
        with suppress(IndexError):  # a thread may do the same
            while len(tags) < MOST_ACKS:
                tags.append(self._acks.popleft())
        return tags

    def ack_again(self, tags: list[Any]) -> None:
        """They were not sent, or nobody knows whether they were."""
        self._acks.extendleft(reversed(tags))
        self._ack_at = time.monotonic() + ACK_AGAIN_S

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """At the end: what is acknowledged must be so in Redis before the rest is given back."""
        self.channel.forget_question()
        self.send_acks(again=True)
        super().restore_unacked_once(stderr)


class _Asked(NamedTuple):
    """A question Redis has not answered yet."""

    queues: list[str]
    room: int
    acks: list[Any]


class GroupedChannel(BoundedChannel):
    """Mixed into kombu's channel classes for Redis."""

    QoS = GroupedQoS
    _plain_client: Any = None
    _reads = False  # inside BRPOP's delivery, where further messages are welcome
    _refused_until = 0.0
    _more_waits = False  # the last question was answered in full
    _asked: Any = None
    is_built = False  # the text being delivered has become a message

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._taken: deque[tuple[str, str, bytes]] = deque()  # queue, delivery tag, text
        self._without_ack: set[str] = set()  # queues
        super().__init__(*args, **kwargs)
        self._take = redis.Redis().register_script(_TAKE)
        self.renew_script = redis.Redis().register_script(RENEW)

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
        return super().basic_consume(queue, no_ack, *args, **kwargs)  # type: ignore[misc]

    def _basic_cancel(self, consumer_tag: str) -> Any:
        ret = super()._basic_cancel(consumer_tag)  # type: ignore[misc]
        if not self.active_queues:  # type: ignore[attr-defined]
            if self._asked is not None and self._in_poll:
                self._brpop_read()  # what was taken meanwhile goes back now: closing may be an hour away
            if isinstance(self._qos, GroupedQoS):  # type: ignore[attr-defined]
                self._qos.send_acks()  # type: ignore[attr-defined]
        return ret

    def _brpop_start(self, timeout: Any = None) -> None:
        """Ask for messages; the answer is read when it is there. More are known to wait: no need to wait with BRPOP."""
        self.forget_question()
        room = self.qos.room if self._more_waits and self._may_take() else 0  # type: ignore[attr-defined]
        self._more_waits = False
        if room <= 0:
            super()._brpop_start(timeout)  # type: ignore[misc]
            return
        connection = self.client.connection  # type: ignore[attr-defined]
        self._in_poll, self._brpop_sent_at = connection, time.monotonic()
        keys, arguments, queues = self._question(room)
        self._asked = _Asked(queues, room, self.qos.next_acks())  # type: ignore[attr-defined]
        connection.send_command("EVALSHA", self._take.sha, len(keys), *keys, *arguments, *self._asked.acks)

    def _brpop_read(self, **options: Any) -> Any:
        self._reads, self.is_built = True, False
        try:
            return super()._brpop_read(**options) if self._asked is None else self._read_answer()  # type: ignore[misc]
        except UNREADABLE as error:
            drop_unreadable(error, self.is_built)
            return True
        finally:
            self._reads = False
            self.forget_body()
            self._deliver_taken()

    def _read_answer(self) -> bool:
        """Read what Redis answers to the question of `_brpop_start`."""
        asked: _Asked = self._asked
        connection = self.client.connection  # type: ignore[attr-defined]
        try:
            taken = self.client.parse_response(connection, "EVALSHA")  # type: ignore[attr-defined]
        except NoScriptError:
            self.plain_client.script_load(_TAKE)
        except ResponseError as error:
            self._refused(error)
        except BaseException:
            connection.disconnect()  # as kombu does: the next turn connects again, or the worker does
            raise
        else:
            self._asked = None
            self.keep(taken, asked.queues, asked.room)
        finally:
            self.forget_question()
            self._in_poll = None
            self._flush_brpop_reauth()  # type: ignore[attr-defined]
        return True

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
            type(cycle) in (round_robin_cycle, priority_cycle, sorted_cycle)
            and time.monotonic() >= self._refused_until
            and self._without_ack.isdisjoint(self.active_queues)  # type: ignore[attr-defined]
        )

    def _refused(self, error: ResponseError) -> None:
        logger.warning("Redis refused a script: %r; messages are taken one by one for a while", error)
        self._refused_until = time.monotonic() + REFUSED_PAUSE_S

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
        return keys, [time.time(), len(queues), rotates, count, MOST_BYTES, LARGEST_BYTES, tag, text], queues

    def keep(self, taken: list[Any], queues: list[str], count: int) -> None:
        """What the script has taken is to be delivered."""
        for number, tag, raw in zip(*[iter(taken)] * 3, strict=True):
            queue = queues[number - 1]
            self._queue_cycle.rotate(queue)  # type: ignore[attr-defined]
            self._taken.append((queue, tag.decode(), raw))
            self.qos.add_taken(tag.decode())  # type: ignore[attr-defined]
        self._more_waits = len(taken) == 3 * count > 0

    def _deliver_taken(self) -> None:
        """Deliver what was taken. Should that fail, the rest goes back to its queues when the channel is closed."""
        qos = self.qos  # type: ignore[attr-defined]
        while self._taken:
            queue, tag, raw = self._taken.popleft()
            self.is_built = False
            try:
                self.connection._deliver(loads(bytes_to_str(self.without_body(raw))), queue)  # type: ignore[attr-defined]
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
        super().on_poll_start()
        for channel in self._channels:
            if isinstance(channel._qos, GroupedQoS):
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
