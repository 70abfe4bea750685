"""Files in messages: the forms their bytes travel in, and `Blob`, the type that says what a task takes.

The bytes are inside the message (base64, as any producer sends them), in a store (`BlobRef`, as ``data.put_bytes``
makes it), or at a URL below an allowed root. The driver looks at sizes, at the first bytes and at nothing else; the
bytes are opened in the executor, within the body's frame (`actors/executor/opening.py`), and the body gets ``bytes``.
"""

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from actors.data import arrays
from actors.data.arrays import FORM_SCHEMA, Form, as_form, register_form
from actors.sizes import readable
from actors.unopened import Unopened

#: How files of each format begin.
SIGNATURES = {
    "PNG": rb"\x89PNG\r\n\x1a\n", "JPEG": rb"\xff\xd8\xff", "GIF": rb"GIF8[79]a", "WebP": rb"RIFF.{4}WEBP",
    "TIFF": rb"II\*\0|MM\0\*", "PDF": rb"%PDF-", "ZIP": rb"PK\x03\x04", "GZIP": rb"\x1f\x8b", "WAV": rb"RIFF.{4}WAVE",
    "NPY": rb"\x93NUMPY",
}  # fmt: skip
#: So many bytes tell a format; in base64 a third more.
HEAD_BYTES = 12
_HEAD_CHARACTERS = HEAD_BYTES // 3 * 4


class InlineBytes(Form):
    """Bytes inside the message, as base64."""

    kind: Literal["bytes"] = "bytes"
    data: str

    @classmethod
    def of(cls, data: bytes) -> "InlineBytes":
        """The envelope of some bytes."""
        return cls(data=base64.b64encode(data).decode("ascii"))

    def get(self) -> bytes:
        """The bytes. ValueError if this is not base64."""
        return _decoded(self.data)


class BlobRef(Form):
    """Bytes by reference: they lie in a store or at a URL, and the message carries this."""

    kind: Literal["blob"] = "blob"
    url: Annotated[str, Field(max_length=2048)]  # "redis:<id>" or a URL below an allowed root
    size_bytes: int | None = Field(None, ge=0)  # None where only the server knows
    checksum: Annotated[str, Field(max_length=64)] = ""  # "xxh3:<16 hex digits>" of the bytes
    expires_at: float | None = None  # as `time.time`; for people, because clocks differ
    once: bool = False  # deleted when the task that takes it has ended

    def get(self, most_bytes: int | None = None) -> bytes:
        """Read it, in a process that knows its store (`import bridge.data`); no more than `most_bytes`."""
        if arrays.opener is None:
            raise RuntimeError("import bridge.data to read files by reference")
        data: bytes = arrays.opener(self, most_bytes)
        return data


register_form("bytes", InlineBytes)
register_form("blob", BlobRef)


@dataclass(frozen=True)
class BlobSpec:
    """What a file must be: ``Annotated[bytes, BlobSpec(most_bytes=1 << 20, formats=("PDF",))]``.

    Args:
        most_bytes: its size, at most; BRIDGE_DATA_LIMIT_BYTES bounds what is read from elsewhere in any case.
        formats: names in `SIGNATURES`; it must be one of them by its first bytes. Empty takes any.
    """

    most_bytes: int | None = None
    formats: tuple[str, ...] = ()
    noun = "file"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.formats if name not in SIGNATURES]:
            raise TypeError(f"formats {unknown}: known here are {', '.join(SIGNATURES)}")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.validate, serialization=core_schema.plain_serializer_function_ser_schema(_shown, when_used="json")
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        text = {"type": "string", "description": "base64, or a URL"}
        return {"description": f"a {self.noun}", "anyOf": [text, FORM_SCHEMA]}

    def validate(self, value: Any) -> Any:
        """What the body gets, or `Unopened` in a process that passes on.

        Raises:
            ValueError: no bytes in any form, or not such ones; the text never repeats them.
        """
        form = self._form_of(value)
        if isinstance(form, Unopened):
            return form
        if isinstance(form, BlobRef) and arrays.passes_on:
            arrays.seen.append(form)
        self._look_at(form)
        unopened = Unopened(self, form)
        return unopened if arrays.passes_on else unopened.open()

    def file_of(self, value: Any) -> bytes:
        """The bytes of a value in any of the forms, for bodies that may be called without a bridge.

        Raises:
            ValueError: as `validate`.
            DataError: they cannot be read.
        """
        form = self._form_of(value)
        self._look_at(form)
        data: bytes = form
        if isinstance(form, BlobRef):
            data = form.get(self.most_bytes)
        elif isinstance(form, InlineBytes):
            data = form.get()
        self._look_at(data)
        return data

    def open(self, source: Any) -> Any:
        """What the body gets of a form."""
        return self.file_of(source)

    def _form_of(self, value: Any) -> Any:
        form = as_form(value)
        if isinstance(form, str):
            is_url = "://" in form[:32]  # no base64 holds a colon
            return BlobRef(url=form) if is_url else InlineBytes.model_construct(data=form)
        if isinstance(form, bytearray | memoryview):
            return bytes(form)
        if not isinstance(form, bytes | InlineBytes | BlobRef | Unopened):
            raise ValueError(f"expected a {self.noun} (base64, bytes or a reference), found {type(form).__name__}")
        return form

    def _look_at(self, form: Any) -> None:
        """Size and first bytes, as far as a form tells them without being opened."""
        if isinstance(form, BlobRef):
            self._check_size(form.size_bytes)
        elif isinstance(form, InlineBytes):
            self._check_size(len(form.data) * 3 // 4 - form.data[-2:].count("="))
            self._check_head(_decoded(form.data[:_HEAD_CHARACTERS], self.noun))
        else:
            self._check_size(len(form))
            self._check_head(form[:HEAD_BYTES])

    def _check_size(self, size_bytes: int | None) -> None:
        if size_bytes is not None and self.most_bytes is not None and size_bytes > self.most_bytes:
            raise ValueError(
                f"the {self.noun} has {readable(size_bytes)}, at most {readable(self.most_bytes)} are allowed"
            )

    def _check_head(self, head: bytes) -> None:
        if not self.formats:
            return
        if not head:
            raise ValueError(f"the {self.noun} is empty")
        if not any(re.match(SIGNATURES[name], head, re.DOTALL) for name in self.formats):
            *most, last = self.formats
            names = f"neither {', '.join(most)} nor {last}" if most else f"no {last}"
            raise ValueError(f"the {self.noun} is {names}")

    def __str__(self) -> str:
        return self.noun


#: What a task takes that wants the bytes of any file.
Blob = Annotated[bytes, BlobSpec()]


def _decoded(text: str, noun: str = "file") -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the {noun} is not base64: {error}") from None


def _shown(value: Any) -> Any:
    return InlineBytes.of(value).data if isinstance(value, bytes) else value
