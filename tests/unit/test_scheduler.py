"""The scheduler's rules one by one, with a clock the tests hold."""

import pytest

from bridge.driver.lines import TaskRule
from bridge.driver.orders import (
    ActorBusy,
    ActorLost,
    ActorReady,
    ActorShort,
    Drop,
    HandBack,
    HoldingsLost,
    Interrupt,
    StartCall,
    TaskCancelled,
    TaskFinished,
    TaskWaiting,
    Tick,
    WakeAt,
)
from bridge.driver.scheduler import LEAD_S, IllegalTransition, Rules, Scheduler

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
        return self.scheduler.handle(event, now=self.now)

    def wait(self, name="tiny", rank=0, alone=False, token=None, actor=None):
        self.tokens += 1
        return self.do(TaskWaiting(token or f"t{self.tokens}", name, rank, alone, actor))

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
    assert tokens(clock.finish("held")) == [("a", "c"), ("b",)]


def test_a_long_task_travels_alone():
    clock = Clock().knows("tiny", TINY_S).knows("long", LONG_S)
    clock.hold()
    for token, name in [("a", "tiny"), ("b", "long"), ("c", "tiny")]:
        clock.wait(name, token=token)
    assert tokens(clock.finish("held")) == [("a", "c"), ("b",)]


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
    assert tokens(clock.finish(*call.tokens, run_s=LONG_S)) == [("a",), ("b",)]


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
    for actor, queue_s in [(0, 2.0), (1, 0.5)]:
        clock.do(ActorReady(actor)), clock.do(ActorBusy(actor, queue_s))
    (call,) = clock.wait()
    assert (call.actor, call.waits_s) == (1, 0.5), "and the actor is told what was foreseen"


def test_a_call_says_how_long_it_expects_to_wait():
    clock = Clock(rules=RULES._replace(call_gap_s=0.0)).knows("tiny", TINY_S)
    assert [calls(clock.wait(token=token))[0].waits_s for token in "ab"] == [0.0, pytest.approx(TINY_S)]
    clock.do(ActorBusy(0, 3.0))
    clock.do(TaskFinished("a", TINY_S))
    (call,) = calls(clock.wait(token="c"))
    assert call.waits_s == pytest.approx(3.0), "behind the calls of other drivers"


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
    assert order == [("a", "d"), ("b",), ("c",)]


# ---- batches


def batches(**options):
    return {"many": TaskRule(**{"max_size": 4, "max_wait_s": 0.05, **options})}


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


def test_a_batch_waits_for_company_also_behind_a_call():
    clock = Clock(batches=batches(max_wait_s=0.05)).knows("tiny", TINY_S)
    clock.wait("tiny")
    began = clock.now
    assert clock.wait("many") == [WakeAt(began + 0.05)], "not at once, although its run time is unknown"
    clock.now += 0.001
    clock.wait("many")
    clock.now = began + 0.05
    assert [len(each) for each in tokens(clock.do(Tick()))] == [2]


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
    clock.now += RULES.call_gap_s
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
    stranded = [(each.token, each.since) for each in clock.scheduler.stranded(clock.now)]
    assert stranded == [("a", 100.0), ("b", 110.0)]
    clock.do(ActorReady(0))
    assert clock.scheduler.stranded(clock.now) == []


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


# ---- events that happen together


def test_tasks_that_arrive_together_share_a_call():
    clock = Clock().knows("tiny", TINY_S)
    burst = [TaskWaiting(token, "tiny") for token in "abc"]
    found = clock.scheduler.handle(*burst, now=clock.now)
    assert tokens(found) == [("a", "b", "c")]


def test_the_next_call_leaves_with_all_that_a_reply_has_freed():
    clock = Clock(rules=RULES._replace(calls_outstanding=1)).knows("tiny", TINY_S)
    clock.wait(token="a")
    clock.wait(token="b"), clock.wait(token="c")
    clock.now += 1
    assert tokens(clock.scheduler.handle(TaskFinished("a", TINY_S), ActorBusy(0, 0.0), now=clock.now)) == [("b", "c")]


# ---- long tasks one behind the other


def steady(name="long", run_s=LONG_S, **options):
    clock = Clock(**options)
    for _ in range(3):
        clock.knows(name, run_s)
    return clock


