"""Which executors an actor has, without processes; with real ones in test_executor.py and test_fencing.py."""

import time
from types import SimpleNamespace

import pytest

from actors.actor import children
from actors.actor.breaker import BreakerRules
from actors.actor.children import START_ATTEMPTS, Children
from actors.contract import STEP_DEVICE, ActorState, Config, NotStarted, Ready, Release


class Child:
    """An executor that starts when the test says so."""

    def __init__(self, config, in_ray):
        self.config, self.release = config, config.release
        self.started_at = self.step_since = time.monotonic()
        self.ready, self.failed, self.full, self.planned_end, self.step = None, None, "", "", "importing the app"
        self.process = SimpleNamespace(kill=lambda: None)

    def start(self, kind="cpu"):
        self.ready = Ready({"kind": kind}, 0.0)

    def kill(self, why):
        self.planned_end = why

    def reap(self):
        return "exit code 87"


@pytest.fixture
def actor(monkeypatch):
    monkeypatch.setattr(children, "Child", Child)
    monkeypatch.setattr(children, "BACKOFF_S", (0.0, 0.0))
    return Children(7, BreakerRules(faults=1, pauses_s=(600.0,)), None)


def supply(actor, *waiting, of_drivers=(), busy=None, is_closing=False):
    actor.supply(waiting, of_drivers, busy, is_closing)
    return sorted(child.release.id for child in actor)


def learn(actor, *releases, device="cpu"):
    for name in releases:
        actor.learn(Config(Release(name, "", "", (), "", (), (), ()), device, "", 0, 0, ""))


def test_the_release_of_the_last_hello_is_warmed_up_before_its_first_call(actor):
    learn(actor, "old", "new")
    assert supply(actor) == ["new"]
    assert actor.of("new").config.actor == 7 and not actor.ready("new")


def test_an_actor_that_ends_warms_nothing_up_and_serves_what_waits(actor):
    learn(actor, "old", "new")
    assert supply(actor, is_closing=True) == []
    assert supply(actor, "old", is_closing=True) == ["old"]


def test_who_has_a_call_or_is_waited_for_first_does_not_make_room(actor):
    learn(actor, "one", "two", "three")
    supply(actor, "one", "two")
    one, two = actor.of("one"), actor.of("two")
    supply(actor, "one", "three", busy=two)
    assert not one.planned_end and not two.planned_end
    supply(actor, "three", busy=one)
    assert not one.planned_end and two.planned_end == "retired"


def test_an_idle_release_of_a_living_driver_stays(actor, monkeypatch):
    monkeypatch.setattr(children, "RETIRE_AFTER_S", -1.0)
    learn(actor, "old", "new")
    supply(actor, "old")
    supply(actor, of_drivers=["old"])
    assert not actor.of("old").planned_end
    supply(actor)
    assert not actor.of("old").planned_end, "the new one is not warm"
    actor.of("new").start()
    supply(actor)
    assert actor.of("old").planned_end == "retired" and not actor.of("new").planned_end


def test_where_there_was_a_gpu_no_executor_takes_numpy(actor):
    learn(actor, "one", device="auto")
    supply(actor)
    first = actor.of("one")
    first.start("cuda")
    actor.heard(first)
    actor.bury(first)
    supply(actor)
    assert (first.config.device, actor.of("one").config.device) == ("auto", "cuda")


def test_a_start_is_tried_again_and_calls_are_told_in_the_end(actor):
    learn(actor, "one")
    for attempt in range(1, START_ATTEMPTS + 1):
        supply(actor)
        actor.of("one").failed = NotStarted("no licence", device=False)
        gone = actor.bury(actor.of("one"))
        assert actor.failed_starts("one") == attempt and not gone.fences
        assert gone.hopeless == ("no licence" if attempt == START_ATTEMPTS else None)
    assert actor.state("one") == (ActorState.FAILING, f"no licence (attempt {START_ATTEMPTS})")


def test_what_an_executor_said_before_the_fence_does_not_end_it(actor):
    learn(actor, "one", "two")
    supply(actor, "one")
    one = actor.of("one")
    one.start()
    actor.breaker.body_broke(frozenset("a"), "task", "how", True, time.monotonic())
    actor.end("fenced")
    actor.heard(one)
    assert actor.state("one")[0] is ActorState.FENCED and actor.probe_in_s() > 500


def test_a_fenced_gpu_has_no_executor_until_it_is_probed_and_then_one(actor):
    learn(actor, "one", "two")
    supply(actor)
    actor.of("two").step = STEP_DEVICE
    assert actor.bury(actor.of("two")).fences
    assert supply(actor, "one") == []
    actor.greet()  # it never started: a new driver may mean that it is repaired
    assert supply(actor, "one") == ["one"]
    actor.of("one").start()
    actor.heard(actor.of("one"))
    assert supply(actor, "one") == ["one", "two"] and actor.probe_in_s() is None


def test_only_one_executor_where_memory_has_room_for_one(actor):
    learn(actor, "one", "two")
    supply(actor, "one")
    actor.of("two").failed = NotStarted("no room", device=False, memory=True)
    assert not actor.bury(actor.of("two")).fences
    assert supply(actor, "one") == ["one"]


def test_a_full_executor_is_replaced_after_its_call(actor, capsys):
    learn(actor, "one")
    supply(actor)
    one = actor.of("one")
    actor.call_ended(one)
    assert not one.planned_end
    one.full = "25 % is left behind"
    actor.call_ended(one)
    assert one.planned_end == "recycled" and actor.recycled == 1
    assert "GPU actor 7" in capsys.readouterr().out
    actor.bury(one)
    assert one not in actor and actor.failed_starts("one") == 0
