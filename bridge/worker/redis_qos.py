"""In the worker: which messages are unacknowledged on Redis; acknowledgements leave together.

redis_channel.py takes the messages, visibility.py keeps them this worker's.
"""

import logging
import time
from collections import deque
from contextlib import suppress
from typing import Any

from kombu.transport import virtual
from redis.exceptions import ResponseError

from bridge.errors import as_text
from bridge.worker.taking import MOST_MESSAGES
from bridge.worker.visibility import RenewingQoS

logger = logging.getLogger(__name__)

#: Acknowledgements leave in the middle of a turn when there are this many, and no more of them together.
MOST_ACKS = 500
#: After Redis has refused acknowledgements it is asked again after this long, in seconds.
ACK_AGAIN_S = 1.0


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
            self.has_noted(delivery_tag, self.channel.keep(*answer))
        self.channel.is_built = True

    def is_only_taken(self, delivery_tag: Any) -> bool:
        """Whether a message was taken and is not delivered yet."""
        return self._delivered.get(delivery_tag, self) is None

    def add_taken(self, delivery_tag: Any, noted_at: float) -> None:
        """Count a message from now on, noted in Redis with that time; closing the channel gives it back."""
        self._delivered[delivery_tag] = None
        self.has_noted(delivery_tag, noted_at)

    def forget_taken(self, delivery_tag: Any) -> None:
        """It has gone another way."""
        if self.is_only_taken(delivery_tag):
            del self._delivered[delivery_tag]

    @property
    def room(self) -> int:
        """How many messages may come in."""
        if "can_consume" in vars(self):  # --disable-prefetch: Celery looks anew at each message
            return 1
        most = self.can_consume_max_estimate()
        return MOST_MESSAGES if most is None else min(MOST_MESSAGES, most)

    def ack(self, delivery_tag: Any) -> None:
        """Acknowledge with the others of this turn; at once when no turn will come, for nothing is consumed."""
        self._acks.append(delivery_tag)
        self.has_ended(delivery_tag)
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
                logger.error("Redis refused %d acknowledgements: %s; they are sent again", len(tags), as_text(error))
                self.ack_again(tags)
                return
            except Exception as error:  # the connection is gone: the broker will deliver the messages again
                logger.critical("Couldn't ack %d messages, reason:%s", len(tags), as_text(error), exc_info=True)
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
        if tags:
            self._acks.extendleft(reversed(tags))
            self._ack_at = time.monotonic() + ACK_AGAIN_S

    def restore_unacked_once(self, stderr: Any = None) -> None:
        """At the end: what is acknowledged must be so in Redis before the rest is given back."""
        self.channel.forget_question()
        self.send_acks(again=True)
        super().restore_unacked_once(stderr)
