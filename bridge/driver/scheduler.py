"""Which task runs where, when, with whom: a pure state machine. No clock, no threads, no Ray, no Celery.

Events go in through `handle`, with the time they happened; instructions come out. The driver does what they say.
`docs/scheduling.md` explains the rules to users; what waits is kept in `lines.py`. A task may be pinned to the
actor that holds what it takes: it runs there or, when that is lost, is handed back.

Pacing: a task that finds its actor idle and is alone in hand leaves at once, unless tasks come in a stream. Otherwise
calls are shared: at most `calls_outstanding` per actor, and while the waiting work is tiny the next call leaves
`call_gap_s` after the last one. Nothing is sent behind a call that is long or of unknown length: it would count as
started while it waits, and another actor may be free first. The exception: a long task may leave just before the
foreseen end of the long call ahead, so that the GPU does not wait for it. A call takes tasks while their estimated run
time stays under `call_budget_s`; a task that has never been seen travels alone.
"""

import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from bridge.driver.lines import ANY, Estimates, Line, Lines, TaskRule, Waiting
from bridge.driver.orders import (
    ActorBusy,
    ActorLost,
    ActorReady,
    ActorShort,
    Drop,
    Event,
    HandBack,
    HoldingsLost,
    Instruction,
    Interrupt,
    StartCall,
    TaskCancelled,
    TaskFinished,
    TaskWaiting,
    Tick,
    WakeAt,
)

#: Weight of the newest arrival in `_crowding`, and from where on arrivals count as a stream: under one, a task that
#: happens to find nothing else in hand still waits for company, or each would travel alone at a call's full price.
_NEWEST_ARRIVAL = 0.1
_CROWDED = 0.3
#: A long call leaves this long before the foreseen end of the one ahead, in seconds: what its way takes where the cores
#: are busy, 2 to 3 ms else. So long after that end the foresight was wrong, and nothing is sent any more.
LEAD_S = 0.015
#: An actor whose calls should have been answered this long ago gets no more until they are, in seconds.
OVERDUE_S = 0.05
#: Work is shared out to idle actors in pieces no smaller than this, in seconds: a call costs about as much.
_PIECE_S = 0.001
#: What sums of floats may differ by, in seconds.
_ROUNDING_S = 1e-9
#: Events kept per scheduler for the text of an illegal transition.
_HISTORY = 64


class Rules(NamedTuple):
    """The settings the scheduler needs; seconds and counts."""

    call_budget_s: float
    call_gap_s: float
    call_tasks: int
    calls_outstanding: int
    starve_after_s: float = math.inf


class Stranded(NamedTuple):
    """A task that no actor there is may run."""

    token: str
    name: str
    since: float  # it has waited, or nobody was there, since then


class IllegalTransition(Exception):
    """An event that cannot happen in the state the scheduler is in; the text tells the story so far."""


@dataclass(slots=True)
class _Call:
    left: set[str]  # tokens not finished
    estimate_s: float
    is_long: bool
    is_steady: bool  # it will most likely take what was estimated


#: What is known of an actor that has never been ready.
_NOTHING = ActorReady(-1)


@dataclass(slots=True)
class _Actor:
    ready: bool = False
    facts: ActorReady = _NOTHING
    short_for: set[str] = field(default_factory=set)
    free_at: float = -math.inf  # when what others have given it will be done
    calls: dict[str, _Call] = field(default_factory=dict)
    ends_at: float = -math.inf  # the foreseen end of `calls`
    last_call_at: float = -math.inf

    def suits(self, line: Line) -> bool:
        """Whether it has what the line's tasks need."""
        rule = line.rule
        if line.actor not in (None, self.facts.actor):
            return False
        if rule is ANY:
            return self.ready
        memory = self.facts.memory_bytes
        return (
            self.ready
            and rule.accelerator in ("", self.facts.accelerator)
            and (not memory or rule.memory_bytes <= memory)
        )

    @property
    def long_call(self) -> _Call | None:
        """The long call it has from us, if any."""
        return next((call for call in self.calls.values() if call.is_long), None)


