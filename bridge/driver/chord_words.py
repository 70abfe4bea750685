"""In the driver: words to chords that a task of theirs has ended, said again when Redis could not hear them.

Celery's script counts a task once, however often it is told; Celery itself makes a failure of what Redis did not hear.
Words wait apart from results: one that is too large for a full Redis must not keep results away.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import redis

from bridge.driver.backends import patience, ping
from bridge.driver.tracing import TracedTask, Tracing
from bridge.driver.trouble import is_refusal
from bridge.driver.unstored import Backlog, GiveBack, Unstored


class _Word(Unstored):
    """A task whose tracer tells its chord that it has ended."""

    is_unsure = False  # one has had no answer: Redis may have heard it


class ChordWords:
    """Those of one backend that could not be said; used on the loop's thread."""

    def __init__(self, backend: Any, tracing: Tracing, give_back: GiveBack) -> None:
        self._tracing = tracing
        self._backlog: Backlog[_Word] = Backlog(backend, tracing, give_back)
        self.due_in_s, self.end = self._backlog.due_in_s, self._backlog.end

    @property
    def are_waiting(self) -> bool:
        """Whether there is any."""
        return bool(self._backlog.waiting)

    @property
    def trouble(self) -> str:
        """Why they wait, for people; "" while none does."""
        return self._backlog.trouble.text if self._backlog.waiting else ""

    def flush(self) -> None:
        """Let tracers try again, if Redis is there; those that have waited long enough, in any case."""
        backlog = self._backlog
        if not backlog.waiting or backlog.trouble.due_in_s:
            return
        error = ping(backlog.backend)  # asked once, so that not each has to find out
        if error is not None:
            backlog.trouble.begin(error)
        for word in [each for each in backlog.waiting if error is None or backlog.is_over(each)]:
            backlog.go_on(word, None)

    def patient(self, tell: Callable[..., Any]) -> Callable[..., Any]:
        """What stands in the place of a backend's `on_chord_part_return`; `tell` is Celery's."""

        @wraps(tell)
        def tell_in_the_end(request: Any, state: str, result: Any, *args: Any, **kwargs: Any) -> Any:
            task = self._tracing.running(request.id)
            if task is None:
                return tell(request, state, result, *args, **kwargs)
            return self._say(task, request, state, lambda: tell(request, state, result, *args, **kwargs))

        return tell_in_the_end

    def _say(self, task: TracedTask, request: Any, state: str, tell: Callable[[], Any]) -> Any:
        """Called in a tracer."""
        backlog, word = self._backlog, None
        while True:
            try:
                answer = tell()
                if word is None:
                    return answer
                claimed = self._claim(request.group) if word.is_unsure else None
                if claimed is None or not backlog.may_wait(word, claimed):
                    backlog.trouble.end()
                    return answer
            except Exception as error:
                if not backlog.is_trouble(error):
                    raise
                word = word or _Word(task, state, patience(backlog.backend.retry_policy))
                if is_refusal(error):  # Redis keeps as much memory for the connection as a large word took
                    backlog.backend.client.connection_pool.disconnect(inuse_connections=False)
                else:
                    word.is_unsure = True
                if not backlog.may_wait(word, error):
                    if backlog.holds_message(word):
                        backlog.leave(word, error)
                    raise
            backlog.wait(word)

    def _claim(self, group: str) -> Exception | None:
        """Who told a chord of its last task has claimed the body, and has not sent it yet.

        That may be a question of ours whose answer was lost: its claim expires, and the body is there to be claimed.
        """
        backend = self._backlog.backend
        claim = backend.client.get(backend.get_key_for_group(group, ".c"))
        if claim in (None, b"done"):
            return None
        return redis.ConnectionError("a chord's body is claimed, perhaps by a question whose answer was lost")
