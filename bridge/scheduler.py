"""Which task runs where, when, with whom: a pure state machine. No clock, no threads, no Ray, no Celery.

Events go in through `handle`, each with the time it happened; instructions come out. The driver does what they say.

Pacing: a task that finds its actor idle and is alone in hand leaves at once, unless tasks come in a stream. Otherwise
calls are shared: at most `calls_outstanding` per actor, and while the waiting work is tiny the next call leaves
`call_gap_s` after the last one. Nothing is sent behind a call that is long or of unknown length: it would count as
started while it waits, and another actor may be free first. A call takes tasks in order while their estimated run time
stays under `call_budget_s`; a task that has never been seen travels alone.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

#: Weight of the newest run in the estimate of a task's run time.
_NEWEST = 0.2
#: Weight of the newest arrival in `_crowding`, and from where on arrivals count as a stream: under one, a task that
#: happens to find nothing else in hand still waits for company, or each would travel alone at a call's full price.
_NEWEST_ARRIVAL = 0.1
_CROWDED = 0.3
#: Events kept per scheduler for the text of an illegal transition.
_HISTORY = 64


# ---- events


class TaskWaiting(NamedTuple):
    """A task wants to run; `rank` orders the queue, smaller first. `alone`: it shares no call (it is a suspect)."""

    token: str
    name: str
    rank: int = 0
    alone: bool = False


class TaskFinished(NamedTuple):
    """A task of a call has its outcome; `run_s` is None when no body ran."""

    token: str
    run_s: float | None


class TaskCancelled(NamedTuple):
    """A task is no longer wanted."""

    token: str


class ActorReady(NamedTuple):
    """An actor is warm; `queue_s` is its own estimate of the work other drivers have given it."""

    actor: int
    queue_s: float = 0.0


class ActorLost(NamedTuple):
    """An actor takes no calls until it is ready again; its outstanding tasks finish or come back one by one."""

    actor: int


class Tick(NamedTuple):
    """The time a WakeAt asked for has come."""


Event = TaskWaiting | TaskFinished | TaskCancelled | ActorReady | ActorLost | Tick


# ---- instructions


class StartCall(NamedTuple):
    """Send these tasks to this actor in one call."""

    actor: int
    call: str
    tokens: tuple[str, ...]
    estimate_s: float


class Interrupt(NamedTuple):
    """Cancel a task that is in a call."""

    actor: int
    call: str
    token: str


class Drop(NamedTuple):
    """A task that was cancelled before it left; nothing runs of it."""

    token: str


class WakeAt(NamedTuple):
    """Send a Tick at this time; replaces earlier ones."""

    at: float


Instruction = StartCall | Interrupt | Drop | WakeAt


class BatchRule(NamedTuple):
    """How tasks of a vectorised body share a run."""

    max_size: int
    max_wait_s: float


class Rules(NamedTuple):
    """The settings the scheduler needs; seconds and counts."""

    call_budget_s: float
    call_gap_s: float
    call_tasks: int
    calls_outstanding: int


class IllegalTransition(Exception):
    """An event that cannot happen in the state the scheduler is in; the text tells the story so far."""


@dataclass(order=True, slots=True)
class _Waiting:
    rank: int
    order: int
    token: str = field(compare=False)
    name: str = field(compare=False)
    alone: bool = field(compare=False)
    since: float = field(compare=False)


@dataclass(slots=True)
class _Actor:
    ready: bool = False
    queue_s: float = 0.0
    calls: dict[str, set[str]] = field(default_factory=dict)  # call -> tokens not finished
    long_calls: set[str] = field(default_factory=set)  # those that reach the budget: nothing is sent behind them
    last_call_at: float = float("-inf")


class Scheduler:
    """See the module's docstring."""

    def __init__(self, rules: Rules, batches: dict[str, BatchRule]) -> None:
        self._rules = rules
        self._batches = batches
        self._queue: list[_Waiting] = []  # a heap
        self._waiting: dict[str, _Waiting] = {}
        self._actors: dict[int, _Actor] = {}
        self._running: dict[str, tuple[int, str, str]] = {}  # token -> actor, call, task name
        self._estimates: dict[str, float] = {}
        self._orders = itertools.count()
        self._calls = itertools.count(1)
        self._history: deque[tuple[float, Event]] = deque(maxlen=_HISTORY)
        self._wake_at: float | None = None
        self._crowding = 0.0  # share of recent tasks that came while others were in hand

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event; returns what to do, in order.

        Raises:
            IllegalTransition: the event contradicts the state; a bug in the caller.
        """
        self._history.append((now, event))
        instructions: list[Instruction] = []
        match event:
            case TaskWaiting():
                self._add(event, now)
            case TaskFinished(token, run_s):
                self._finish(token, run_s)
            case TaskCancelled(token):
                instructions += self._cancel(token)
            case ActorReady(actor, queue_s):
                known = self._actors.setdefault(actor, _Actor())
                known.ready, known.queue_s = True, queue_s
            case ActorLost(actor):
                self._actors.setdefault(actor, _Actor()).ready = False
            case Tick():
                self._wake_at = None
        return instructions + self._start_calls(now)

    # what a person and the worker want to know

    @property
    def waiting(self) -> int:
        """Tasks that have not left."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Tasks in calls."""
        return len(self._running)

    def estimate_s(self, name: str) -> float | None:
        """Estimated run time of one task of this name, None before the first."""
        return self._estimates.get(name)

    def waiting_since(self, before: float) -> list[str]:
        """Tokens of tasks that have waited since `before` or longer."""
        return [task.token for task in self._waiting.values() if task.since <= before]

    # events

    def _add(self, event: TaskWaiting, now: float) -> None:
        if event.token in self._waiting or event.token in self._running:
            raise self._illegal(event.token, "is in hand already")
        crowded = bool(self._waiting or self._running)
        self._crowding += _NEWEST_ARRIVAL * (crowded - self._crowding)
        task = _Waiting(event.rank, next(self._orders), event.token, event.name, event.alone, now)
        self._waiting[event.token] = task
        heapq.heappush(self._queue, task)

    def _finish(self, token: str, run_s: float | None) -> None:
        if token not in self._running:
            raise self._illegal(token, "finished without being in a call")
        actor, call, name = self._running.pop(token)
        left = self._actors[actor].calls[call]
        left.discard(token)
        if not left:
            del self._actors[actor].calls[call]
            self._actors[actor].long_calls.discard(call)
        if run_s is not None:
            known = self._estimates.get(name)
            self._estimates[name] = run_s if known is None else known + _NEWEST * (run_s - known)

    def _cancel(self, token: str) -> list[Instruction]:
        if self._waiting.pop(token, None) is not None:
            return [Drop(token)]  # its place in the heap is passed over later
        if token in self._running:
            actor, call, _ = self._running[token]
            return [Interrupt(actor, call, token)]
        return []  # it finished meanwhile

    # calls

    def _start_calls(self, now: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        while self._waiting:
            free = self._free_actors()
            if not free:
                break
            at = self._leave_at(free[0], now)
            if at > now:
                if self._wake_at is None or at < self._wake_at:
                    self._wake_at = at
                    instructions.append(WakeAt(at))
                break
            instructions.append(self._start_call(free[0], now))
        return instructions

    def _free_actors(self) -> list[int]:
        """Actors that may take a call, the one free first at the front."""
        limit = self._rules.calls_outstanding
        free = [
            (len(actor.calls), actor.queue_s, number)
            for number, actor in self._actors.items()
            if actor.ready and len(actor.calls) < limit and not actor.long_calls
        ]
        return [number for _, _, number in sorted(free)]

    def _leave_at(self, number: int, now: float) -> float:
        """When the next call to this actor should leave."""
        actor = self._actors[number]
        head = self._head()
        batch = self._batches.get(head.name)
        if batch is not None and not head.alone and not actor.calls:
            same = sum(1 for task in self._waiting.values() if task.name == head.name)
            if same >= batch.max_size or same < len(self._waiting):
                return now  # it is full, or the actor would stand idle although there is other work
            return head.since + batch.max_wait_s
        if not self._running and len(self._waiting) == 1 and self._crowding < _CROWDED:
            return now
        if self._waiting_s() >= self._rules.call_budget_s or len(self._waiting) >= self._rules.call_tasks:
            return now
        return actor.last_call_at + self._rules.call_gap_s

    def _waiting_s(self) -> float:
        """Estimated run time of what waits, counted up to the budget; a task never seen counts as the budget."""
        total = 0.0
        for task in self._waiting.values():
            total += self._estimates.get(task.name, self._rules.call_budget_s)
            if total >= self._rules.call_budget_s:
                break
        return total

    def _head(self) -> _Waiting:
        while self._queue[0].token not in self._waiting:
            heapq.heappop(self._queue)
        return self._queue[0]

    def _start_call(self, number: int, now: float) -> StartCall:
        actor = self._actors[number]
        tasks = self._take()
        call = str(next(self._calls))
        tokens = tuple(task.token for task in tasks)
        estimate_s = self._sum_estimates(tasks)
        actor.calls[call] = set(tokens)
        if estimate_s >= self._rules.call_budget_s:
            actor.long_calls.add(call)
        actor.last_call_at = now
        for task in tasks:
            self._running[task.token] = number, call, task.name
        return StartCall(number, call, tokens, estimate_s)

    def _take(self) -> list[_Waiting]:
        """The tasks of the next call: the head, and what may share the call with it."""
        head = self._pop()
        if head.alone:
            return [head]
        batch = self._batches.get(head.name)
        if batch is not None:
            return [head, *self._take_same(head.name, batch.max_size - 1)]
        taken, left_s = [head], self._rules.call_budget_s - self._estimates.get(head.name, self._rules.call_budget_s)
        while self._waiting and len(taken) < self._rules.call_tasks:
            task = self._head()
            estimate = self._estimates.get(task.name)
            if estimate is None or estimate > left_s or task.alone or task.name in self._batches:
                break
            left_s -= estimate
            taken.append(self._pop())
        return taken

    def _take_same(self, name: str, limit: int) -> list[_Waiting]:
        same = sorted(task for task in self._waiting.values() if task.name == name and not task.alone)[:limit]
        for task in same:
            del self._waiting[task.token]
        return same

    def _pop(self) -> _Waiting:
        task = self._head()
        heapq.heappop(self._queue)
        del self._waiting[task.token]
        return task

    def _sum_estimates(self, tasks: Iterable[_Waiting]) -> float:
        return sum(self._estimates.get(task.name, self._rules.call_budget_s) for task in tasks)

    def _illegal(self, token: str, what: str) -> IllegalTransition:
        story = [f"{at:.3f} {event}" for at, event in self._history if token in event]
        return IllegalTransition(f"task {token} {what}; its last events: {'; '.join(story)}")