def test_the_next_long_task_leaves_just_before_the_foreseen_end_of_the_last():
    clock = steady()
    clock.wait("long")
    ends_at = clock.now + LONG_S
    clock.now += 0.1
    assert clock.wait("long", token="next") == [WakeAt(ends_at - LEAD_S)]
    clock.now = ends_at - LEAD_S
    assert tokens(clock.do(Tick())) == [("next",)]
    assert calls(clock.wait("long", token="third")) == [], "two are outstanding"


def test_no_long_task_is_sent_behind_one_that_takes_longer_than_foreseen():
    clock = steady()
    clock.wait("long")
    clock.now += LONG_S + 2 * LEAD_S
    assert clock.wait("long", token="next") == []


def test_no_long_task_is_sent_behind_one_whose_run_time_varies():
    clock = Clock()
    for run_s in (0.1, 2.0, 0.1, 2.0):
        clock.knows("long", run_s)
    clock.wait("long")
    assert clock.wait("long", token="next") == []


def test_a_short_task_is_never_sent_behind_a_long_one():
    clock = steady().knows("tiny", TINY_S)
    clock.wait("long")
    clock.now += LONG_S - LEAD_S / 2
    assert clock.wait("tiny", token="short") == []


def test_an_idle_actor_is_preferred_to_one_that_will_soon_be_free():
    clock = steady(actors=2)
    clock.wait("long")
    clock.now += LONG_S - LEAD_S / 2
    (call,) = calls(clock.wait("long", token="next"))
    assert call.actor == 1


def test_an_actor_whose_answer_is_overdue_gets_nothing_until_it_comes():
    """A short name that takes long once: what follows must not queue behind it."""
    clock = Clock(actors=2).knows("tiny", TINY_S)
    clock.wait(token="slow")
    clock.now += 0.1
    places = set()
    for number in range(6):
        (call,) = calls(clock.wait(token=f"next{number}"))
        places.add(call.actor)
        clock.finish(*call.tokens, run_s=TINY_S)
        clock.now += 0.1
    assert places == {1}
    clock.do(ActorLost(1))
    clock.do(ActorBusy(0, 0.0001))  # a reply without news: it is still busy with what should have ended long ago
    assert clock.wait(token="last") == []
    assert tokens(clock.finish("slow", run_s=2.0)) == [("last",)]


def test_long_and_short_tasks_mixed_leave_an_actor_to_the_short_ones():
    clock = steady(actors=2).knows("tiny", TINY_S)
    clock.wait("long")
    clock.now += 0.1
    ends = []
    for _ in range(5):
        (call,) = calls(clock.wait("tiny"))
        ends.append(call.actor)
        clock.finish(*call.tokens, run_s=TINY_S)
        clock.now += 0.01
    assert ends == [1] * 5


# ---- shares of idle actors


def test_work_is_shared_out_to_idle_actors():
    clock = Clock(actors=4, rules=RULES._replace(call_gap_s=0.0)).knows("small", 0.001)
    found = clock.scheduler.handle(*[TaskWaiting(f"s{n}", "small") for n in range(8)], now=clock.now)
    assert sorted(call.actor for call in calls(found)) == [0, 1, 2, 3]
    assert [len(call.tokens) for call in calls(found)] == [2, 2, 2, 2]


def test_what_is_tiny_is_not_shared_out():
    clock = Clock(actors=4).knows("tiny", TINY_S)
    found = clock.scheduler.handle(*[TaskWaiting(f"s{n}", "tiny") for n in range(8)], now=clock.now)
    assert tokens(found) == [tuple(f"s{n}" for n in range(8))]


# ---- what a task needs


def needs(**options):
    return {"picky": TaskRule(**options)}


def test_an_accelerator_is_waited_for():
    clock = Clock(batches=needs(accelerator="H100"), actors=0)
    clock.do(ActorReady(0, "A100"))
    assert clock.wait("picky", token="a") == []
    assert [each.token for each in clock.scheduler.stranded(clock.now)] == ["a"]
    (call,) = calls(clock.wait("other"))
    assert call.actor == 0, "others are not held up"
    (call,) = clock.do(ActorReady(1, "H100"))
    assert (call.actor, call.tokens) == (1, ("a",))


