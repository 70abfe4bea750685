"""In producers and prefork children: arrays and files in JSON are read where an error of theirs belongs to somebody.

kombu wraps whatever a decoder raises, and reads a message before its task has begun, or a result while another is
waited for. So nothing is read there: the arguments of a CPU task are when Celery calls its body, and a result that
cannot be read is a failure, as if the task had raised that error. Errors in other JSON are kombu's `DecodeError` as
ever.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

from celery import states
from kombu.serialization import register
from kombu.utils import json

from actors.data.arrays import Form
from bridge.errors import DataError

Read = Callable[[Any], Any]


class _Decoding(threading.local):
    """What this thread reads now."""

    depth = 0
    has_forms = False


_now = _Decoding()


def adopt(read: Read, is_child: Callable[[], bool]) -> None:
    """Have kombu's JSON read arrays in this way.

    Args:
        read: gives what stands in the place of a form in this process.
        is_child: whether messages are read here for bodies.
    """

    def loads(data: Any) -> Any:
        _now.depth, _now.has_forms = 1, False
        try:
            value = json.loads(data)
        finally:
            _now.depth = 0
        if not _now.has_forms:
            return value
        if is_child() and _is_body(value):
            return [_Arguments(value[0], read), _KeywordArguments(value[1], read), value[2]]
        return _result(value, read) if _is_result(value) else opened(value, read)

    register("json", json.dumps, loads, content_type="application/json", content_encoding="utf-8")


def wait_for_the_whole() -> bool:
    """Whether a form that is decoded now stays one until all is decoded."""
    _now.has_forms = True
    return bool(_now.depth)


def opened(value: Any, read: Read) -> Any:
    """`value` with what it stands for in the place of each form in lists and dicts."""
    if isinstance(value, Form):
        return read(value)
    if isinstance(value, list):
        return [opened(each, read) for each in value]
    if isinstance(value, dict):
        return {key: opened(each, read) for key, each in value.items()}
    return value


def _is_body(value: Any) -> bool:
    """Whether it is what Celery's messages hold: arguments, keyword arguments, and what follows the task."""
    kinds = list, dict, dict | None
    return isinstance(value, list) and len(value) == 3 and all(map(isinstance, value, kinds))


def _is_result(value: Any) -> bool:
    return isinstance(value, dict) and "result" in value and value.get("status") in states.ALL_STATES


def _result(meta: dict[str, Any], read: Read) -> dict[str, Any]:
    try:
        return opened(meta, read)  # type: ignore[no-any-return]
    except (DataError, ValueError) as error:  # of an envelope that holds no array of numbers
        return {**meta, "status": states.FAILURE, "result": error, "traceback": None, "children": []}


class _Arguments(list[Any]):
    """Arrays in it are read when somebody, Celery first of all, takes one after the other: errors are the task's."""

    def __init__(self, values: list[Any], read: Read) -> None:
        super().__init__(values)
        self._read: Read | None = read

    def __iter__(self) -> Iterator[Any]:
        if self._read is not None:
            self[:] = [opened(self[number], self._read) for number in range(len(self))]
            self._read = None
        return super().__iter__()


class _KeywordArguments(dict[str, Any]):
    """The same; ``**`` asks a subclass for its `keys`."""

    def __init__(self, values: dict[str, Any], read: Read) -> None:
        super().__init__(values)
        self._read: Read | None = read

    def __iter__(self) -> Iterator[str]:  # without it ``**`` would copy what is there
        return iter(self.keys())

    def keys(self) -> Any:
        """Its names, once the values are read."""
        if self._read is not None:
            super().update({key: opened(each, self._read) for key, each in super().items()})
            self._read = None
        return super().keys()
