"""In the executor: what came closed is read, inside the body's frame, and checked if the driver has left that to us."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from actors.batching import run_prepared
from actors.closed import Closed, ClosedList
from actors.data.arrays import Array, ArraySpec
from actors.data.numbers import array_of
from actors.errors import PayloadInvalid, problem
from actors.validation import checker, hints_of


class Reader:
    """Reads the closed arguments of one task.

    Args:
        task: its name.
        body: the innermost one.
    """

    def __init__(self, task: str, body: Callable[..., Any]) -> None:
        self._task = task
        self._body = body
        parameters = inspect.signature(body).parameters.values()
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._names = [each.name for each in parameters if each.kind in by_position]

    def reading(self, call: Callable[..., Any], checks: bool) -> Callable[..., Any]:
        """`call` with its arguments read first. It raises PayloadInvalid where one cannot be read or does not fit."""

        def read(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.read_all(args, kwargs, checks)
            return call(*args, **kwargs)

        return read

    def reading_items(self, run_items: Callable[..., Any], checks: Sequence[bool]) -> Callable[..., Any]:
        """The same for a vectorised body; an item that does not fit gets its error in its place.

        Args:
            checks: for each item; the driver has checked those of which nothing was closed.
        """

        def read(items: Sequence[tuple[Any, Any]]) -> list[Any]:
            return run_prepared(
                items,
                lambda number, pair: self.read_all(pair[0], pair[1], checks[number]),
                run_items,
                (PayloadInvalid,),
            )

        return read

    def read_all(self, args: Any, kwargs: Any, checks: bool) -> tuple[Any, Any]:
        """Arguments with the value in the place of each that is closed; `checks` them, too.

        Raises:
            PayloadInvalid: as `checker` says, or a number that Python takes for too long.
        """
        names = [*self._names[: len(args)], *(f"argument {n + 1}" for n in range(len(self._names), len(args)))]
        args = tuple(self._value(name, each, checks) for name, each in zip(names, args, strict=True))
        kwargs = {name: self._value(name, each, checks) for name, each in kwargs.items()}
        return self._check(args, kwargs) if checks else (args, kwargs)

    def _value(self, name: str, value: Any, checks: bool) -> Any:
        if not isinstance(value, Closed):
            return value
        spec = self._specs.get(name) if checks else None
        if spec is not None and isinstance(value, ClosedList):
            array = array_of(value.text, as_floats=spec.dtype is not None and spec.dtype[1] == "f")
            if array is not None:
                try:
                    return spec.from_list(array)
                except ValueError:
                    pass  # the check will say what is wrong with the list
        try:
            return value.opened()
        except ValueError as error:
            raise PayloadInvalid(self._task, [problem(name, str(error), "")]) from None

    @functools.cached_property
    def _specs(self) -> dict[str, ArraySpec]:
        return {name: spec for name, hint in hints_of(self._body).items() if (spec := _spec_of(hint)) is not None}

    @functools.cached_property
    def _check(self) -> Any:
        return checker(self._task, self._body)


def _spec_of(hint: Any) -> ArraySpec | None:
    if hint is Array:
        return ArraySpec()
    return next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, ArraySpec)), None)
