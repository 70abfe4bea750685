"""The scheduler's rules one by one, with a clock the tests hold."""

import pytest

from bridge.scheduler import (
    ActorLost,
    ActorReady,
    BatchRule,
    Drop,
    IllegalTransition,
    Interrupt,
    Rules,
    Scheduler,
    StartCall,
    TaskCancelled,
    TaskFinished,
    TaskWaiting,
    Tick,
    WakeAt,
)

RULES = Rules(call_budget_s=0.005, call_gap_s=0.004, call_tasks=8, calls_outstanding=2)
TINY_S = 0.0001
LONG_S = 1.0


class Clock:
    """A scheduler and its clock: what a driver would do, without one."""

    def __init__(self, rules=RULES, batches=None, actors=1):
        self.scheduler = Scheduler(rules, batches or {})
        self.now = 100.0
        self.tokens = 0
        for actor in range(actors):
            self.do(ActorReady(actor))

    def do(self, event):
        return self.scheduler.handle(event, self.now)

    def wait(self, name="tiny", rank=0, alone=False, token=None):
        self.tokens += 1
        return self.do(TaskWaiting(token or f"t{self.tokens}", name, rank, alone))

    def finish(self, *tokens, run_s=None):
        return [each for token in tokens for each in self.do(TaskFinished(token, run_s))]

    def knows(self, name, run_s):
        """One task of this name has run before, long ago."""
        (call,) = self.wait(name)
        self.finish(*call.tokens, run_s=run_s)
        self.now += 1
        return self

    def hold(self):
        """Occupy the actor with a task that has never been seen: nothing is sent behind it."""
        self.wait("held", token="held")
        self.now += 1


def calls(instructions):
    return [each for each in instructions if isinstance(each, StartCall)]


def tokens(instructions):
    return [call.tokens for call in calls(instructions)]


# ---- pacing


def test_a_task_that_finds_its_actor_idle_and_is_alone_leaves_at_once():
    clock = Clock().knows("tiny", TINY_S)
    (first,) = clock.wait()
    assert isinstance(first, StartCall)
    clock.finish(*first.tokens, run_s=TINY_S)
    (second,) = clock.wait()  # at the same instant: the gap is for shared calls only
    assert isinstance(second, StartCall)


def test_without_a_ready_actor_tasks_wait():
    clock = Clock(actors=0)
    assert clock.wait() == []
    assert clock.scheduler.waiting == 1
    (call,) = clock.do(ActorReady(3))
    assert (call.actor, call.tokens) == (3, ("t1",))


def test_tiny_tasks_under_load_share_the_call_that_leaves_after_the_gap():
    clock = Clock().knows("tiny", TINY_S)
    clock.wait()
    left_at = clock.now
    clock.now += 0.001
    assert clock.wait() == [WakeAt(left_at + RULES.call_gap_s)]
    assert clock.wait() == []
    assert clock.wait() == []
    clock.now = left_at + RULES.call_gap_s
    (call,) = clock.do(Tick())
    assert len(call.tokens) == 3
    assert call.estimate_s == pytest.approx(3 * TINY_S)


def test_a_tick_that_comes_early_asks_for_another():
    clock = Clock().knows("tiny", TINY_S)
    clock.wait()
    (wake,) = clock.wait()
    assert clock.do(Tick()) == [wake]


def test_a_call_leaves_before_the_gap_when_its_budget_is_full():
    clock = Clock().knows("small", 0.002)
    clock.wait("small")
    assert calls(clock.wait("small")) == calls(clock.wait("small")) == []
    (call,) = clock.wait("small")
    assert len(call.tokens) == 2, "two fit into 5 ms, three do not"


def test_a_call_leaves_before_the_gap_when_it_has_all_its_tasks():
    clock = Clock().knows("tiny", TINY_S)
    clock.wait()
    found = [clock.wait() for _ in range(RULES.call_tasks)]
    assert [len(calls(each)) for each in found] == [0] * (RULES.call_tasks - 1) + [1]
    assert len(calls(found[-1])[0].tokens) == RULES.call_tasks


