"""In the driver: where a task runs that takes arrays which stay on a device, and whose results may stay. Pure.

A task is pinned to the actor that holds most of the bytes it takes. What other actors hold for it is fetched first
(`errands.py`). Whether a handle is good, only its executor knows: where that has ended the task runs anywhere,
and its body gets the copy or fails as HandleLost.
"""

import pickle
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from typing import Any, NamedTuple

from kombu.serialization import loads
from pydantic import ValidationError

from actors.closed import Texts
from actors.data.arrays import ArrayRef
from actors.data.handles import DeviceArray
from bridge.link import Run
from bridge.marks import Mark, is_gpu

#: A task whose arrays are on an actor that does not take calls waits this long for it, in seconds; then it runs where
#: it can, as if they were lost.
HOLDER_WAIT_S = 10.0
#: Objects of a message looked at for handles, at most.
MOST_OBJECTS = 1_000_000
#: Words that every message with a handle has, in whatever serialisation.
_WORDS = ("device", "executor")


class Plan(NamedTuple):
    """Where a task is to run."""

    actor: int | None = None  # there, for it holds arrays the task takes
    elsewhere: tuple[DeviceArray, ...] = ()  # others, to be fetched first
    executor: str = ""  # of that actor, which holds them


def plan(handles: Iterable[DeviceArray], suits: Callable[[int], bool] = lambda _: True) -> Plan:
    """Where to run a task that takes these, if that actor suits; a handle with a copy need not be fetched."""
    held: dict[tuple[int, str], dict[str, DeviceArray]] = {}
    for handle in handles:
        held.setdefault((handle.actor, handle.executor), {})[handle.id] = handle
    places = [where for where in held if suits(where[0])]
    best = max(places, key=lambda where: sum(each.size_bytes for each in held[where].values()), default=None)
    others = [each for where, found in held.items() if where != best for each in found.values()]
    elsewhere = tuple(each for each in others if each.kept is None)
    return Plan(best[0], elsewhere, best[1]) if best else Plan(None, elsewhere)


def handles_of(run: Run, accept: Any) -> list[DeviceArray]:
    """The handles among a message's arguments; a message without any costs a look for two words."""
    body = run.body
    if isinstance(body, Texts):
        return []  # what may be one does not stay closed
    if isinstance(body, str | bytes):
        found = (word in body if isinstance(body, str) else word.encode() in body for word in _WORDS)
        if not all(found):
            return []
        try:
            body = loads(body, run.content_type, run.content_encoding, accept=accept)
        except Exception:
            return []  # the tracer meets it again, and says so
    return handles_in(body[:2] if isinstance(body, list | tuple) else body)


def handles_in(value: Any) -> list[DeviceArray]:
    """Handles, also in their JSON, anywhere in lists, tuples and dicts."""
    found, level, left = [], [value], MOST_OBJECTS
    while level and left > 0:
        left -= len(level)
        below: list[Any] = []
        for each in level:
            if isinstance(each, DeviceArray):
                found.append(each)
            elif isinstance(each, dict):
                handle = _handle(each) if each.get("kind") == "device" else None
                found += [handle] if handle else []
                below += () if handle else each.values()
            elif isinstance(each, list | tuple):
                below += each
        level = below
    return found


def _handle(value: dict[str, Any]) -> DeviceArray | None:
    try:
        return DeviceArray.model_validate(value)
    except ValidationError:
        return None  # validation says what is wrong with it, if it is meant for one


# ---- results


def may_stay(request: Mapping[str, Any], marks: Mapping[str, Mark]) -> bool:
    """Whether arrays in a task's result can stay on the device: whatever takes it next is a GPU task of this app."""
    takers = [*(request.get("chain") or [])[-1:], *(request.get("callbacks") or [])]
    takers += [request["chord"]] if request.get("chord") else []
    return all(_takes_handles(each, marks) for each in takers)


def _takes_handles(signature: Any, marks: Mapping[str, Mark]) -> bool:
    try:
        if signature.get("immutable"):
            return True
        name, kwargs = signature["task"], signature.get("kwargs") or {}
        if name == "celery.chain":
            return _takes_handles(kwargs["tasks"][0], marks)
        if name == "celery.group":
            return all(_takes_handles(each, marks) for each in kwargs["tasks"])
        if name == "celery.chord":
            header = kwargs["header"]
            members = header["kwargs"]["tasks"] if isinstance(header, dict) else header
            return all(_takes_handles(each, marks) for each in members)
        return is_gpu(marks, name, signature.get("args"), kwargs)  # type: ignore[arg-type]
    except (AttributeError, LookupError, TypeError):
        return False  # an odd signature; Celery says what is wrong with it


# ---- into the call


class _Replacing(pickle.Pickler):
    """Puts references in the place of handles whose arrays have been fetched."""

    refs: Mapping[str, ArrayRef]

    def reducer_override(self, value: Any) -> Any:
        if type(value) is DeviceArray and value.id in self.refs:
            return ArrayRef.model_validate, (self.refs[value.id].model_dump(),)
        return NotImplemented


def dumps(value: Any, refs: Mapping[str, ArrayRef]) -> bytes:
    """Pickle arguments, with references in the place of some handles, by id."""
    if not refs:
        return pickle.dumps(value, 5)
    buffer = BytesIO()
    pickler = _Replacing(buffer, 5)
    pickler.refs = refs
    pickler.dump(value)
    return buffer.getvalue()
