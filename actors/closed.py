"""Large arguments that stay closed: JSON text on its way from the message to the executor, which alone reads it.

Worker and driver need to know where arguments begin and end, not what is in them. `split` finds that out and reads
nothing else; in an argument's place stands a `ClosedList` or `ClosedDict`, which opens itself should anybody look.
"""

import copyreg
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from kombu.utils import json as kombu_json

from actors.frames import Part

#: A shorter list or object, in bytes of text, is not worth staying closed.
SMALL_BYTES = 1024
#: Characters of a text that stand for it in logs.
SHOWN = 80

#: What may stand for `__type__`, which makes kombu's objects of JSON's: the word, or an escaped ASCII character of it;
#: after a single byte, for which most bodies can be searched much faster.
_KOMBUS_OWN = ((b"_", b"__type__"), (b"\\", b"\\u00"))
_PARTS = msgspec.json.Decoder(tuple[list[msgspec.Raw], dict[str, msgspec.Raw], msgspec.Raw])
_VALUE = msgspec.json.Decoder()


class Texts(NamedTuple):
    """A message's body in parts, each one JSON text, or a view of one."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    embed: Any

    def joined(self) -> bytes:
        """The body again, as a producer might have written it."""
        args = b", ".join(map(bytes, self.args))
        kwargs = b", ".join(b"%b: %b" % (kombu_json.dumps(name).encode(), bytes(t)) for name, t in self.kwargs.items())
        return b"[[%b], {%b}, %b]" % (args, kwargs, bytes(self.embed))

    def __reduce__(self) -> Any:
        return _texts, ([*map(_sent, self.args)], {k: _sent(t) for k, t in self.kwargs.items()}, bytes(self.embed))

    def values(self) -> tuple[list[Any], dict[str, Any], Any]:
        """What Celery takes for the decoded body: what is large stays closed."""
        args = [_closed(text) for text in self.args]
        return args, {name: _closed(text) for name, text in self.kwargs.items()}, read(self.embed)


def split(body: bytes | str) -> Texts | None:
    """The parts of a task's message in JSON; None unless all of it is surely what kombu would read without error.

    All of it is looked at, and nested no deeper than Python's recursion limit. Left to kombu is what Python's own
    `json` takes beyond the standard (NaN, lone surrogates) and what kombu makes objects of its own of.
    """
    try:
        if isinstance(body, str):  # as from RabbitMQ
            body = body.encode()
        elif not body.isascii():
            body.decode()
        if any(first in body and mark in body for first, mark in _KOMBUS_OWN):
            return None
        return Texts(*_PARTS.decode(body))
    except (ValueError, RecursionError):  # msgspec's errors and those of UTF-8 are ValueErrors
        return None


def read(text: Any) -> Any:
    """What kombu would make of a JSON text that `split` has found, several times faster.

    Raises:
        ValueError: a number that Python takes for too long; or nested too deeply.
    """
    try:
        return _VALUE.decode(text)
    except (ValueError, RecursionError):  # such as 1e999, which Python takes for infinity
        pass
    try:
        return kombu_json.loads(bytes(text))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _closed(text: Any) -> Any:
    view = memoryview(text)
    kind = {ord("["): ClosedList, ord("{"): ClosedDict}.get(view[0]) if len(view) > SMALL_BYTES else None
    return kind(text) if kind else read(text)


class Closed:
    """A large argument nobody has read yet; for who looks it is what kombu would have made of it."""

    __slots__ = ("_value", "text")

    def __init__(self, text: Any) -> None:
        self.text = text  # bytes, or a view of some
        self._value: Any = None

    def opened(self) -> Any:
        """The Python list or dict. Errors as `read` says."""
        if self._value is None:
            self._value = read(self.text)
        return self._value

    def __json__(self) -> Any:  # kombu asks for it when it writes a message
        return self.opened()

    def __reduce__(self) -> Any:  # for anybody else's pickle: whoever loads it needs no bridge
        return kombu_json.loads, (bytes(self.text),)

    def __len__(self) -> int:
        return len(self.opened())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.opened())

    def __getitem__(self, key: Any) -> Any:
        return self.opened()[key]

    def __eq__(self, other: object) -> bool:
        return bool(self.opened() == (other.opened() if isinstance(other, Closed) else other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = bytes(memoryview(self.text)[:SHOWN]).decode("utf-8", "ignore")
        return f"{shown}...{chr(memoryview(self.text)[-1])}"


class ClosedList(Closed, Sequence[Any]):
    """In a list's place."""

    __slots__ = ()


class ClosedDict(Closed, Mapping[str, Any]):
    """In a dict's place."""

    __slots__ = ()


def _sent(text: Any) -> Any:
    return Part(text) if memoryview(text).nbytes > SMALL_BYTES else bytes(text)


def _received(text: Any) -> Any:
    return text.view if isinstance(text, Part) else text


def _texts(args: list[Any], kwargs: dict[str, Any], embed: bytes) -> Texts:
    return Texts([*map(_received, args)], {name: _received(text) for name, text in kwargs.items()}, embed)


def _as_it_is(value: Closed) -> Any:
    return type(value), (pickle.PickleBuffer(value.text),)


class _Pickler(pickle.Pickler):
    dispatch_table = copyreg.dispatch_table | {ClosedList: _as_it_is, ClosedDict: _as_it_is}


def dumps(value: Any) -> tuple[bytes, tuple[Part, ...]]:
    """Pickle for a process of the bridge: what is closed stays closed, and its texts lie beside."""
    buffer = io.BytesIO()
    parts: list[Part] = []
    _Pickler(buffer, 5, buffer_callback=lambda part: parts.append(Part(part.raw()))).dump(value)
    return buffer.getvalue(), tuple(parts)


def loads(data: bytes, parts: Sequence[Part]) -> Any:
    """What `dumps` was given."""
    return pickle.loads(data, buffers=[part.view for part in parts])


def is_closed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an argument is."""
    return any(isinstance(each, Closed) for each in (*args, *kwargs.values()))
