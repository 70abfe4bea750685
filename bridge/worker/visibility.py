"""In the worker, on Redis: the messages it holds stay its own for as long as its event loop turns.

kombu notes with each unacknowledged message when it was delivered, and any worker gives back what was noted longer ago
than `visibility_timeout`. Here the worker that holds messages notes them anew, every third of that time, so a long task
is not delivered a second time while it runs, and a short time-out brings back soon what a dead worker held. All times
are those of Redis' clock.
"""

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.json import dumps
from redis.exceptions import RedisError, ResponseError

from bridge.errors import as_text
from bridge.worker.redis_clock import RedisClock, boot_s

logger = logging.getLogger(__name__)

#: Of a visibility time-out messages are noted anew this often, and what dead workers held is looked for.
TIMES_PER_TIMEOUT = 3
#: A shorter time-out, in seconds, leaves too little for one long turn of the event loop: the worker warns.
SHORTEST_S = 3.0
#: One script looks at this many messages at most.
MOST_TAGS = 1000
#: RabbitMQ closes the channel of a consumer that has not acknowledged for this long, in seconds, unless told otherwise.
RABBITMQ_TIMEOUT_S = 1800

# A message that was given back keeps its tag, so another worker may have noted it since, later than this one ever did.
RENEW = """
local lost = {}
for i = 2, #ARGV, 2 do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if score and tonumber(score) <= tonumber(ARGV[i + 1]) then
    redis.call('ZADD', KEYS[1], 'XX', ARGV[1], ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""


class RenewingQoS(stock.QoS):
    """Which messages are unacknowledged, and when this worker last noted them in Redis."""

    #: Of the broker: it may jump while this worker has no connection.
    clock = RedisClock()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._noted: dict[Any, float] = {}  # tag -> as Redis holds it
        self._renewed_at = boot_s()

    def append(self, message: Any, delivery_tag: Any) -> None:
        """Note a message as unacknowledged, as kombu does, which asks this host's clock."""
        info, now = message.delivery_info, self.clock.now()
        text = dumps([message._raw, info["exchange"], info["routing_key"]])
        with self.pipe_or_acquire() as pipe:
            pipe.zadd(self.unacked_index_key, {delivery_tag: now}).hset(self.unacked_key, delivery_tag, text).execute()
        virtual.QoS.append(self, message, delivery_tag)
        self.has_noted(delivery_tag, now)

    def has_noted(self, delivery_tag: Any, noted_at: float) -> None:
        """Redis holds a message as this worker's, noted with this time of its clock."""
        self._noted[delivery_tag] = noted_at

    def ack(self, delivery_tag: Any) -> None:
        """As kombu, and nothing of it stays here."""
        self.has_ended(delivery_tag)
        super().ack(delivery_tag)

    def has_ended(self, delivery_tag: Any) -> None:
        """A message is not to be renewed any more; the next renewal may be many thousand messages away."""
        self._noted.pop(delivery_tag, None)

    @property
    def renew_every_s(self) -> float:
        """Seconds between two renewals."""
        return max(0.1, float(self.visibility_timeout) / TIMES_PER_TIMEOUT)

    def renew(self) -> None:
        """Note anew all messages held, never one that is acknowledged. What others hold by now is let go, and said.

        Raises:
            RedisError, OSError: the connection is gone.
        """
        self._renewed_at = boot_s()
        now = self._ask_clock()
        acknowledged = set(self._dirty)
        held = [tag for tag in list(self._delivered) if tag not in acknowledged]
        noted = {tag: self._noted.get(tag, now) for tag in held}
        lost: list[Any] = []
        for start in range(0, len(held), MOST_TAGS):
            lost += self._ask(now, held[start : start + MOST_TAGS], noted)
        self._noted = dict.fromkeys(held, now)
        lost = [tag for tag in lost if tag not in self._dirty and self._delivered.get(tag) is not None]
        for tag in lost:
            virtual.QoS.ack(self, tag)  # not in Redis, where it is somebody else's
            self._noted.pop(tag, None)
        if lost:
            self.channel.connection.cycle.on_lost(lost)

    def _ask_clock(self) -> float:
        return self.clock.ask(self.channel.plain_client, float(self.visibility_timeout), self.renew_every_s)

    def _ask(self, now: float, tags: list[Any], noted: dict[Any, float]) -> list[Any]:
        """One question to Redis; the tags that are not this worker's any more, as far as Redis can tell."""
        key = self.channel.prefixed(self.unacked_index_key)
        arguments = [now, *(each for tag in tags for each in (tag, noted[tag]))]
        try:
            lost = self.channel.renew_script([key], arguments, client=self.channel.plain_client)
        except ResponseError as error:  # no scripts here: nothing tells whose a tag is
            logger.debug("Redis refused a script: %s", as_text(error))
            self.channel.plain_client.zadd(key, dict.fromkeys(tags, now), xx=True)
            return []
        texts = {each.decode() for each in lost}
        return [tag for tag in tags if str(tag) in texts]

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """At the end all that is held goes back to its queue, but nothing that is somebody else's by now."""
        if self._delivered and boot_s() - self._renewed_at >= self.renew_every_s:
            with suppress(Exception):  # without a connection nothing can be given back either
                self.renew()
        super().restore_unacked_once(stderr)

    def restore_visible(self, start: int = 0, num: int | None = 10, interval: int = 10) -> None:
        """Give back what dead workers hold, as kombu does; own messages first, should this worker have slept."""
        if boot_s() - self._renewed_at >= self.renew_every_s:
            try:
                self.renew()
            except ResponseError as error:  # a full or read-only server
                logger.warning("messages in hand could not be renewed: %s; tried again soon", as_text(error))
                return
        self._vrestore_count += 1
        if (self._vrestore_count - 1) % (interval or 1):
            return
        now = self._ask_clock()
        with (
            suppress(stock.MutexHeld),
            self.channel.conn_or_acquire() as client,
            stock.Mutex(client, self.unacked_mutex_key, self.unacked_mutex_expire),
        ):
            self._bring_back_to(now, client)
            if self.clock.is_steady:
                key, ceil = self.unacked_index_key, now - float(self.visibility_timeout)
                for tag in client.zrange(key, ceil, 0, desc=True, byscore=True, offset=num and start, num=num):
                    self.restore_by_tag(tag, client)

    def _bring_back_to(self, now: float, client: Any) -> None:
        """What was noted by a clock that was ahead would be given back as much later: it counts from now."""
        key = self.unacked_index_key
        ahead = client.zrange(key, now + self.renew_every_s, "+inf", byscore=True, offset=0, num=MOST_TAGS)
        if ahead:
            client.zadd(key, dict.fromkeys(ahead, now), xx=True)