def test_memory_that_no_actor_has_is_waited_for_and_unknown_memory_is_tried():
    clock = Clock(batches=needs(memory_bytes=100), actors=0)
    clock.do(ActorReady(0, memory_bytes=99))
    assert clock.wait("picky", token="a") == []
    (call,) = clock.do(ActorReady(1, memory_bytes=100))
    assert call.actor == 1
    unknown = Clock(batches=needs(memory_bytes=100))
    assert calls(unknown.wait("picky"))


def test_an_actor_that_is_short_of_memory_for_a_name_is_asked_again_when_it_is_heard_of():
    clock = Clock(batches=needs(memory_bytes=100))
    (call,) = clock.wait("picky")
    short = ActorShort(0, "picky")
    assert clock.scheduler.handle(TaskFinished(*call.tokens, None), short, TaskWaiting("again", "picky"), now=101) == []
    assert calls(clock.wait("other")), "for others it has room"
    clock.finish("t2")
    clock.now += 1
    assert tokens(clock.do(ActorReady(0))) == [("again",)]


def test_tasks_for_streams_travel_together_and_with_no_others():
    clock = Clock(batches=needs(streams=3)).knows("picky", LONG_S).knows("tiny", TINY_S)
    clock.hold()
    for name in ["picky"] * 4 + ["tiny"]:
        clock.wait(name)
    found = tokens(clock.finish("held", run_s=LONG_S))
    while clock.scheduler.running:
        clock.now += 1
        found += tokens(clock.finish(next(iter(clock.scheduler._running)), run_s=LONG_S))
    assert sorted(map(len, found)) == [1, 1, 3]
    assert ("t8",) in found, "the tiny one"


def test_an_actor_whose_device_has_the_residents_is_preferred():
    clock = Clock(actors=3)
    clock.do(ActorReady(2, warm_for=frozenset({"model"})))
    (call,) = calls(clock.wait("model"))
    assert call.actor == 2
    clock.finish(*call.tokens, run_s=TINY_S)
    (call,) = calls(clock.wait("other"))
    assert call.actor == 0


def test_a_warm_actor_that_others_keep_busy_is_not_waited_for():
    clock = Clock(actors=2)
    clock.do(ActorReady(1, warm_for=frozenset({"model"})))
    clock.do(ActorBusy(1, 3.0))
    (call,) = calls(clock.wait("model"))
    assert call.actor == 0


# ---- fairness


def run_all(clock, seconds, run_s, until):
    """Serve one actor until `until` tokens have left or `seconds` have passed; (time, token) of each start."""
    started = []
    for token in list(clock.scheduler._running):
        clock.finish(token, run_s=run_s["held"])
    end = clock.now + seconds
    while clock.now < end and not until(started):
        for token in list(clock.scheduler._running):
            name = clock.scheduler._running[token][2]
            started.append((clock.now, token, name))
        running = [(token, clock.scheduler._running[token][2]) for token in clock.scheduler._running]
        clock.now += sum(run_s[name] for _, name in running) or RULES.call_gap_s
        clock.scheduler.handle(*[TaskFinished(token, run_s[name]) for token, name in running], Tick(), now=clock.now)
    return started


def test_names_get_equal_seconds_however_many_tasks_wait():
    clock = Clock().knows("a", 0.05).knows("b", 0.1)
    clock.hold()
    for number in range(200):
        clock.wait("a", token=f"a{number}")
    for number in range(50):
        clock.wait("b", token=f"b{number}")
    run_s = {"a": 0.05, "b": 0.1, "held": 0.1}
    started = run_all(clock, 4.0, run_s, lambda _: False)
    seconds = {name: sum(run_s[name] for _, _, each in started if each == name) for name in "ab"}
    assert seconds["a"] == pytest.approx(seconds["b"], rel=0.2)


def test_who_was_away_has_no_claim_on_what_others_got_meanwhile():
    clock = Clock().knows("a", 0.05).knows("b", 0.05)
    for _ in range(100):
        (call,) = calls(clock.wait("a"))
        clock.now += 0.05
        clock.finish(*call.tokens, run_s=0.05)
    clock.hold()
    for number in range(10):
        clock.wait("a", token=f"a{number}"), clock.wait("b", token=f"b{number}")
    started = run_all(clock, 10, {"a": 0.05, "b": 0.05, "held": 0.05}, lambda found: len(found) >= 10)
    assert 3 <= sum(name == "a" for _, _, name in started) <= 7


