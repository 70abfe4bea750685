"""What the scheduler hears of an actor that tells of itself."""

from actors.contract import ActorState, Health
from bridge.driver.orders import ActorLost, HoldingsLost
from bridge.driver.roster import Roster


def health(executor, state=ActorState.READY):
    fields = dict.fromkeys(Health._fields, 0)
    known = {"state": state, "device": {}, "node": "here", "accelerator": "", "share": 1.0, "executor": executor}
    return Health(**fields | known | {"reason": "", "warm_for": ()})


def lost(events):
    return [each for each in events if isinstance(each, HoldingsLost)]


def test_what_an_executor_held_is_lost_when_the_actor_has_another_one():
    roster = Roster("driver")
    assert lost(roster.change(1, health("a"), "")) == [], "tasks may wait for it since before it was heard of"
    assert lost(roster.change(1, health("a"), "")) == []
    events = roster.change(1, health("b"), "")
    assert events[0] == HoldingsLost(1), "before anything is started there"
    assert lost(roster.change(1, health("b"), "")) == []


def test_it_is_lost_with_an_actor_that_ends_starts_or_is_silent():
    for said in (health("a", ActorState.DRAINING), health("", ActorState.STARTING), None):
        roster = Roster("driver")
        roster.change(1, health("a"), "")
        assert lost(roster.change(1, said, "because")) == [HoldingsLost(1)]
        assert lost(roster.change(1, said, "because")) == [], "told once"
    roster.change(1, health("a"), "")
    assert roster.release(1) == [HoldingsLost(1), ActorLost(1)]


def test_an_actor_that_takes_no_calls_for_now_still_holds_it():
    roster = Roster("driver")
    roster.change(1, health("a"), "")
    assert roster.lose(1, "its queue is full") == [ActorLost(1)]
    assert lost(roster.change(1, health("a"), "")) == []
