"""Arrays in messages: the forms they travel in, and `Array`, the type that says what a task takes.

An array is a list of numbers (what any producer sends), an `Inline` envelope, or an `ArrayRef` to where its bytes lie.
Each form is plain JSON with a ``kind``; between Python processes kombu's type registry does it (`bridge/data.py`).
In the driver, which `passes_on`, validation looks at what a reference says of itself, and its bytes are opened on the
GPU node (`actors/executor/opening.py`). In every other process validation opens them at once.
"""

import base64
import binascii
import io
import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

import numpy
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from actors.data import foreign, lists, shapes
from actors.data.lists import KINDS
from actors.unopened import Unopened

#: Dimensions of one array, at most (NumPy's own bound is 64).
MOST_DIMENSIONS = 32

#: Whether validation leaves references as they are, for another process to open; only the driver sets it.
passes_on = False
#: Whether kombu's JSON leaves references as they are: in a worker's main process, drivers and executors. In producers
#: and in prefork children they become arrays.
keeps_forms = False

#: How what a reference points to is read in this process; `bridge/data.py` and the executor set it.
opener: Callable[..., Any] | None = None


class Mismatch(ValueError):
    """An array of another dtype or shape than is wanted; the text names what was expected and found."""


# ---- forms


class Form(BaseModel):
    """What stands in a message for an array or a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def get(self) -> Any:
        """What it stands for, in the host's memory."""


class _Form(Form):
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "numpy.ndarray[Any, Any]":
        return numpy.asarray(self.get(), dtype)


class Inline(_Form):
    """An array inside the message: base64 of a file in NumPy's ``.npy`` format."""

    kind: Literal["npy"] = "npy"
    data: str

    @classmethod
    def of(cls, array: "numpy.ndarray[Any, Any]") -> Self:
        """The envelope of an array."""
        file = io.BytesIO()
        numpy.lib.format.write_array(file, numpy.asarray(array), allow_pickle=False)
        return cls(data=base64.b64encode(file.getbuffer()).decode("ascii"))

    def get(self) -> "numpy.ndarray[Any, Any]":
        """The array.

        Raises:
            ValueError: not base64, not ``.npy``, or truncated.
        """
        try:
            data = base64.b64decode(self.data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"data is not base64: {error}") from None
        return read_npy(bytearray(data))  # of bytes it would be read-only


class Described(_Form):
    """What tells dtype and shape without the bytes."""

    dtype: Annotated[str, Field(max_length=16)]  # as in `numpy.dtype.str`, for example "<f8"
    shape: tuple[Annotated[int, Field(ge=0)], ...] = Field(max_length=MOST_DIMENSIONS)
    size_bytes: int = Field(ge=0)
    expires_at: float | None = None  # as `time.time`; for people, because clocks differ

    def model_post_init(self, context: Any, /) -> None:
        """Raises ValueError where size, shape and dtype contradict each other."""
        wanted = math.prod(self.shape) * _dtype(self.dtype).itemsize
        if self.size_bytes != wanted:
            raise ValueError(
                f"{self.dtype} of shape {shapes.shown(self.shape)} has {wanted} bytes, not {self.size_bytes}"
            )


class ArrayRef(Described):
    """An array by reference: its bytes lie in a store, and the message carries this."""

    kind: Literal["ref"] = "ref"
    url: Annotated[str, Field(max_length=2048)]  # "redis:<id>" or a URL below an allowed root
    checksum: Annotated[str, Field(max_length=64)] = ""  # "xxh3:<16 hex digits>" of the bytes
    once: bool = False  # deleted when the task that takes it has ended

    def get(self) -> "numpy.ndarray[Any, Any]":
        """Read it from its store, in a process that knows one (`import bridge.data`)."""
        if opener is None:
            raise RuntimeError("import bridge.data to read arrays by reference")
        array: numpy.ndarray[Any, Any] = opener(self)
        return array


_FORMS: dict[str, type[Form]] = {"npy": Inline, "ref": ArrayRef}


def register_form(kind: str, form: type[Form]) -> None:
    """Another form, told by its ``kind``."""
    _FORMS[kind] = form


def as_form(value: Any) -> Any:
    """A form where `value` is one or its JSON; else `value` itself.

    Raises:
        ValueError: a JSON object that is no form, or a broken one.
    """
    if not isinstance(value, dict):
        return value
    kind = value.get("kind")
    form = _FORMS.get(kind) if isinstance(kind, str) else None
    if form is None:
        raise ValueError(f"an object that is neither array nor file: its kind must be one of {', '.join(_FORMS)}")
    try:
        return form.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"a broken reference or envelope: {place + ': ' if place else ''}{reason}") from None


