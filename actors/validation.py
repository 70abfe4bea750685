"""Arguments of a message against the task's signature, before any GPU is touched.

The signature's annotations are pydantic's: models, constrained types, plain types. What does not fit is
`PayloadInvalid` with field, reason and received type, never the value.
"""

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

from actors.errors import PayloadInvalid

#: Problems one error lists, at most: a wrong list of a million numbers must not make a million lines.
MAX_PROBLEMS = 10

#: Characters of one part of a field's path: it may be a key the sender made up.
MAX_FIELD = 100

Check = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def checker(task: str, body: Callable[..., Any]) -> Check:
    """A function from (args, kwargs) as sent to checked ones, for the body's signature.

    Args:
        task: the task's name, for the error.
        body: the innermost body, bound to its task when it is a method.

    Annotations pydantic cannot handle, such as `numpy.ndarray`, count as unannotated.

    Raises (the returned function):
        PayloadInvalid: missing, extra or wrong arguments.
    """
    adapter = _adapter(body)
    positional = [
        parameter.name
        for parameter in inspect.signature(body).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]

    def check(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            checked = adapter.validate_python(ArgsKwargs(tuple(args), dict(kwargs)))
        except ValidationError as error:
            raise PayloadInvalid(task, _problems(error, positional)) from None
        except RecursionError:
            problem = {"field": "(payload)", "reason": "nested too deeply", "received": "object"}
            raise PayloadInvalid(task, [problem]) from None
        return typing.cast(tuple[tuple[Any, ...], dict[str, Any]], checked)

    return check


def _adapter(body: Callable[..., Any]) -> TypeAdapter[Any]:
    """Validates a call and returns (args, kwargs): pydantic checks a stand-in with the body's signature."""
    signature = inspect.signature(body)
    hints = hints_of(body)
    usable = {name: hint for name, hint in hints.items() if name in signature.parameters and _is_usable(hint)}
    parameters = [
        parameter.replace(annotation=usable.get(parameter.name, Any)) for parameter in signature.parameters.values()
    ]

    def capture(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    capture.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters, return_annotation=Any
    )
    capture.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return TypeAdapter(typing.cast(Any, capture))


def hints_of(body: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a body, resolved; without those that cannot be."""
    function = body
    while isinstance(function, functools.partial):
        function = function.func
    if hasattr(function, "__signature__"):  # @batched has resolved its own
        return dict(function.__annotations__)
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # one annotation names what exists for type checkers only: keep the others
        return {name: hint for name in function.__annotations__ if (hint := _hint(function, name)) is not None}


def _hint(function: Any, name: str) -> Any:
    """One annotation of a function, resolved by itself; None when it cannot be."""

    def alone() -> None: ...

    alone.__annotations__ = {name: function.__annotations__[name]}
    alone.__module__ = function.__module__
    try:
        return typing.get_type_hints(alone, globalns=function.__globals__, include_extras=True)[name]
    except Exception:
        return None


def _is_usable(hint: Any) -> bool:
    try:
        TypeAdapter(hint, config=None if _has_own_config(hint) else ConfigDict(arbitrary_types_allowed=False))
    except (PydanticSchemaGenerationError, PydanticUserError):
        return False
    return True


def _has_own_config(hint: Any) -> bool:
    return isinstance(hint, type) and (hasattr(hint, "model_config") or hasattr(hint, "__pydantic_config__"))


def _reason(error: Any) -> str:
    """What is wrong, without the value; pydantic quotes the tag of a union."""
    if error["type"] == "union_tag_invalid":
        return f"Input tag does not match any of the expected tags: {error['ctx']['expected_tags']}"
    return str(error["msg"]).removeprefix("Value error, ")  # as where arguments are opened


def _field(location: tuple[int | str, ...], positional: list[str]) -> str:
    """A dotted path; pydantic names positional arguments by number, people by name."""
    first, *rest = location or ("(payload)",)
    if isinstance(first, int):
        first = positional[first] if first < len(positional) else f"argument {first + 1}"
    return ".".join(str(part)[:MAX_FIELD] for part in (first, *rest))


def _problems(error: ValidationError, positional: list[str]) -> list[dict[str, str]]:
    found = error.errors(include_url=False)
    problems = [
        {
            "field": _field(each["loc"], positional),
            "reason": _reason(each),
            "received": type(each["input"]).__name__ if not each["type"].startswith("missing") else "nothing",
        }
        for each in found[:MAX_PROBLEMS]
    ]
    if len(found) > MAX_PROBLEMS:
        more = str(len(found) - MAX_PROBLEMS)
        problems.append({"field": "(more)", "reason": f"{more} more problems", "received": "…"})
    return problems