def test_tasks_never_seen_travel_alone_and_at_once():
    clock = Clock(actors=2)
    (first,), (second,) = clock.wait("new"), clock.wait("new")
    assert len(first.tokens) == len(second.tokens) == 1
    assert first.estimate_s == RULES.call_budget_s


def test_an_unknown_task_does_not_join_known_ones():
    clock = Clock().knows("tiny", TINY_S)
    clock.hold()
    clock.wait("tiny", token="a"), clock.wait("new", token="b"), clock.wait("tiny", token="c")
    assert tokens(clock.finish("held")) == [("a",), ("b",)]
    assert tokens(clock.finish("a", "b")) == [("c",)]


def test_a_long_task_travels_alone():
    clock = Clock().knows("tiny", TINY_S).knows("long", LONG_S)
    clock.hold()
    for token, name in [("a", "tiny"), ("b", "long"), ("c", "tiny")]:
        clock.wait(name, token=token)
    assert tokens(clock.finish("held")) == [("a",), ("b",)]
    clock.now += 1
    assert tokens(clock.finish("a", "b")) == [("c",)]


def test_a_long_task_waits_for_a_free_actor_instead_of_in_a_queue():
    clock = Clock(actors=2).knows("long", LONG_S)
    assert [calls(clock.wait("long"))[0].actor for _ in range(2)] == [0, 1]
    assert clock.wait("long", token="third") == []
    (call,) = calls(clock.finish("t3", run_s=LONG_S))
    assert (call.actor, call.tokens) == (1, ("third",))


@pytest.mark.parametrize("name", ["long", "new"])
def test_nothing_is_sent_behind_a_call_that_is_long_or_of_unknown_length(name):
    clock = Clock().knows("long", LONG_S).knows("tiny", TINY_S)
    (call,) = clock.wait(name)
    clock.now += 1
    assert calls(clock.wait("tiny", token="a")) == calls(clock.wait("long", token="b")) == []
    assert tokens(clock.finish(*call.tokens)) == [("a",), ("b",)]


def test_a_second_call_is_sent_behind_a_short_one():
    clock = Clock().knows("small", 0.002)
    clock.wait("small")
    clock.now += 0.001
    found = clock.wait("small") + clock.wait("small") + clock.wait("small")
    assert len(calls(found)) == 1
    assert len(clock.scheduler._actors[0].calls) == 2
    clock.now += 1
    assert calls(clock.wait("small")) == [], "two calls are outstanding"


def test_never_more_calls_than_allowed_are_outstanding():
    clock = Clock(actors=2)
    assert sum(len(calls(clock.wait("new"))) for _ in range(10)) <= 4
    assert clock.scheduler.running <= 4


def test_estimates_follow_what_is_measured():
    clock = Clock().knows("tiny", 1.0)
    assert clock.scheduler.estimate_s("tiny") == 1.0
    clock.knows("tiny", 2.0)
    assert clock.scheduler.estimate_s("tiny") == pytest.approx(1.2)
    clock.wait("tiny", token="cancelled")
    clock.finish("cancelled", run_s=None)
    assert clock.scheduler.estimate_s("tiny") == pytest.approx(1.2), "no body ran"
    assert clock.scheduler.estimate_s("other") is None


# ---- choice of actor


def test_a_free_actor_comes_before_one_that_has_calls():
    clock = Clock(actors=2)
    assert [calls(clock.wait("new"))[0].actor for _ in range(2)] == [0, 1]


def test_among_free_actors_the_one_with_the_shortest_queue_comes_first():
    clock = Clock(actors=0)
    clock.do(ActorReady(0, queue_s=2.0))
    clock.do(ActorReady(1, queue_s=0.5))
    (call,) = clock.wait()
    assert call.actor == 1


