"""`@batched`: a body that takes many tasks' arguments at once, while each producer still sends one.

The decorated function is what Celery registers and what a direct call runs: it takes one item. The executor finds the
original through `batch_of` and gives it the items of all tasks of that name in a call.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.contract import MAX_TASKS

_ATTRIBUTE = "__gpu_batch__"


@dataclass(frozen=True, slots=True)
class Batch:
    """A vectorised body and how many tasks may share one run of it."""

    body: Callable[..., Sequence[Any]]
    max_size: int
    max_wait_s: float


def batched(*, max_size: int = 64, max_wait_s: float = 0.0) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a body as vectorised: every parameter is a list with one element per task, and so is what it returns.

    Producers send one element: for ``def normalise(vectors: list[Vector]) -> list[Vector]`` they call
    ``normalise.delay(vector)``. A body may put an exception in an item's place to fail that item alone.

    Args:
        max_size: tasks in one run of the body, 1 to 4096.
        max_wait_s: seconds a task may wait for company while an actor is idle; 0 takes what is there.

    Raises:
        ValueError: an option out of bounds.
        TypeError: a parameter that is not annotated ``list[...]``, or a ``*args``/``**kwargs`` parameter.
    """
    if not 1 <= max_size <= MAX_TASKS:
        raise ValueError(f"batched: max_size must be 1 to {MAX_TASKS}, got {max_size}")
    if max_wait_s < 0:
        raise ValueError(f"batched: max_wait_s must be 0 or more seconds, got {max_wait_s}")

    def decorate(body: Callable[..., Sequence[Any]]) -> Callable[..., Any]:
        signature = _signature_of_one(body)

        @functools.wraps(body)
        def one(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            outcome = run_batch(Batch(body, max_size, max_wait_s), [(bound.args, bound.kwargs)])[0]
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        one.__signature__ = signature  # type: ignore[attr-defined]
        one.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        one.__annotations__["return"] = signature.return_annotation
        setattr(one, _ATTRIBUTE, Batch(body, max_size, max_wait_s))
        return one

    return decorate


def batch_of(body: Callable[..., Any]) -> Batch | None:
    """The vectorised form of a task's body, or None when it takes one task at a time."""
    return getattr(body, _ATTRIBUTE, None)


def run_batch(batch: Batch, items: Sequence[tuple[Sequence[Any], dict[str, Any]]]) -> list[Any]:
    """Run a vectorised body over `items`, a sequence of (args, kwargs); one result (or exception) per item, in order.

    Raises:
        TypeError: the body did not return one result per item.
    """
    signature = inspect.signature(batch.body)
    columns: dict[str, list[Any]] = {name: [] for name in signature.parameters}
    for args, kwargs in items:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            columns[name].append(value)
    results = batch.body(**columns)
    try:
        results = list(results)
    except TypeError:
        results = []
    if len(results) != len(items):
        raise TypeError(
            f"{batch.body.__qualname__} must return one result per item: {len(items)} items, {len(results)} results"
        )
    return results


def run_prepared(
    items: Sequence[Any], prepare: Callable[[int, Any], Any], run: Callable[[list[Any]], Sequence[Any]],
    errors: tuple[type[Exception], ...],
) -> list[Any]:  # fmt: skip
    """Prepare each item, given with its number, and run those that could be; one that cannot has its error as result.

    Only `errors` count as an item's own; whatever else is raised passes through.
    """
    results: list[Any] = [None] * len(items)
    good: list[tuple[int, Any]] = []
    for number, item in enumerate(items):
        try:
            good.append((number, prepare(number, item)))
        except errors as error:
            results[number] = error
    if good:
        for (number, _), value in zip(good, run([item for _, item in good]), strict=True):
            results[number] = value
    return results


def _signature_of_one(body: Callable[..., Any]) -> inspect.Signature:
    hints = typing.get_type_hints(body, include_extras=True)
    signature = inspect.signature(body)
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(
                f"batched: {body.__qualname__} may have neither *args nor **kwargs nor positional-only ones"
            )
        item = _item_type(hints.get(parameter.name))
        if item is None:
            raise TypeError(
                f"batched: annotate parameter {parameter.name!r} of {body.__qualname__} as list[...]; "
                "it receives one element per task"
            )
        parameters.append(parameter.replace(annotation=item, default=inspect.Parameter.empty))
    returned = _item_type(hints.get("return"))
    return signature.replace(parameters=parameters, return_annotation=Any if returned is None else returned)


def _item_type(hint: Any) -> Any:
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0]
    return None
