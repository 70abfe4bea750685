"""Errors of tasks that are raised on a GPU node as well; `bridge/errors.py` has the whole tree and shows them all.

Their module is said to be `bridge.errors`, under which users know them and results name them.
"""

from typing import Any, ClassVar


class BridgeError(Exception):
    """Base of all errors of the bridge."""

    __module__ = "bridge.errors"
    retryable: ClassVar[bool] = False

    def __str__(self) -> str:
        return " ".join(str(arg) for arg in self.args)


class TaskError(BridgeError):
    """What one task ends with; the worker and its other tasks go on."""

    __module__ = "bridge.errors"


class PayloadInvalid(TaskError):
    """Arguments that do not fit the task's signature; never retried.

    Args:
        task: the task's name.
        problems: one dict each: ``field`` (dotted path), ``reason``, ``received`` (a type name, never the value).
    """

    __module__ = "bridge.errors"

    def __init__(self, task: str, problems: list[dict[str, str]]) -> None:
        super().__init__(task, problems)
        self.task = task
        self.problems = problems

    def __str__(self) -> str:
        listed = "; ".join(f"{p['field']}: {p['reason']} (received {p['received']})" for p in self.problems)
        return f"{self.task}: invalid payload: {listed}"


class DataError(TaskError):
    """Base of what can go wrong with data that travel by reference."""

    __module__ = "bridge.errors"


class DataLost(DataError):
    """What a reference points to is not there: it has expired, was deleted, or was never written."""

    __module__ = "bridge.errors"


class DataCorrupt(DataError):
    """What a reference points to is shorter or longer than it says, or has another checksum."""

    __module__ = "bridge.errors"


class DataRefused(DataError):
    """A reference to a place that is not allowed, or to more than is allowed; nothing was read."""

    __module__ = "bridge.errors"


class StoreUnavailable(DataError):
    """The store of large data does not answer or takes nothing; the task may be sent again."""

    __module__ = "bridge.errors"
    retryable = True


class HandleLost(DataError):
    """The array is on no device any more: its executor has ended, or it has expired or made room.

    Send the task again that made it, or mark that task with ``Gpu(result="device", keep_copy=True)``.
    """

    __module__ = "bridge.errors"
    retryable = True


def problem(field: str, reason: str, value: Any) -> dict[str, str]:
    """One entry of `PayloadInvalid.problems`."""
    return {"field": field, "reason": reason, "received": type(value).__name__}