def test_a_lost_actor_takes_no_calls_until_it_is_ready_again():
    clock = Clock(actors=2)
    clock.do(ActorLost(0))
    (call,) = clock.wait("new")
    assert call.actor == 1
    clock.do(ActorLost(1))
    assert clock.wait("new") == []
    (call,) = clock.do(ActorReady(0))
    assert call.actor == 0


def test_tasks_of_a_lost_actor_come_back_one_by_one():
    clock = Clock(actors=2).knows("tiny", TINY_S)
    clock.wait(token="a")
    clock.do(ActorLost(0))
    assert clock.scheduler.running == 1
    clock.finish("a")
    (call,) = clock.wait(token="a.1")
    assert call.actor == 1


# ---- suspects


def test_suspects_share_no_call():
    clock = Clock().knows("tiny", TINY_S)
    clock.hold()
    for token, alone in [("a", False), ("b", True), ("c", True), ("d", False)]:
        clock.wait(token=token, alone=alone)
    order, running = [], ["held"]
    while running:
        clock.now += 1
        found = tokens(clock.finish(running.pop(0)))
        order += found
        running += [token for each in found for token in each]
    assert order == [("a",), ("b",), ("c",), ("d",)]


# ---- batches


def batches(**options):
    return {"many": BatchRule(**{"max_size": 4, "max_wait_s": 0.05, **options})}


def test_a_batch_waits_for_company_while_its_actor_is_idle():
    clock = Clock(batches=batches())
    assert clock.wait("many") == [WakeAt(100.05)]
    clock.now += 0.03
    assert clock.wait("many") == []
    clock.now = 100.05
    (call,) = clock.do(Tick())
    assert call.tokens == ("t1", "t2")


def test_a_full_batch_leaves_at_once():
    clock = Clock(batches=batches())
    found = [calls(clock.wait("many")) for _ in range(4)]
    assert [len(each) for each in found] == [0, 0, 0, 1]
    assert found[3][0].tokens == ("t1", "t2", "t3", "t4")


def test_a_batch_without_a_wait_leaves_at_once():
    clock = Clock(batches=batches(max_wait_s=0.0))
    (call,) = clock.wait("many")
    assert call.tokens == ("t1",)


def test_no_batch_is_larger_than_its_body_takes():
    clock = Clock(batches=batches(max_wait_s=0.0))
    clock.hold()
    for _ in range(10):
        clock.wait("many")
    clock.now += 1
    sizes = []
    while clock.scheduler.running:
        token = next(iter(clock.scheduler._running))
        sizes += [len(each) for each in tokens(clock.finish(token))]
    assert max(sizes) == 4
    assert sum(sizes) == 10


def test_a_batch_takes_no_other_task_with_it():
    clock = Clock(batches=batches(max_wait_s=0.0)).knows("tiny", TINY_S).knows("many", TINY_S)
    clock.hold()
    for token, name in [("a", "many"), ("b", "tiny"), ("c", "many"), ("d", "tiny")]:
        clock.wait(name, token=token)
    clock.now += 1
    assert tokens(clock.finish("held")) == [("a", "c")]
    clock.now += 1
    assert tokens(clock.do(Tick())) == [("b", "d")]


def test_a_suspect_of_a_batch_runs_alone_and_without_waiting():
    clock = Clock(batches=batches())
    (call,) = clock.wait("many", alone=True)
    assert call.tokens == ("t1",)


def test_a_batch_leaves_out_suspects_of_its_name():
    clock = Clock(batches=batches(max_wait_s=0.0)).knows("many", TINY_S)
    clock.hold()
    clock.wait("many", token="a"), clock.wait("many", token="b", alone=True), clock.wait("many", token="c")
    clock.now += 1
    assert tokens(clock.finish("held")) == [("a", "c")]


# ---- priorities


def test_smaller_ranks_leave_first_and_equal_ones_in_order():
    clock = Clock().knows("long", LONG_S)
    clock.hold()
    for token, rank in [("a", 5), ("b", 0), ("c", 9), ("d", 0), ("e", -1)]:
        clock.wait("long", rank, token=token)
    order, running = [], ["held"]
    while running:
        clock.now += 1
        started = [token for each in tokens(clock.finish(running.pop(0))) for token in each]
        order += started
        running += started
    assert order == ["e", "b", "d", "a", "c"]


