"""An actor's drivers and its end, with the clock in hand."""

import math
from types import SimpleNamespace

import pytest

from actors.actor import leases
from actors.actor.entries import Limits
from actors.actor.leases import Leases

LIMITS = Limits(
    inline_bytes=0, queued_tasks=1, reply_after_s=0.0, lease_s=10.0, keep_warm_s=100.0, grace_s=0.0, keep_idle_s=50.0
)
LEFT_S = 2 * leases.REPLY_LEAVES_S


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def actor(clock):
    """With one driver."""
    actor = Leases(LIMITS)
    actor.hear("one")
    actor.want("one", "release")
    return actor


def test_a_driver_that_is_heard_of_stays(actor, clock):
    clock.now += 9
    actor.hear("one")
    clock.now += 9
    assert not actor.expire(clock.now)
    clock.now += 2
    assert actor.expire(clock.now) == {"one"}
    assert "one" not in actor and not actor.releases()
    assert not actor.expire(clock.now), "it is gone once"


def test_a_superseded_driver_is_known_as_such_also_when_it_comes_back(actor):
    actor.supersede("one")
    assert "one" not in actor and not actor.releases()
    actor.hear("one")
    assert actor.is_superseded("one") and not actor.is_superseded("two")


def test_an_actor_stays_as_long_as_somebody_wants_it(actor, clock):
    clock.now += 99
    assert not actor.is_over()
    clock.now += 2
    assert actor.is_over()


def test_a_closing_actor_waits_for_each_driver_to_hear_of_it_and_for_the_word_to_leave(actor, clock):
    actor.hear("two")
    actor.drain()
    clock.now += LEFT_S
    actor.note_told("one")
    clock.now += LEFT_S
    assert not actor.is_over(), "the other one may send a call at any moment"
    actor.note_told("two")
    assert not actor.is_over(), "the word has not left"
    clock.now += LEFT_S
    assert actor.is_over()


def test_a_closing_actor_does_not_wait_for_a_driver_that_is_gone(actor, clock):
    actor.drain()
    clock.now += 11
    actor.expire(clock.now)
    assert actor.is_over()


def test_who_comes_while_it_closes_is_told_at_once_and_not_waited_for(actor, clock):
    actor.drain()
    actor.note_told("one")
    actor.drain()
    actor.hear("two")
    clock.now += LEFT_S
    assert actor.is_over()


def test_an_actor_that_ends_at_once_waits_for_its_last_reply_only(actor, clock):
    clock.now += LEFT_S
    actor.note_reply()
    actor.close()
    assert actor.is_closing and not actor.is_over()
    clock.now += LEFT_S
    assert actor.is_over()


@pytest.mark.parametrize(
    ("is_idle", "keep_idle_s", "closes"), [(True, 50.0, True), (False, 50.0, False), (True, math.inf, False)]
)
def test_an_idle_actor_closes_unless_it_always_stays(clock, is_idle, keep_idle_s, closes):
    actor = Leases(LIMITS._replace(keep_idle_s=keep_idle_s))
    clock.now += 49
    actor.drain_if_idle(is_idle)
    assert not actor.is_closing
    clock.now += 2
    actor.drain_if_idle(is_idle)
    assert actor.is_closing is closes
