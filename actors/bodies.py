"""A task's body: where it sits under what Celery wraps around it.

Both ends use it: the driver puts its forward there, the executor takes the body from there. Around the body Celery may
have put autoretry (`task._orig_run`) and its pydantic wrapper (a closure over `task_fun`); around `run` a task class
may define `__call__`.
"""

import functools
from collections.abc import Callable
from typing import Any

from celery import Task

_PYDANTIC_CELL = "task_fun"  # the free variable of celery.app.base.pydantic_wrapper that holds the body


def innermost(task: Any) -> Callable[..., Any]:
    """The body as the user wrote it, bound to the task when it is a method of it."""
    run: Callable[..., Any] = _run_slot(task)
    cell = _pydantic_cell(run)
    if cell is None:
        return run
    body: Callable[..., Any] = cell.cell_contents
    return functools.partial(body, task) if _is_method(run) else body


def replace_innermost(task: Any, replacement: Callable[..., Any]) -> None:
    """Put `replacement` in the body's place, so that whatever Celery wraps around the body stays around it."""
    run = _run_slot(task)
    cell = _pydantic_cell(run)
    if cell is not None and _is_method(run):  # with bind=True the wrapper hands its `self` through
        cell.cell_contents = lambda _task, *args, **kwargs: replacement(*args, **kwargs)
    elif cell is not None:
        cell.cell_contents = replacement
    elif hasattr(task, "_orig_run"):
        task._orig_run = replacement
    else:
        task.run = replacement


def is_pydantic(task: Any) -> bool:
    """Whether the task was declared with Celery's ``pydantic=True``."""
    return _pydantic_cell(_run_slot(task)) is not None


def has_custom_call(task: Any) -> bool:
    """Whether the task's class defines ``__call__`` itself (the Flask pattern)."""
    for cls in type(task).__mro__:
        if cls is Task:
            return False
        if "__call__" in cls.__dict__:
            return True
    return False


def without_custom_call(task: Any) -> None:
    """Make ``__call__`` of this task Celery's own, in this process: the class's own one runs where the body runs."""
    cls = type(task)
    task.__class__ = type(cls.__name__, (cls,), {"__call__": Task.__call__, "__module__": cls.__module__})


def _run_slot(task: Any) -> Any:
    return getattr(task, "_orig_run", task.run)


def _is_method(run: Any) -> bool:
    return getattr(run, "__self__", None) is not None


def _pydantic_cell(run: Any) -> Any:
    function = getattr(run, "__func__", run)
    code = getattr(function, "__code__", None)
    if code is None or code.co_name != "wrapper" or _PYDANTIC_CELL not in code.co_freevars:
        return None
    return function.__closure__[code.co_freevars.index(_PYDANTIC_CELL)]
