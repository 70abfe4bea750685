"""What waits in the scheduler: one line per task name, in fair order; and how long tasks run. Pure, as the scheduler.

Among lines whose heads have the same rank the one goes first that has had the fewest seconds so far, so that thousands
of tasks of one name do not hold up a few of another. What has waited `starve_after_s` goes before everything else.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

#: Weight of the newest run in the estimate of a task's run time.
_NEWEST = 0.2
#: A name's run time is foreseeable after this many runs whose deviation stays under this share of the estimate.
_STEADY_RUNS = 3
_STEADY = 0.2


class TaskRule(NamedTuple):
    """What the mark of a task says about where and with whom it runs."""

    max_size: int = 0  # a vectorised body takes so many; 0 for any other
    max_wait_s: float = 0.0  # it may wait so long for company while an actor is idle
    streams: int = 1  # so many bodies may be in flight on one device
    memory_bytes: int = 0  # that must be on the device
    accelerator: str = ""  # GPU type as Ray names it; "" takes any

    @property
    def together(self) -> int:
        """Tasks of this name that travel together, and then with no others; 0 for a task that shares calls freely."""
        return self.max_size or (self.streams if self.streams > 1 else 0)


ANY = TaskRule()


@dataclass(slots=True)
class Waiting:
    """A task that has not left."""

    token: str
    rank: int
    order: int
    since: float
    line: "Line"
    is_gone: bool = False  # it has left or was cancelled; lines pass over it


@dataclass(slots=True)
class Line:
    """The waiting tasks of one name; suspects, which run alone, and those pinned to an actor have their own."""

    name: str
    alone: bool
    rule: TaskRule
    actor: int | None = None  # the only one that may run them: it holds what they take
    count: int = 0
    served_at: float = float("-inf")  # when an actor that suits was last seen, by `Scheduler.stranded`
    _ranks: dict[int, deque[Waiting]] = field(default_factory=dict)

    def add(self, task: Waiting) -> None:
        """At the end of its rank."""
        self._ranks.setdefault(task.rank, deque()).append(task)
        self.count += 1

    def remove(self, task: Waiting) -> None:
        """It was cancelled, or has been taken."""
        task.is_gone = True
        self.count -= 1

    def head(self, starved_before: float) -> Waiting:
        """The next task of a line that is not empty: the first of the best rank, unless another has starved."""
        best: Waiting | None = None
        oldest: Waiting | None = None
        for rank in list(self._ranks):
            tasks = self._ranks[rank]
            while tasks and tasks[0].is_gone:
                tasks.popleft()
            if not tasks:
                del self._ranks[rank]
                continue
            first = tasks[0]
            if best is None or first.rank < best.rank:
                best = first
            if first.since <= starved_before and (oldest is None or first.order < oldest.order):
                oldest = first
        return oldest or best  # type: ignore[return-value]  # there is one, for the line is not empty

    def tasks(self) -> Iterator[Waiting]:
        """All of them, in no order."""
        return (task for tasks in self._ranks.values() for task in tasks if not task.is_gone)


class Lines:
    """All lines with something in them."""

    def __init__(self, rules: dict[str, TaskRule], starve_after_s: float) -> None:
        self._rules = rules
        self._starve_after_s = starve_after_s
        self._lines: dict[tuple[str, bool, int | None], Line] = {}
        self._waiting: dict[str, Waiting] = {}
        self._served_s: dict[str, float] = {}  # name -> seconds given to it, on a clock that runs with the least served
        self._clock_s = 0.0
        self._made = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, token: str) -> bool:
        return token in self._waiting

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines.values())

    def add(self, token: str, name: str, rank: int, alone: bool, now: float, actor: int | None = None) -> None:
        """A task wants to run, on that actor only if one is named."""
        key = name, alone, actor
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line(name, alone, self._rules.get(name, ANY), actor, served_at=now)
            # Who comes back after a pause has no claim on what others got meanwhile.
            self._served_s[name] = max(self._served_s.get(name, 0.0), self._clock_s)
        self._made += 1
        task = Waiting(token, rank, self._made, now, line)
        self._waiting[token] = task
        line.add(task)

    def cancel(self, token: str) -> bool:
        """Forget a task; False when it does not wait here."""
        task = self._waiting.get(token)
        if task is None:
            return False
        self._remove(task)
        return True

    def unpin(self, actor: int) -> list[str]:
        """Forget the tasks pinned to an actor; their tokens, in the order they came."""
        gone = [task for line in list(self) if line.actor == actor for task in line.tasks()]
        gone.sort(key=lambda task: task.order)
        for task in gone:
            self._remove(task)
        return [task.token for task in gone]

    def take(self, line: Line, now: float) -> Waiting:
        """The head of a line leaves."""
        task = line.head(now - self._starve_after_s)
        self._remove(task)
        return task

    def charge(self, name: str, seconds: float) -> None:
        """A name has been given run time; less than foreseen gives some back."""
        served = self._served_s.get(name, 0.0) + seconds
        self._served_s[name] = served
        self._clock_s = max(self._clock_s, min((self._served_s[line.name] for line in self), default=served))

    def in_order(self, now: float) -> list[Line]:
        """All lines, the one whose head goes first at the front."""
        if len(self._lines) == 1:
            return list(self._lines.values())
        return sorted(self._lines.values(), key=lambda line: self._place(line, now))

    def first(self, lines: Iterable[Line], now: float) -> Line | None:
        """The one of `lines` whose head goes first."""
        return min(lines, key=lambda line: self._place(line, now), default=None)

    def _place(self, line: Line, now: float) -> tuple[float, float, int]:
        head = line.head(now - self._starve_after_s)
        if head.since <= now - self._starve_after_s:
            return float("-inf"), 0.0, head.order
        return head.rank, self._served_s[line.name], head.order

    def _remove(self, task: Waiting) -> None:
        del self._waiting[task.token]
        task.line.remove(task)
        if not task.line.count:
            del self._lines[task.line.name, task.line.alone, task.line.actor]


class Estimates:
    """Run time per task name, from what bodies took; seconds."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[float, float, int]] = {}  # name -> mean, mean deviation, runs

    def add(self, name: str, run_s: float) -> None:
        """A body has run."""
        mean, deviation, runs = self._known.get(name, (run_s, 0.0, 0))
        deviation += _NEWEST * (abs(run_s - mean) - deviation)
        self._known[name] = mean + _NEWEST * (run_s - mean), deviation, runs + 1

    def of(self, name: str) -> float | None:
        """One task's run time; None before the first."""
        known = self._known.get(name)
        return None if known is None else known[0]

    def is_steady(self, name: str) -> bool:
        """Whether the next run will most likely take as long as the last ones."""
        mean, deviation, runs = self._known.get(name, (0.0, 0.0, 0))
        return runs >= _STEADY_RUNS and deviation <= _STEADY * mean
