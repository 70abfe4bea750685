"""`from bridge import data`: large arrays and files by reference. For producers too: loads neither ray nor cupy.

    ref = data.put(array)            # the bytes go to a store, once
    result = total.delay(ref)        # the message carries where they lie
    data.get(result.get())           # a task with Gpu(result="ref") answers in the same way

A task with ``Gpu(result="device")`` answers with a handle to an array that stays where it is; tasks take that, too, and
`get` fetches it.

Importing this module also teaches kombu's JSON arrays: one of NumPy or CuPy given to ``delay()`` travels in the message
when it is small and is put by itself when it is not, and `AsyncResult.get` gives an array where a result is one. Bytes
travel inside, and by reference where a producer says so: ``data.put_bytes(path.read_bytes())``.
"""

import asyncio
from functools import cache
from typing import Any, Literal

import numpy
from celery import current_app, signals
from celery.result import allow_join_result
from kombu.utils.json import register_type

from actors.data import arrays, foreign, handles
from actors.data.arrays import Array, ArrayRef, ArraySpec, Form, Inline, as_form
from actors.data.blobs import Blob, BlobRef, BlobSpec, InlineBytes
from actors.data.handles import DeviceArray
from actors.data.pictures import Image, ImageSpec
from actors.data.stores import Stores
from actors.executor.errands import DELETE, EXPORT
from bridge import unread
from bridge.errors import HandleLost
from bridge.object_store import use_ray
from bridge.settings import settings

__all__ = ["Array", "ArrayRef", "ArraySpec", "Blob", "BlobRef", "BlobSpec", "DeviceArray", "Image", "ImageSpec"]
__all__ += ["aget", "aput", "aput_bytes", "delete", "get", "put", "put_bytes"]

#: The names under which arrays and files are known to kombu's JSON, on both sides.
MARKER, BLOB_MARKER = "bridge.array", "bridge.blob"
#: Whoever gets an array from a device waits this long for the task that fetches it, in seconds.
FETCH_S = 60.0


def put(
    array: Any, *, keep_s: float | None = None, once: bool = False, store: Literal["ray"] | None = None
) -> ArrayRef:
    """Write an array to the store of the current Celery app, and return the reference that a message carries.

    Args:
        array: NumPy's, CuPy's, one that speaks DLPack, or what `numpy.asarray` makes one of.
        keep_s: it is there for so long in Redis or Ray; default BRIDGE_DATA_KEEP_S. It must outlive the task's wait
            and run.
        once: delete it when the first GPU task that takes it as an annotated argument has ended and is not retried;
            also one that was revoked or has expired. What is left to expire: docs/decisions/0029.
        store: "ray" puts it into Ray's object store, of the cluster that this process has joined (`ray.init`); None
            puts it where BRIDGE_DATA_URL says.

    Raises:
        ValueError: not an array of numbers, or another store.
        DataRefused: larger than BRIDGE_DATA_LIMIT_BYTES.
        StoreUnavailable: the store does not answer or has no room.
    """
    return _stored(_stores(), array, keep_s, once, store)


def put_bytes(
    data: bytes, *, keep_s: float | None = None, once: bool = False, store: Literal["ray"] | None = None
) -> BlobRef:
    """Write the bytes of a file to the store; arguments and errors as `put`."""
    return _stores().put_bytes(data, keep_s, once, store)


def get(ref: Any) -> Any:
    """The array, or the bytes, of a reference, a handle, or their JSON.

    What a handle stands for is fetched by a GPU task, for up to a minute. An array in Ray's object store is not copied:
    it is read-only, and stays there as long as somebody has it.

    Raises:
        ValueError: no reference.
        DataLost, DataCorrupt, DataRefused, StoreUnavailable, HandleLost: as their docstrings say.
        celery.exceptions.TimeoutError: no worker has fetched it in time.
    """
    return _opened(_stores(), ref)


def delete(ref: Any) -> None:
    """Forget what a reference or a handle stands for before it expires; nothing happens if it is gone.

    A handle's array goes when a worker gets to it; this does not wait.

    Raises:
        ValueError: no reference.
        DataRefused: not what `put` has made; other people's files are never deleted.
        StoreUnavailable: the store does not answer.
    """
    form = _form(ref)
    if isinstance(form, DeviceArray):
        _send(_stores(), form, DELETE, [form.model_dump(mode="json")], ignore_result=True)
        form = form.kept
    if isinstance(form, ArrayRef | BlobRef):
        _stores().delete(form)


async def aput(
    array: Any, *, keep_s: float | None = None, once: bool = False, store: Literal["ray"] | None = None
) -> ArrayRef:
    """`put`, while the event loop goes on."""
    return await asyncio.to_thread(_stored, _stores(), array, keep_s, once, store)  # a thread may know no app