def test_nothing_starves_behind_better_priorities():
    """The bound: `starve_after_s`, and what had starved before it."""
    rules = RULES._replace(starve_after_s=1.0)
    clock = Clock(rules=rules).knows("long", 0.1)
    clock.hold()
    clock.wait("long", rank=9, token="patient")
    began, started = clock.now, []
    for token in list(clock.scheduler._running):
        clock.finish(token, run_s=0.1)
    for number in range(100):
        clock.wait("long", rank=0, token=f"urgent{number}a"), clock.wait("long", rank=0, token=f"urgent{number}b")
        running = list(clock.scheduler._running)
        started += running
        if "patient" in running:
            break
        clock.now += 0.1
        clock.scheduler.handle(*[TaskFinished(token, 0.1) for token in running], Tick(), now=clock.now)
    assert "patient" in started
    assert clock.now - began <= 1.0 + 3 * 0.1


# ---- pinned to the actor that holds what a task takes


def test_a_pinned_task_waits_for_its_actor_while_another_is_idle():
    clock = Clock(actors=2).knows("tiny", TINY_S)
    (held,) = calls(clock.wait("held", token="held", actor=1))
    assert held.actor == 1, "though the other had as little to do"
    clock.now += 1
    assert calls(clock.wait(token="pinned", actor=1)) == []
    (free,) = calls(clock.wait(token="free"))
    assert (free.actor, free.tokens) == (0, ("free",)), "one that is pinned holds up nobody"
    (call,) = calls(clock.finish("held"))
    assert (call.actor, call.tokens) == (1, ("pinned",))


def test_a_pinned_task_shares_its_actors_calls():
    clock = Clock(actors=2).knows("tiny", TINY_S)
    clock.do(ActorLost(0))
    clock.hold()
    clock.wait(token="a", actor=1), clock.wait(token="elsewhere", actor=0), clock.wait(token="b")
    assert tokens(clock.finish("held")) == [("a", "b")]
    assert tokens(clock.do(ActorReady(0))) == [("elsewhere",)]


def test_a_batch_takes_only_tasks_with_the_same_pin():
    clock = Clock(batches={"batch": TaskRule(8, 0.0)}, actors=1)
    clock.hold()
    for token, actor in [("a", 0), ("b", None), ("c", 0), ("d", None)]:
        clock.wait("batch", token=token, actor=actor)
    assert sorted(tokens(clock.finish("held"))) == [("a", "c")]
    assert tokens(clock.finish("a", "c", run_s=TINY_S)) == [("b", "d")]


def test_a_pinned_task_that_has_starved_goes_first_on_its_actor():
    clock = Clock(rules=RULES._replace(starve_after_s=10.0), actors=2).knows("tiny", TINY_S)
    clock.wait("held", token="x", actor=0), clock.wait("held", token="held", actor=1)
    clock.wait("late", rank=5, token="pinned", actor=1)
    clock.now += 11
    clock.wait("urgent", rank=-1, token="urgent")
    assert tokens(clock.finish("held")) == [("pinned",)]


def test_tasks_pinned_to_an_actor_that_lost_what_it_held_are_handed_back_in_order():
    clock = Clock(actors=2)
    clock.hold(), clock.wait("held", token="x")
    (
        clock.wait("new", token="a", actor=0),
        clock.wait("tiny", token="b", actor=0),
        clock.wait("tiny", token="c", actor=1),
    )
    assert clock.do(ActorLost(0)) == [], "it may come back and hold it still"
    assert clock.do(HoldingsLost(0)) == [HandBack("a"), HandBack("b")]
    assert clock.scheduler.waiting == 1
    assert clock.do(TaskCancelled("a")) == []


def test_a_pinned_task_may_come_before_its_actor_is_known():
    clock = Clock(actors=1)
    assert calls(clock.wait(token="early", actor=7)) == []
    assert [each.token for each in clock.scheduler.stranded(clock.now)] == ["early"]
    assert clock.scheduler.wanted_by(clock.now + 60, 1.0) == set(), "more actors would not help"
    assert tokens(clock.do(ActorReady(7))) == [("early",)]
