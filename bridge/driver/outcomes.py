"""In the driver: an actor's outcome becomes what the body returned or raised."""

import logging
import pickle
from types import TracebackType
from typing import Any

import tblib
from celery.result import result_from_tuple
from celery.utils.log import get_task_logger
from celery.utils.serialization import get_pickleable_exception

from actors.contract import Failed, FailureKind, LogLine, Outcome
from actors.wishes import Children, RequestChanges
from bridge.errors import GpuOutOfMemory, RemoteTaskError, ResultInvalid, TaskNotOnActor


class RemoteTraceback(Exception):
    """The cause of a rebuilt exception: where it was raised on the GPU node."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def resolve(task: Any, outcome: Outcome) -> Any:
    """Return or raise what the body did, inside the task's own request.

    Raises:
        GpuOutOfMemory, TaskNotOnActor, ResultInvalid, RemoteTaskError: as their docstrings say.
        Exception: the body's own exception, with the remote traceback as its cause.
    """
    _log(outcome.logs)
    last = grant(task, outcome.wishes)
    if not isinstance(outcome, Failed):
        return pickle.loads(outcome.value)
    if outcome.kind is FailureKind.RETRY and isinstance(last, BaseException):
        last.__cause__ = RemoteTraceback(outcome.traceback) if outcome.traceback else last.__cause__
        raise last
    error = _rebuild(outcome)
    error.__cause__ = RemoteTraceback(outcome.traceback) if outcome.traceback else None
    if get_pickleable_exception(error) is not error:  # Celery puts another in its place, and keeps only the frames
        error.__traceback__ = _frames(outcome.traceback)
    raise error


def grant(task: Any, wishes: bytes) -> Any:
    """Do what the body asked of Celery, and log what it logged, in order; returns what the last one returned."""
    granted: Any = None
    for wish in pickle.loads(wishes) if wishes else []:
        if isinstance(wish, LogLine):
            _log((wish,))
        elif isinstance(wish, RequestChanges):
            task.request.update(wish.values)
        elif isinstance(wish, Children):
            task.request.children.extend(result_from_tuple(each, app=task.app) for each in wish.results)
        else:
            granted = getattr(task, wish.method)(*wish.args, **wish.kwargs)
    return granted


def _frames(text: str) -> TracebackType | None:
    """A traceback's text as frames that show file, line and function."""
    last = text[max(0, text.rfind("Traceback (most recent call last)")) :]
    try:
        frames: TracebackType = tblib.Traceback.from_string(last, strict=False).as_traceback()
    except tblib.TracebackParseError:
        return None
    return frames


def _rebuild(outcome: Failed) -> BaseException:
    where = f"{outcome.type_name}: {outcome.message}"
    match outcome.kind:
        case FailureKind.OUT_OF_MEMORY:
            return GpuOutOfMemory(where)
        case FailureKind.UNKNOWN_TASK:
            return TaskNotOnActor(outcome.message)
        case FailureKind.NOT_SENDABLE:
            return ResultInvalid(f"the task returned a value that cannot be sent: {outcome.message}")
    if outcome.exception is not None:
        try:
            error = pickle.loads(outcome.exception)
        except Exception:
            return RemoteTaskError(outcome.type_name, outcome.message)
        if isinstance(error, MemoryError):  # it would end the worker: celery.worker.request re-raises it there
            return GpuOutOfMemory(where)
        if isinstance(error, BaseException):
            return error
    return RemoteTaskError(outcome.type_name, outcome.message)


def _log(lines: tuple[LogLine, ...]) -> None:
    for line in lines:
        logger = get_task_logger(line.logger) if line.of_task else logging.getLogger(line.logger)
        if logger.isEnabledFor(line.level):
            file, number, function = line.where
            extra = pickle.loads(line.extra) if line.extra else None
            record = logger.makeRecord(logger.name, line.level, file, number, line.text, (), None, function, extra)
            record.created = line.created or record.created
            logger.handle(record)