async def aput_bytes(
    data: bytes, *, keep_s: float | None = None, once: bool = False, store: Literal["ray"] | None = None
) -> BlobRef:
    """`put_bytes`, while the event loop goes on."""
    return await asyncio.to_thread(_stores().put_bytes, data, keep_s, once, store)


async def aget(ref: Any) -> Any:
    """`get`, while the event loop goes on."""
    return await asyncio.to_thread(_opened, _stores(), ref)


def _stored(stores: Stores, array: Any, keep_s: float | None, once: bool, store: str | None = None) -> ArrayRef:
    return stores.put(foreign.on_host(array), keep_s, once, store)


def _opened(stores: Stores, ref: Any) -> Any:
    form = _form(ref)
    if isinstance(form, DeviceArray):
        return _of_device(stores, form)
    return stores.get(form) if isinstance(form, ArrayRef | BlobRef) else form.get()


def _form(ref: Any) -> Any:
    form = as_form(ref)
    if isinstance(form, numpy.ndarray):
        return Inline.of(form)
    if not isinstance(form, Form):
        raise ValueError(f"no reference to an array or a file: {type(ref).__name__}; `put` and `put_bytes` return one")
    return form


# ---- from a device


def _of_device(stores: Stores, handle: DeviceArray) -> Any:
    """Have the executor that holds an array put it where it can be read, and read it; or read its copy."""
    result = _send(stores, handle, EXPORT, handle, settings().data_inline_bytes, expires=FETCH_S)
    try:
        with allow_join_result():  # in a CPU task, too: the task waited for runs on a GPU
            form = as_form(result.get(timeout=FETCH_S))
    except HandleLost:
        if handle.kept is None:
            raise
        return stores.get(handle.kept)
    finally:
        result.forget()
    if not isinstance(form, ArrayRef):
        return numpy.asarray(form.get())
    try:
        return stores.get(form)
    finally:
        stores.delete(form)


def _send(stores: Stores, handle: DeviceArray, task: str, *args: Any, **options: Any) -> Any:
    """Send a task of ours to where the task came from that made an array."""
    exchange, routing_key = handle.route
    if exchange:
        options |= {"exchange": exchange, "routing_key": routing_key}
    elif routing_key:  # the default exchange: a queue's name. Celery would take the app's default queue instead
        options["queue"] = routing_key
    return stores.app.send_task(task, args, **options)


# ---- in messages and results


def _encoded(value: Any) -> Any:
    """JSON of an array, or of a form."""
    if not isinstance(value, Form):
        value = foreign.on_host(value)
        # What a body asks Celery to send, the driver sends: it must not wait for a store.
        is_inline = arrays.passes_on or value.nbytes <= settings().data_inline_bytes
        value = Inline.of(value) if is_inline else put(value)
    return value.model_dump(mode="json")


def _decoded(value: Any) -> Any:
    """A form, or in a producer the array or the bytes; there a handle stays one, so that it can be sent on."""
    try:
        form = as_form(value)
    except ValueError:
        if arrays.keeps_forms:  # a worker would drop the message: the task's check says what is wrong with it
            return value
        raise
    if arrays.keeps_forms or not isinstance(form, Form) or unread.wait_for_the_whole():
        return form
    return _value_of(form)


def _value_of(form: Form) -> Any:
    return form if isinstance(form, DeviceArray) and not _is_child else form.get()


@cache
def _stores_of(app: Any) -> Stores:
    return Stores(app, settings().stores)


def _stores() -> Stores:
    return _stores_of(current_app._get_current_object())


for _type in (numpy.ndarray, foreign.CupyArray, Inline, ArrayRef, DeviceArray):
    register_type(_type, MARKER, _encoded, _decoded)
for _form_type in (InlineBytes, BlobRef):
    register_type(_form_type, BLOB_MARKER, _encoded, _decoded)
unread.adopt(_value_of, lambda: _is_child)
use_ray()
arrays.opener = lambda ref, most_bytes=None: _stores().get(ref, most_bytes)
handles.fetcher = lambda handle: _of_device(_stores(), handle)
_is_child = False  # of a worker: what it gets is for a body


@signals.worker_init.connect
def _keep_forms(**_: Any) -> None:
    """A worker's main process passes messages on."""
    arrays.keeps_forms = True


@signals.worker_process_init.connect
def _open_forms(**_: Any) -> None:
    """In a prefork child a message is read when its task runs: it gets the arrays."""
    global _is_child
    arrays.keeps_forms, _is_child = False, True
