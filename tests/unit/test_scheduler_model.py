"""The scheduler against a make-believe world, whatever happens in whatever order.

Every task ends exactly once; no actor has more calls than allowed; no call exceeds its limits; and nothing waits for
ever while an actor is free and time passes.
"""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bridge.driver.lines import TaskRule
from bridge.driver.orders import (
    ActorBusy,
    ActorLost,
    ActorReady,
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
from bridge.driver.scheduler import LEAD_S, Rules, Scheduler

BATCHES = {"batch": TaskRule(4, 0.05), "eager batch": TaskRule(3, 0.0)}
NAMES = ["tiny", "small", "long", "new", *BATCHES]
RUN_S = {"tiny": 0.0001, "small": 0.002, "long": 1.0, "new": None, "batch": 0.0005, "eager batch": 0.01}
ACTORS = 3


class World(RuleBasedStateMachine):
    """What driver and actors do: it obeys instructions and checks each of them."""

    @initialize(
        tasks=st.integers(1, 6),
        outstanding=st.integers(1, 3),
        gap_s=st.sampled_from([0.0, 0.004]),
        actors=st.booleans(),
    )
    def begin(self, tasks, outstanding, gap_s, actors):
        self.rules = Rules(0.005, gap_s, tasks, outstanding)
        self.scheduler = Scheduler(self.rules, BATCHES)
        self.now = 0.0
        self.made = 0
        self.names = {}  # token -> name
        self.waiting = {}  # token -> (name, alone, the actor it is pinned to)
        self.running = {}  # token -> (actor, call)
        self.calls = {}  # call -> (actor, tokens left)
        self.ended = set()
        self.long_calls = set()
        self.ends = {}  # call -> its end if it began at once
        self.ready = set()
        self.wake_at = None
        if actors:  # and it knows the short ones already: only those are sent behind one another
            self.become_ready(0, 0.0)
            for name in ("tiny", "small"):
                self.arrive(name, 0, False, None)
                self.end(f"t{self.made}", ran=True)

    # what happens

    @rule(
        name=st.sampled_from(NAMES),
        rank=st.integers(-1, 2),
        alone=st.sampled_from([False, False, False, True]),
        actor=st.sampled_from([None, None, *range(ACTORS)]),
    )
    def arrive(self, name, rank, alone, actor):
        self.made += 1
        token = f"t{self.made}"
        self.waiting[token] = name, alone, actor
        self.tell(TaskWaiting(token, name, rank, alone, actor))

    @rule(
        names=st.lists(st.sampled_from(NAMES), min_size=2, max_size=12), actor=st.sampled_from([None, *range(ACTORS)])
    )
    def burst(self, names, actor):
        for name in names:
            self.arrive(name, 0, False, actor)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ran=st.booleans())
    def finish(self, data, ran):
        token = data.draw(st.sampled_from(sorted(self.running)))
        self.end(token, ran)

    @precondition(lambda self: self.waiting or self.running or self.ended)
    @rule(data=st.data())
    def cancel(self, data):
        known = sorted(self.waiting) + sorted(self.running) + sorted(self.ended)
        self.tell(TaskCancelled(data.draw(st.sampled_from(known))))

    @rule(actor=st.integers(0, ACTORS - 1), queue_s=st.sampled_from([0.0, 0.5]))
    def become_ready(self, actor, queue_s):
        self.ready.add(actor)
        self.tell(ActorReady(actor))
        self.tell(ActorBusy(actor, queue_s))

    @rule(actor=st.integers(0, ACTORS - 1), answers=st.booleans())
    def lose(self, actor, answers):
        self.ready.discard(actor)
        self.tell(ActorLost(actor))
        if answers:  # the driver says of each task that it is lost, and lets it wait again under a new token
            for token in [token for token, (where, _) in self.running.items() if where == actor]:
                self.end(token, ran=False)

    @rule(actor=st.integers(0, ACTORS - 1))
    def lose_holdings(self, actor):
        """Its executor has ended, whether or not the driver has heard of the next one already."""
        self.tell(HoldingsLost(actor))
        assert not any(pin == actor for _, _, pin in self.waiting.values()), "one that is pinned to it waits on"

    @rule(seconds=st.sampled_from([0.0005, 0.002, 0.004, 0.06, 1.0]))
    def pass_time(self, seconds):
        end = self.now + seconds
        while self.wake_at is not None and self.wake_at <= end:
            self.now, self.wake_at = max(self.now, self.wake_at), None
            self.tell(Tick())
        self.now = max(self.now, end)

    @rule()
    def late_tick(self):
        """A Tick nobody asked for does no harm."""
        self.wake_at = None
        self.tell(Tick())

    # what it answers

    def end(self, token, ran):
        _, call = self.running.pop(token)
        assert token not in self.ended, "ended twice"
        self.ended.add(token)
        self.calls[call][1].discard(token)
        if not self.calls[call][1]:
            del self.calls[call]
        self.tell(TaskFinished(token, RUN_S[self.names[token]] if ran else None))

    def tell(self, event):
        if isinstance(event, TaskWaiting):
            self.names[event.token] = event.name
        cancelled = event.token if isinstance(event, TaskCancelled) else None
        for instruction in self.scheduler.handle(event, now=self.now):
            match instruction:
                case StartCall():
                    self.start(instruction)
                case Drop(token):
                    assert token == cancelled and token in self.waiting
                    del self.waiting[token]
                    self.ended.add(token)
                case HandBack(token):
                    assert isinstance(event, HoldingsLost)
                    _, _, pin = self.waiting.pop(token)
                    assert pin == event.actor
                    self.ended.add(token)
                case Interrupt(actor, call, token):
                    assert token == cancelled
                    assert self.running[token] == (actor, call)
                case WakeAt(at):
                    assert at > self.now, "a wake-up in the past would spin"
                    assert self.wake_at is None or at < self.wake_at
                    self.wake_at = at

    def start(self, call):
        assert call.actor in self.ready
        assert call.call not in self.calls
        assert call.tokens and len(set(call.tokens)) == len(call.tokens)
        tasks = [self.waiting.pop(token) for token in call.tokens]  # KeyError: it does not wait
        name, alone, pin = tasks[0]
        assert {each for _, _, each in tasks} <= {None, call.actor}, "a task is not where it is pinned"
        if name in BATCHES and not alone:
            assert {(name, pin)} == {(each, its) for each, _, its in tasks}
            assert len(tasks) <= BATCHES[name].max_size
        elif len(tasks) > 1:
            assert len(tasks) <= self.rules.call_tasks
            assert call.estimate_s <= self.rules.call_budget_s * 1.000001
            assert all(each not in BATCHES and each != "new" for each, _, _ in tasks)
        ahead = [each for each in self.long_calls & self.calls.keys() if self.calls[each][0] == call.actor]
        is_long = (self.scheduler.estimate_s(name) or 0.0) >= self.rules.call_budget_s
        for each in ahead:
            foreseen = is_long and self.now >= self.ends[each] - LEAD_S - 1e-9
            assert foreseen, "something is sent behind a long call that is not about to end"
        if call.estimate_s >= self.rules.call_budget_s:
            self.long_calls.add(call.call)
        self.ends[call.call] = self.now + call.estimate_s
        assert len(tasks) == 1 or not any(alone for _, alone, _ in tasks), "a suspect has company"
        self.calls[call.call] = call.actor, set(call.tokens)
        self.running |= dict.fromkeys(call.tokens, (call.actor, call.call))

    # what always holds

    @invariant()
    def counts_agree(self):
        if hasattr(self, "scheduler"):
            assert self.scheduler.waiting == len(self.waiting)
            assert self.scheduler.running == len(self.running)

    @invariant()
    def no_actor_has_too_many_calls(self):
        if hasattr(self, "calls"):
            for number in range(ACTORS):
                assert sum(actor == number for actor, _ in self.calls.values()) <= self.rules.calls_outstanding

    @invariant()
    def an_idle_actor_is_never_left_without_a_wake_up(self):
        """Nothing runs, something waits, somebody is ready: then a time is set."""
        if not hasattr(self, "scheduler") or self.running:
            return
        if any(self.ready if pin is None else pin in self.ready for _, _, pin in self.waiting.values()):
            assert self.wake_at is not None

    def teardown(self):
        """However it came to this: with an actor, time and answers, everything ends."""
        if not hasattr(self, "scheduler"):
            return
        for actor in range(ACTORS):
            self.become_ready(actor, 0.0)
        for _ in range(10_000):
            if not self.waiting and not self.running:
                break
            if self.running:
                self.end(sorted(self.running)[0], ran=True)
            else:
                assert self.wake_at is not None, f"{self.waiting} wait for ever"
                self.pass_time(self.wake_at - self.now)
        assert not self.waiting and not self.running
        assert len(self.ended) == self.made


World.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestScheduler = World.TestCase