class RenewingPoller(stock.MultiChannelPoller):
    """All channels of the connection that tasks come from."""

    on_lost: Callable[[list[Any]], None]
    is_busy: Callable[[], bool]
    timer: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.on_lost, self.is_busy = log_lost, lambda: False
        self._overdue_at = math.inf
        self._every_s = math.inf

    def _on_connection_disconnect(self, connection: Any) -> None:
        """Forget its descriptor, which is closed and may be anybody's next: kombu does so only beside an event loop.

        Left in its table, it is taken from the poller when the consumer is at its limit: EBADF, or another's is gone.
        """
        super()._on_connection_disconnect(connection)
        sockets, channels = self._chan_to_sock, self._fd_to_chan  # type: ignore[has-type]
        gone = {(channel, kind) for channel, client, kind in sockets if client.connection is connection}
        self._chan_to_sock = {who: sock for who, sock in sockets.items() if (who[0], who[2]) not in gone}
        self._fd_to_chan = {fd: who for fd, who in channels.items() if who not in gone}

    def start_renewing(self, timer: Any, on_lost: Callable[[list[Any]], None], is_busy: Callable[[], bool]) -> None:
        """Renew on the worker's timer until the connection is closed.

        Args:
            timer: of the worker's event loop; one that stands still lets other workers have the messages.
            on_lost: called with the delivery tags that are somebody else's by now.
            is_busy: whether a task that is taken now would wait here.
        """
        self.on_lost, self.is_busy, self.timer = on_lost, is_busy, timer
        self._every_s = min((qos.renew_every_s for qos in self._renewing()), default=math.inf)
        if self._every_s < math.inf:
            self._tick()
            entry: Any = timer.call_repeatedly(self._every_s, lambda: self._tick() or entry.cancel())

    def renew_if_overdue(self) -> None:
        """Before a task starts: should this worker have slept, others may have what it holds."""
        if boot_s() >= self._overdue_at:
            self._tick()

    def _tick(self) -> bool:
        """Renew, then look for what dead workers held; False when the connection is closed."""
        self._overdue_at = boot_s() + 2 * self._every_s
        for channel in list(self._channels):
            if isinstance(channel._qos, RenewingQoS):
                try:
                    channel._qos.renew()
                    if channel.active_queues:
                        channel._qos.restore_visible(num=channel.unacked_restore_limit, interval=1)
                except (RedisError, OSError) as error:  # the event loop sees it, too, and connects again
                    logger.warning("messages in hand could not be renewed: %s; tried again soon", as_text(error))
        return bool(self._channels)

    def _renewing(self) -> Iterable[RenewingQoS]:
        return [channel.qos for channel in self._channels if isinstance(channel.qos, RenewingQoS)]


def log_lost(tags: list[Any]) -> None:
    """Messages that were held for longer than the visibility time-out without a sign of life."""
    logger.warning("%d messages are other workers' by now: this one was silent for too long", len(tags))


def cautions(app: Any, driver_type: str, visibility_timeout_s: float, limits_s: Iterable[float]) -> list[str]:
    """What a person should know at start, where a task may run a second time while the first run goes on.

    Args:
        app: the Celery app.
        driver_type: of the broker's transport, such as "redis".
        visibility_timeout_s: of its channel, if it has one.
        limits_s: hard time limits of the GPU tasks that have one, in seconds.
    """
    if driver_type == "amqp":
        if max(limits_s, default=0) > RABBITMQ_TIMEOUT_S:
            return [
                f"GPU tasks may run for longer than {RABBITMQ_TIMEOUT_S} s, RabbitMQ's usual consumer_timeout: "
                "with acks_late it then closes the connection and delivers them again; raise it on the server"
            ]
        return []
    soft_s = app.conf.worker_soft_shutdown_timeout or 0
    found = []
    if visibility_timeout_s < SHORTEST_S:
        found.append(
            f"visibility_timeout is {visibility_timeout_s:g} s: a worker whose event loop is busy for so long loses "
            f"its messages to others; set {SHORTEST_S:g} s or more"
        )
    if soft_s > visibility_timeout_s * (TIMES_PER_TIMEOUT - 1) / TIMES_PER_TIMEOUT:
        found.append(
            f"worker_soft_shutdown_timeout is {soft_s:g} s, in which nothing is renewed, and visibility_timeout only "
            f"{visibility_timeout_s:g} s: tasks that run during a soft shutdown may run twice; set it to twice as much"
        )
    return found