def read_npy(data: Any) -> "numpy.ndarray[Any, Any]":
    """The array in the bytes of an ``.npy`` file; never of objects.

    Raises:
        ValueError: another format, truncated, or more bytes than the header says.
    """
    file = io.BytesIO(data)
    try:
        version = numpy.lib.format.read_magic(file)
        read = numpy.lib.format.read_array_header_1_0 if version == (1, 0) else numpy.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(file)
    except Exception as error:
        raise ValueError(f"not the .npy format: {str(error)[:200]}") from None
    if dtype.kind not in KINDS:
        raise ValueError(f"arrays of {dtype} are not accepted, only numbers and truth values")
    size = math.prod(shape) * dtype.itemsize
    left = len(data) - file.tell()
    if left != size:
        raise ValueError(f"{dtype.str} of shape {shapes.shown(shape)} has {size} bytes, and {left} follow the header")
    array = numpy.frombuffer(data, dtype, math.prod(shape), file.tell())
    return array.reshape(shape[::-1]).T if is_fortran else array.reshape(shape)


def assembled(pieces: Iterable[Any], shape: tuple[int, ...], dtype: str) -> "numpy.ndarray[Any, Any]":
    """An array from its bytes, which come in pieces; in the byte order of `dtype`.

    Raises:
        ValueError: more bytes than the array has. Fewer are not noticed: who sends them counts.
    """
    pieces = begun(pieces)
    target = numpy.empty(shape, dtype)
    flat, start = target.reshape(-1).view(numpy.uint8) if target.size else numpy.empty(0, numpy.uint8), 0
    for piece in pieces:
        end = start + len(piece)
        if end > flat.size:
            raise ValueError(f"{dtype} of shape {shapes.shown(shape)} has {flat.size} bytes, and more came")
        flat[start:end] = numpy.frombuffer(piece, numpy.uint8)
        start = end
    return target


def begun(pieces: Iterable[Any]) -> Iterator[Any]:
    """The same pieces once the first one is there: for data that are lost nobody makes room.

    Raises:
        Exception: what getting the first piece does.
    """
    pieces = iter(pieces)
    return itertools.chain(list(itertools.islice(pieces, 1)), pieces)


#: JSON Schema of a reference or an envelope.
FORM_SCHEMA = {"type": "object", "title": "reference or envelope", "required": ["kind"]}


# ---- what a task takes


