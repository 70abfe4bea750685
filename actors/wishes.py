"""What a body asks of Celery while it runs on a GPU node: recorded here, granted by the driver.

GPU nodes need neither broker nor result backend. `self.retry` and `self.replace` end the body as they do in Celery;
`self.update_state`, `self.send_event` and `self.add_to_chord` let it go on. The driver grants each with the same
method of the real task.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from celery.exceptions import Ignore, Retry
from celery.utils.serialization import raise_with_context

from actors.exceptions import dumps

#: What a body puts on its request is for handlers; anything larger stays where it is, in bytes.
NEWS_BYTES = 65_536


class Wish(NamedTuple):
    """One call of a Celery method of the task: ``getattr(task, method)(*args, **kwargs)``."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Children(NamedTuple):
    """Results of tasks that the body has sent, as Celery's ``as_tuple`` writes them; they are the task's children."""

    results: tuple[Any, ...]


class RequestChanges(NamedTuple):
    """What the body has put on its request, for the task's handlers in the driver."""

    values: dict[str, Any]


class RetryWanted(Retry):
    """Ends a body that called ``self.retry()``; a subclass of Retry, so that bodies treat it as they treat Celery's."""


class ReplaceWanted(Ignore):
    """Ends a body that called ``self.replace()``."""


class Wishes:
    """Collects the wishes of the body that runs now; `tell` hands those on that the world is to see at once."""

    def __init__(self, tell: Callable[[bytes], None]) -> None:
        self._tell = tell
        self.reduce: Callable[[Any], Any] | None = None  # how arrays travel in what is wished; see `exceptions.dumps`
        self._wishes: list[Wish | Children | RequestChanges] = []

    def install(self, task: Any) -> None:
        """Give a task, in this process, methods that record instead of publishing or storing."""
        task.retry = lambda *args, **kwargs: self._retry(task, *args, **kwargs)
        task.replace = self._replace
        task.update_state = lambda *args, **kwargs: self._tell_now("update_state", args, kwargs)
        task.add_to_chord = lambda sig, lazy=False: self._add_to_chord(task, sig, lazy)
        task.send_event = lambda *args, **kwargs: self._tell_now("send_event", args, kwargs)

    def add_traces(self, request: Any, before: dict[str, Any]) -> None:
        """Record what a body has left on its request, which was `before`: tasks it has sent, attributes of its own."""
        if request._children:
            self._wishes.append(Children(tuple(child.as_tuple() for child in request._children)))
        changed = {name: value for name, value in vars(request).items() if _is_news(name, value, before)}
        if changed:
            self._wishes.append(RequestChanges(changed))

    def take(self) -> bytes:
        """The wishes recorded since the last take, pickled; empty when there are none."""
        if not self._wishes:
            return b""
        wishes, self._wishes = self._wishes, []
        return dumps(wishes, self.reduce)

    def _tell_now(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tell(dumps([Wish(method, args, kwargs)], self.reduce))

    def _record(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._wishes.append(Wish(method, args, kwargs))

    def _retry(
        self, task: Any, args: Any = None, kwargs: Any = None, exc: Any = None, throw: bool = True, **options: Any
    ) -> Any:
        if task.request.called_directly:  # by another body, as a function: Celery's own rule, too
            raise_with_context(exc or Retry("Task can be retried", None))
        limit = task.max_retries if options.get("max_retries") is None else options["max_retries"]
        if limit is not None and task.request.retries >= limit:  # Celery's own rule, so that the body sees its outcome
            if exc is not None:
                raise_with_context(exc)
            args, kwargs = args or task.request.args, kwargs or task.request.kwargs
            raise task.MaxRetriesExceededError(
                f"Can't retry {task.name}[{task.request.id}] args:{args} kwargs:{kwargs}",
                task_args=args, task_kwargs=kwargs,
            )  # fmt: skip
        self._record("retry", (args, kwargs), {"exc": exc, "throw": False, **options})
        when = options.get("eta") or options.get("countdown")
        wanted = RetryWanted(exc=exc, when=task.default_retry_delay if when is None else when)
        if throw:
            raise wanted
        return wanted

    def _add_to_chord(self, task: Any, sig: Any, lazy: bool) -> Any:
        if not task.request.chord:
            raise ValueError("Current task is not member of any chord")
        if lazy:  # the body will send it itself, from here, and the chord must know of it before
            return type(task).add_to_chord(task, sig, lazy=True)
        result = sig.freeze()  # names it, here and in the driver; the chord waits for this body, so also for the wish
        self._tell_now("add_to_chord", (sig,), {})
        return result

    def _replace(self, sig: Any) -> Any:
        self._record("replace", (sig,), {})
        raise ReplaceWanted("Replaced by new task")


def _is_news(name: str, value: Any, before: dict[str, Any]) -> bool:
    if name.startswith("_") or name in ("args", "kwargs") or (name in before and before[name] is value):
        return False
    try:
        return len(dumps(value)) <= NEWS_BYTES
    except Exception:
        return False
