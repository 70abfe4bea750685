"""What is known of a task while its executor has it: what came, and what its body gave."""

from typing import Any, NamedTuple

from actors import closed, unopened
from actors.contract import LogLine, TaskCall
from actors.executor.release import LoadedTask


class Item(NamedTuple):
    """A task with its payload opened."""

    token: str
    args: Any
    kwargs: Any
    context: dict[str, Any]
    has_arrays: bool  # that are to be opened
    stays: bool  # who takes its result can take it from here
    is_closed: bool  # some argument
    checks: bool  # whether the driver has left that to us

    @classmethod
    def of(cls, task: TaskCall) -> "Item":
        """Open its payload; whatever pickle raises passes through."""
        unopened.forget_found()
        args, kwargs, context = closed.loads(task.payload, task.texts)
        has_arrays, is_closed = bool(unopened.take_found()), bool(task.texts)
        return cls(task.token, args, kwargs, context, has_arrays, task.stays, is_closed, task.checks)


class Result(NamedTuple):
    """What a run of a body gave: a value or an error, and what else came of it."""

    value: Any
    error: BaseException | None
    out_of_memory: bool
    run_s: float
    used: tuple[str, ...]  # names of residents
    logs: tuple[LogLine, ...] = ()
    wishes: bytes = b""

    def share(self, value: Any) -> "Result":
        """One item's part of a shared run; an exception that the body put in its place fails that item."""
        return self._replace(value=None, error=value) if isinstance(value, Exception) else self._replace(value=value)


def may_join(loaded: LoadedTask, first: TaskCall, task: TaskCall) -> bool:
    """Of the same name, and with the same limits on streams, where each body's time counts from its own start."""
    same_limits = task.soft_limit_s == first.soft_limit_s and task.hard_limit_s == first.hard_limit_s
    return task.name == first.name and (loaded.batch is not None or same_limits)
