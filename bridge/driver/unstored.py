"""In the driver: what a result backend has not taken yet, and how long it may wait, without holding the loop.

What belongs to a task acknowledged late waits until it is taken or the worker ends, and the task's message then goes
back to the broker; that of an early one as long as Celery's retry policy of the backend says.
"""

import math
import time
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

import greenlet
from celery import states

from bridge.driver.tracing import TracedTask, Tracing
from bridge.driver.trouble import Trouble, is_refusal

#: Called with a task that has run and whose outcome cannot be stored before the worker ends, and with the error.
GiveBack = Callable[[TracedTask, Exception], None]


class Unstored:
    """Something of a task whose tracer waits until it is taken."""

    def __init__(self, task: TracedTask, state: str, patience_s: float) -> None:
        self.task, self.state = task, state
        self.waits_until = time.monotonic() + patience_s  # for a backend that does not take it


T = TypeVar("T", bound=Unstored)


class Backlog(Generic[T]):
    """What waits for one backend, of one kind, and what trouble the backend has with it."""

    def __init__(self, backend: Any, tracing: Tracing, give_back: GiveBack) -> None:
        self.backend = backend
        self.trouble = Trouble()
        self.waiting: list[T] = []
        self._tracing = tracing
        self._give_back = give_back
        self._ends = False

    def due_in_s(self) -> float:
        """Seconds until the backend may be asked about what waits; infinite when nothing does."""
        return self.trouble.due_in_s if self.waiting else math.inf

    def end(self) -> None:
        """The worker ends: from now on nothing waits for longer than Celery's retry policy says."""
        self._ends = True
        self.trouble.ask_now()

    def is_trouble(self, error: Exception) -> bool:
        """Whether it is the backend that is away or refuses, not something about what it was given."""
        is_away = isinstance(error, self.backend.connection_errors) and not isinstance(error, LookupError)
        return is_away or is_refusal(error)  # kombu 5.7 counts KeyError as a lost connection

    def may_wait(self, each: T, error: Exception) -> bool:
        """It was not taken, and its body has done its work: whether there is time for the backend to take it later."""
        if not self.is_trouble(error) or self.is_over(each):
            return False
        self.trouble.begin(error)
        return True

    def is_over(self, each: T) -> bool:
        """Whether it has waited for long enough."""
        is_held = self.holds_message(each) and not self._ends
        return not is_held and time.monotonic() >= each.waits_until

    def holds_message(self, each: T) -> bool:
        """Whether its task's message is still unacknowledged, and nothing but this says that the task has run."""
        return each.state != states.RETRY and self._tracing.is_late(each.task)

    def wait(self, each: T) -> Any:
        """Called in its tracer: give the loop back; what `go_on` answers."""
        self.waiting.append(each)
        try:
            return self._tracing.wait()
        finally:
            if each in self.waiting:  # the task is ended from outside meanwhile
                self.waiting.remove(each)

    def go_on(self, each: T, answer: Any) -> None:
        """Resume its tracer."""
        self._tracing.go_on(each.task, answer)

    def leave(self, each: T, error: Exception) -> NoReturn:
        """Called in its tracer: end it without an outcome."""
        self._give_back(each.task, error)
        raise greenlet.GreenletExit
