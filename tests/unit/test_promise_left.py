"""What the tests of promises count as left in the broker: a check that counted nothing could not fail."""

import json
from types import SimpleNamespace

import pytest

from tests.apps.promise import OTHER_QUEUE, QUEUE
from tests.support.promise import left


def server(waiting, unacked):
    """A Redis with so many messages in the queue, and these texts (None: only in the index) unacknowledged."""
    client = SimpleNamespace(
        keys=lambda _pattern: [],
        llen=lambda _key: waiting,
        zrange=lambda *_: list(unacked),
        hmget=lambda _key, tags: [unacked[tag] for tag in tags],
    )
    return SimpleNamespace(client=client)


def noted(exchange, routing_key):
    return json.dumps([{"body": "x"}, exchange, routing_key]).encode()


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (noted("", QUEUE), 1),
        (noted(QUEUE, QUEUE), 1),
        (noted("", OTHER_QUEUE), 1),
        (None, 1),  # in the index alone: nobody would ever give it back
        (noted("", "another"), 0),
    ],
)
def test_what_is_unacknowledged_counts_by_its_queue(text, counts):
    assert left(server(3, {b"tag": text})) == (3, counts)


def test_nothing_left():
    assert left(server(0, {})) == (0, 0)
