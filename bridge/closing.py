"""In the worker and the driver: which large JSON bodies stay closed, so that only the executor reads their arguments.

Everything in doubt is decoded as ever: other formats, what is not plain JSON, references and handles among the
arguments (the driver plans by them), and tasks of which something besides the body looks at the arguments.
"""

import inspect
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from celery import signals
from celery.app.trace import task_has_custom

from actors.bodies import is_pydantic
from actors.closed import Texts, split

#: Methods of a task that are given its arguments, in the worker or the driver.
_HOOKS = ("before_start", "on_success", "on_failure", "on_retry", "after_return")
#: Signals that carry arguments.
_SIGNALS = (signals.task_prerun, signals.task_postrun, signals.task_failure, signals.task_internal_error)
_REQUEST = "celery.worker.request:Request"
#: Serialisers that can write what is closed, should the task be sent again.
_SERIALIZERS = ("json", "pickle")
_OBJECT, _KIND = re.compile(rb"\{"), re.compile(rb'"kind"')
_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def close(message: Any, task: Any, limit: int) -> None:
    """Take a message's body apart without reading what is large in it, if that may be.

    Celery then finds the parts where it looks for the decoded body, and `texts_of` finds them for the driver.

    Args:
        message: kombu's, decompressed and not decoded yet.
        task: the GPU task that its headers name.
        limit: a body of no more bytes is decoded as ever.
    """
    body = message.body
    if not isinstance(body, bytes | str) or len(body) <= limit or not _is_json(message) or not may_stay_closed(task):
        return
    texts = split(body)
    if texts is not None and not any(map(_may_be_a_form, (*texts.args, *texts.kwargs.values()))):
        with suppress(ValueError):  # a number that Python takes for too long
            message._decoded_cache, message.texts = texts.values(), texts


def texts_of(message: Any) -> Texts | None:
    """The parts of a message whose body has stayed closed."""
    return getattr(message, "texts", None)


def _may_be_a_form(text: Any) -> bool:
    """Whether a reference, a handle or an envelope may be in it; for lists of numbers one byte is looked for."""
    view = memoryview(text)
    return bool(_OBJECT.search(view) and _KIND.search(view))


def _is_json(message: Any) -> bool:
    accepted = message.accept is None or message.content_type in message.accept
    encoding = (message.content_encoding or "utf-8").lower()
    return message.content_type == "application/json" and accepted and encoding == "utf-8" and not message.errors


def may_stay_closed(task: Any) -> bool:
    """Whether nothing but the body looks at the task's arguments, or what does needs no true lists and dicts.

    Hooks, own request classes, Celery's pydantic wrapper, extended results, and receivers of signals that name the
    arguments get them as ever.
    """
    conf = task.app.conf
    return (
        not any(task_has_custom(task, hook) for hook in _HOOKS)
        and task.Request == _REQUEST
        and (task.serializer or conf.task_serializer) in _SERIALIZERS
        and not conf.result_extended
        and not is_pydantic(task)
        and not any(_names_arguments(each) for signal in _SIGNALS for each in signal._live_receivers(task))
    )


def _names_arguments(receiver: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(receiver).parameters
    except (TypeError, ValueError):
        return True
    return any(name in parameters and parameters[name].kind not in _REST for name in ("args", "kwargs"))