class Scheduler:
    """See the module's docstring."""

    def __init__(self, rules: Rules, tasks: dict[str, TaskRule]) -> None:
        self._rules = rules
        self._lines = Lines(tasks, rules.starve_after_s)
        self._estimates = Estimates()
        self._actors: dict[int, _Actor] = {}
        self._running: dict[str, tuple[int, str, str, float]] = {}  # token -> actor, call, task name, seconds charged
        self._calls = itertools.count(1)
        self._history: deque[tuple[float, Event]] = deque(maxlen=_HISTORY)
        self._wake_at: float | None = None
        self._crowding = 0.0  # share of recent tasks that came while others were in hand

    def handle(self, *events: Event, now: float) -> list[Instruction]:
        """Take events that happened together; returns what to do, in order.

        Raises:
            IllegalTransition: an event contradicts the state; a bug in the caller.
        """
        instructions: list[Instruction] = []
        for event in events:
            self._history.append((now, event))
            instructions += self._take_in(event, now)
        return instructions + self._start_calls(now)

    # what a person and the worker want to know

    @property
    def waiting(self) -> int:
        """Tasks that have not left."""
        return len(self._lines)

    @property
    def running(self) -> int:
        """Tasks in calls."""
        return len(self._running)

    def estimate_s(self, name: str) -> float | None:
        """Estimated run time of one task of this name, None before the first."""
        return self._estimates.of(name)

    def stranded(self, now: float) -> list[Stranded]:
        """Waiting tasks that no ready actor suits; to be asked for every now and then."""
        found: list[Stranded] = []
        for line in self._lines:
            if any(actor.suits(line) for actor in self._actors.values()):
                line.served_at = now
            else:
                found += [Stranded(task.token, line.name, max(task.since, line.served_at)) for task in line.tasks()]
        return found

    def wanted_by(self, now: float, patience_s: float) -> set[str]:
        """Accelerators that tasks name who have waited longer than `patience_s`; "" for those that take any."""
        free = (line for line in self._lines if line.actor is None)  # no other actor helps one that is pinned
        heads = [(line, line.head(math.inf)) for line in free]  # the oldest of each
        return {line.rule.accelerator for line, head in heads if now - head.since > patience_s}

    # events

    def _take_in(self, event: Event, now: float) -> list[Instruction]:
        match event:
            case TaskWaiting():
                self._add(event, now)
            case TaskFinished(token, run_s):
                self._finish(token, run_s, now)
            case TaskCancelled(token):
                return self._cancel(token)
            case ActorReady(actor):
                known = self._actors.setdefault(actor, _Actor())
                known.ready, known.facts = True, event
                known.short_for.clear()
            case ActorBusy(actor, queue_s):
                self._actors[actor].free_at = now + queue_s
            case ActorShort(actor, name):
                self._actors[actor].short_for.add(name)
            case ActorLost(actor):
                self._actors.setdefault(actor, _Actor()).ready = False
            case HoldingsLost(actor):
                return [HandBack(token) for token in self._lines.unpin(actor)]
            case Tick():
                self._wake_at = None
        return []

    def _add(self, event: TaskWaiting, now: float) -> None:
        if event.token in self._lines or event.token in self._running:
            raise self._illegal(event.token, "is in hand already")
        crowded = bool(self._lines or self._running)
        self._crowding += _NEWEST_ARRIVAL * (crowded - self._crowding)
        self._lines.add(event.token, event.name, event.rank, event.alone, now, event.actor)

    def _finish(self, token: str, run_s: float | None, now: float) -> None:
        if token not in self._running:
            raise self._illegal(token, "finished without being in a call")
        number, call, name, charged_s = self._running.pop(token)
        actor = self._actors[number]
        left = actor.calls[call].left
        left.discard(token)
        if not left:
            del actor.calls[call]
            actor.ends_at = now + sum(each.estimate_s for each in actor.calls.values())
        if run_s is not None:
            self._estimates.add(name, run_s)
        self._lines.charge(name, (run_s or 0.0) - charged_s)

    def _cancel(self, token: str) -> list[Instruction]:
        if self._lines.cancel(token):
            return [Drop(token)]
        if token in self._running:
            actor, call, _, _ = self._running[token]
            return [Interrupt(actor, call, token)]
        return []  # it finished meanwhile

    # calls

    def _start_calls(self, now: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        while self._lines:
            wake_at = math.inf
            for line in self._lines.in_order(now):
                number, at = self._choose(line, now)
                if number is not None and at <= now:
                    instructions.append(self._start_call(number, line, now))
                    break
                wake_at = min(wake_at, at)
            else:
                if wake_at < (math.inf if self._wake_at is None else self._wake_at):
                    self._wake_at = wake_at
                    instructions.append(WakeAt(wake_at))
                break
        return instructions

    def _choose(self, line: Line, now: float) -> tuple[int | None, float]:
        """The actor for the line's next call, and when it may leave; without one, when to look again."""
        best: tuple[int, bool, int, float, int] | None = None
        look_at = math.inf
        for number, actor in self._actors.items():
            if not actor.suits(line) or line.name in actor.short_for:
                continue
            at = self._may_take_at(actor, line, now)
            if at > now:
                look_at = min(look_at, at)
                continue
            waits_s = max(0.0, actor.free_at - now)
            others = math.ceil(waits_s / self._rules.call_budget_s)  # what is nearly the same is the same
            # Whoever may take the call has little ahead of it; loading a resident would take longer.
            place = others, line.name not in actor.facts.warm_for, len(actor.calls), waits_s, number
            if best is None or place < best:
                best = place
        if best is None:
            return None, look_at
        return best[-1], self._leave_at(self._actors[best[-1]], line, now)

    def _may_take_at(self, actor: _Actor, line: Line, now: float) -> float:
        """From when on the actor may be given a call of this line; infinity: not before it answers."""
        if not actor.calls:
            return now
        ahead = actor.long_call
        if len(actor.calls) >= self._rules.calls_outstanding:
            return math.inf
        if now > actor.ends_at + OVERDUE_S:
            return math.inf  # something in it takes far longer than foreseen
        if ahead is None:
            return now
        is_long = (self._estimates.of(line.name) or 0.0) >= self._rules.call_budget_s
        if not ahead.is_steady or not is_long or now > actor.ends_at + LEAD_S:
            return math.inf
        return max(now, actor.ends_at - LEAD_S)

    def _leave_at(self, actor: _Actor, line: Line, now: float) -> float:
        """When the next call of this line should leave for this actor."""
        if line.rule.max_size and not line.alone:
            if line.count >= line.rule.max_size:
                return now
            full_at = line.head(math.inf).since + line.rule.max_wait_s
            if actor.calls:
                return max(full_at, actor.last_call_at + self._rules.call_gap_s)
            return full_at if line.count == len(self._lines) else now  # or it would stand idle, and there is other work
        if not self._running and len(self._lines) == 1 and self._crowding < _CROWDED:
            return now
        if self._waiting_s() >= self._rules.call_budget_s or len(self._lines) >= self._rules.call_tasks:
            return now
        return actor.last_call_at + self._rules.call_gap_s

    def _waiting_s(self) -> float:
        """Estimated run time of what waits; a task never seen counts as the budget."""
        return sum(line.count * self._seconds(line.name) for line in self._lines)

    def _seconds(self, name: str) -> float:
        known = self._estimates.of(name)
        return self._rules.call_budget_s if known is None else known

    def _start_call(self, number: int, line: Line, now: float) -> StartCall:
        actor = self._actors[number]
        name, tasks = line.name, self._take(actor, line, now)
        call = str(next(self._calls))
        tokens = tuple(task.token for task in tasks)
        seconds = [self._seconds(task.line.name) for task in tasks]
        estimate_s = sum(seconds)
        is_long = estimate_s >= self._rules.call_budget_s
        begins_at = max(now, actor.ends_at) if actor.calls else now
        waits_s = max(begins_at, actor.free_at) - now
        actor.ends_at = begins_at + estimate_s
        actor.calls[call] = _Call(set(tokens), estimate_s, is_long, self._estimates.is_steady(name))
        actor.last_call_at = now
        for task, each_s in zip(tasks, seconds, strict=True):
            self._running[task.token] = number, call, task.line.name, each_s
            self._lines.charge(task.line.name, each_s)
        return StartCall(number, call, tokens, estimate_s, waits_s)

    def _take(self, actor: _Actor, line: Line, now: float) -> list[Waiting]:
        """The tasks of the next call: the line's head, and what may share the call with it."""
        rule, name, share_s = line.rule, line.name, self._share_s()
        taken = [self._lines.take(line, now)]
        if line.alone:
            return taken
        if rule.together:
            taken += [self._lines.take(line, now) for _ in range(min(line.count, rule.together - 1))]
            return taken
        estimate = self._estimates.of(name)
        if estimate is None:
            return taken
        left_s = share_s - estimate
        while len(taken) < self._rules.call_tasks:
            mate = self._lines.first((each for each in self._lines if self._fits(each, actor, left_s)), now)
            if mate is None:
                break
            left_s -= self._seconds(mate.name)
            taken.append(self._lines.take(mate, now))
        return taken

    def _fits(self, line: Line, actor: _Actor, left_s: float) -> bool:
        """Whether the head of a line may join a call of short tasks."""
        estimate = self._estimates.of(line.name)
        return (
            estimate is not None
            and estimate <= left_s + _ROUNDING_S
            and not line.alone
            and not line.rule.together
            and actor.suits(line)
            and line.name not in actor.short_for
        )

    def _share_s(self) -> float:
        """Estimated run time one call may have: less than the budget while several actors have nothing to do."""
        budget_s = self._rules.call_budget_s
        idle = sum(actor.ready and not actor.calls for actor in self._actors.values())
        return budget_s if idle <= 1 else min(budget_s, max(_PIECE_S, self._waiting_s() / idle))

    def _illegal(self, token: str, what: str) -> IllegalTransition:
        story = [f"{at:.3f} {event}" for at, event in self._history if token in event]
        return IllegalTransition(f"task {token} {what}; its last events: {'; '.join(story)}")