class ArraySpec(NamedTuple):
    """What an array must be: ``Annotated[Any, ArraySpec("float64", ("n", 3))]`` is ``Array["float64", "n", 3]``.

    Args:
        dtype: of the array in the body. Lists become it where nothing but the precision of floats is lost; arrays must
            have it or one that it holds exactly (float32 for float64), in any byte order. None takes any numbers.
        shape: per dimension a length, ``"*"`` for any, a name for equal lengths (``"n", "n"`` is square), or
            ``slice(least, most)``, both inclusive. None takes any shape.
        finite: whether NaN and infinities are refused.
    """

    dtype: str | None = None
    shape: tuple[Any, ...] | None = None
    finite: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate,
            serialization=core_schema.plain_serializer_function_ser_schema(_serialized, when_used="json"),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"description": str(self), "anyOf": [shapes.json_schema(self.shape), FORM_SCHEMA]}

    def validate(self, value: Any) -> Any:
        """`value` as a device array, or as `Unopened` in a process that `passes_on`.

        Raises:
            ValueError: no array, or not such a one; the text names what was expected and found.
        """
        form = as_form(value)
        if isinstance(form, Unopened):
            return form
        if isinstance(form, Described):
            if isinstance(form, ArrayRef) and passes_on:
                seen.append(form)
            self.check(form.dtype, form.shape)
            unopened = Unopened(self, form)
        else:
            unopened = Unopened(self, self.read(form))
        return unopened if passes_on else unopened.open()

    def read(self, value: Any) -> Any:
        """An array in this process's memory from a list, an envelope or another array; checked in full.

        Raises:
            ValueError: as `validate`.
        """
        if isinstance(value, Inline):
            value = value.get()
        if isinstance(value, list | tuple):
            return self._checked_values(self.from_list(value))
        try:
            value = foreign.adopted(value)
        except ValueError as error:
            raise Mismatch(f"expected {self}, found {error}") from None
        self.check(value.dtype.str, value.shape)
        return self._checked_values(value)

    def open(self, source: Any) -> Any:
        """The array on this process's device. Errors as `read` and `ArrayRef.get` say."""
        from actors.executor.device import to_device

        array = self._checked_values(source.get()) if isinstance(source, Described) else source
        return _writable(self.cast(to_device(array)))

    def cast(self, array: Any) -> Any:
        """A device array in the dtype that was asked for."""
        wanted = array.dtype.newbyteorder("=") if self.dtype is None else _dtype(self.dtype)
        return array if array.dtype == wanted else array.astype(wanted)

    def check(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Compare with what an array says of itself.

        Raises:
            Mismatch: the text names what was expected and found.
        """
        found = _dtype(dtype)
        wrong = found.kind not in KINDS
        if self.dtype is not None:
            wrong = wrong or not numpy.can_cast(found, _dtype(self.dtype), "safe")
        if wrong or not shapes.fit(shape, self.shape):
            raise Mismatch(f"expected {self}, found {found.name} of shape {shapes.shown(shape)}")

    def from_list(self, values: Any) -> "numpy.ndarray[Any, Any]":
        """The array of a list of numbers, or of the array that NumPy makes of it; its values are not checked.

        Raises:
            Mismatch: as `validate`.
        """
        wanted = None if self.dtype is None else _dtype(self.dtype)
        try:
            array = lists.array_of_numbers(values, wanted)
        except ValueError as error:
            raise Mismatch(f"expected {self}, found {error}") from None
        if not shapes.fit(array.shape, self.shape):
            raise Mismatch(f"expected {self}, found a list of shape {shapes.shown(array.shape)}")
        try:
            return array if wanted is None else lists.cast(array, wanted)
        except ValueError as error:
            raise Mismatch(f"expected {self}, found {error}") from None

    def _checked_values(self, array: Any) -> Any:
        if self.finite and array.dtype.kind in "fc":
            xp = foreign.module_of(array)
            is_finite = xp.isfinite(array)
            if not is_finite.all():
                place = tuple(int(each) for each in xp.argwhere(~is_finite)[0])
                raise Mismatch(f"expected finite numbers, found NaN or an infinity at {shapes.shown(place)}")
        return array

    def __str__(self) -> str:
        dtype = "numbers" if self.dtype is None else _dtype(self.dtype).name
        shape = "any shape" if self.shape is None else f"shape ({', '.join(map(shapes.dimension, self.shape))})"
        return f"{'finite ' if self.finite else ''}{dtype} of {shape}"

    def __repr__(self) -> str:
        return f"ArraySpec({self})"

    def __hash__(self) -> int:  # before Python 3.12 a slice has none, and ``| None`` asks for it
        return hash(str(self))


#: References seen by validation in a process that `passes_on` since the last look; the driver takes them.
seen: list[Any] = []


class Array:
    """``Points = Array["float64", "n", 3]``: the type of an array that a task takes; `ArraySpec` explains the parts.

    ``Array["float64"]`` takes any shape, ``Array`` alone any array of numbers. Name such a type before it is used in a
    signature: linters take strings inside one for names of classes.
    """

    def __class_getitem__(cls, parts: Any) -> Any:
        dtype, *shape = parts if isinstance(parts, tuple) else (parts,)
        spec = ArraySpec(None if dtype is None else _dtype(dtype).str, tuple(shape) if shape else None)
        for each in spec.shape or ():
            if not shapes.is_dimension(each):
                raise TypeError(f"Array[...]: a dimension is a length, a name, '*' or slice(least, most), not {each!r}")
        return Annotated[Any, spec]

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return ArraySpec().__get_pydantic_core_schema__(source, handler)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return ArraySpec().__get_pydantic_json_schema__(schema, handler)


# ---- small things


def _writable(array: Any) -> Any:
    """An array that a body may write into: what a pickle's buffers hold is read-only."""
    return array.copy() if isinstance(array, numpy.ndarray) and not array.flags.writeable else array


def _serialized(value: Any) -> Any:
    return (
        value if isinstance(value, _Form) else numpy.asarray(value.get() if hasattr(value, "get") else value).tolist()
    )


def _dtype(text: Any) -> "numpy.dtype[Any]":
    try:
        dtype: numpy.dtype[Any] = numpy.dtype(text)
    except Exception:  # a comma, for example, is a SyntaxError
        raise ValueError(f"{str(text)[:50]!r} is no dtype; write one such as 'float64' or '<f8'") from None
    if dtype.kind not in KINDS:
        raise ValueError(f"arrays of {dtype} are not accepted, only numbers and truth values")
    return dtype


if TYPE_CHECKING:
    Array = Any  # type: ignore[assignment, misc]  # subscripts mean nothing to a type checker