def test_priority_counts_inside_a_batch():
    clock = Clock(batches=batches(max_size=2, max_wait_s=0.0))
    clock.hold()
    for token, rank in [("a", 5), ("b", 1), ("c", 0)]:
        clock.wait("many", rank, token=token)
    clock.now += 1
    assert tokens(clock.finish("held")) == [("c", "b")]


# ---- cancellation


def test_a_waiting_task_is_dropped():
    clock = Clock(actors=0)
    clock.wait(token="a"), clock.wait(token="b")
    assert clock.do(TaskCancelled("a")) == [Drop("a")]
    assert tokens(clock.do(ActorReady(0))) == [("b",)]


def test_a_running_task_is_interrupted_and_stays_until_it_has_finished():
    clock = Clock()
    (call,) = clock.wait(token="a")
    assert clock.do(TaskCancelled("a")) == [Interrupt(0, call.call, "a")]
    assert clock.scheduler.running == 1
    clock.finish("a")
    assert clock.scheduler.running == 0


def test_cancelling_what_is_finished_does_nothing():
    clock = Clock()
    clock.wait(token="a")
    clock.finish("a")
    assert clock.do(TaskCancelled("a")) == []
    assert clock.do(TaskCancelled("never seen")) == []


def test_a_task_that_waited_too_long_can_be_named():
    clock = Clock(actors=0)
    clock.wait(token="a")
    clock.now += 10
    clock.wait(token="b")
    assert clock.scheduler.waiting_since(clock.now - 5) == ["a"]
    assert set(clock.scheduler.waiting_since(clock.now)) == {"a", "b"}


# ---- what cannot happen


def test_a_task_that_is_in_hand_already_is_refused_with_its_story():
    clock = Clock()
    clock.wait(token="other")
    clock.wait("name", token="a")
    with pytest.raises(IllegalTransition) as caught:
        clock.wait(token="a")
    text = str(caught.value)
    assert "task a is in hand already" in text
    assert "name='name'" in text
    assert "'other'" not in text


def test_a_task_cannot_finish_before_it_left_nor_twice():
    clock = Clock(actors=0)
    clock.wait(token="a")
    with pytest.raises(IllegalTransition, match=r"task a finished without being in a call.*TaskWaiting"):
        clock.finish("a")
    clock.do(ActorReady(0))
    clock.finish("a")
    with pytest.raises(IllegalTransition):
        clock.finish("a")
    with pytest.raises(IllegalTransition):
        clock.finish("never seen")


def test_a_batch_does_not_wait_for_company_while_other_work_waits():
    clock = Clock(batches=batches(max_wait_s=10.0)).knows("tiny", TINY_S)
    assert not calls(clock.wait("many"))
    (batch,) = calls(clock.wait("tiny", token="other"))
    assert batch.tokens != ("other",), "the batch leaves at once, and the other work follows it"


def test_in_a_stream_a_task_that_is_alone_by_chance_waits_for_company():
    clock = Clock().knows("tiny", TINY_S)
    clock.hold()
    for number in range(20):
        clock.wait(token=f"stream {number}")
    left = calls(clock.finish("held"))
    while left or clock.scheduler.waiting:
        clock.now += RULES.call_gap_s
        left += calls(clock.do(Tick()))
        left += calls(clock.finish(*left.pop(0).tokens, run_s=TINY_S))
    clock.now += RULES.call_gap_s
    assert tokens(clock.wait(token="first")) == [("first",)], "the gap has passed since the last call"
    clock.finish("first", run_s=TINY_S)
    assert not calls(clock.wait(token="second")), "alone, but less than a gap after the first"
    clock.now += RULES.call_gap_s
    assert tokens(clock.do(Tick())) == [("second",)]
