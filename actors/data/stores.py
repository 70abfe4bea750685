"""Where large data lie while a message carries a reference to them: Redis, a place below an allowed root, or Ray.

A store is used by whoever makes the data (a producer, an executor) and whoever needs them (an executor, a producer),
never by the worker or the driver. A reference names a place, never an address or a password of Redis: each reader has
its own configuration. What is written in Redis expires; so does nothing in a file store, whose owner sets a life cycle.
"""

import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, Protocol

import numpy
import redis
import xxhash
from redis.backoff import NoBackoff
from redis.connection import PythonRespSerializer
from redis.retry import Retry

from actors.contract import StoreConfig
from actors.data.ahead import LEAST_BYTES, Shelf, Wanted
from actors.data.arrays import ArrayRef, assembled
from actors.data.blobs import BlobRef
from actors.data.redis_values import CHUNK_BYTES, get_into, key_of
from actors.data.rooted_store import RootedStore, reason_of
from actors.data.roots import RAY, is_redis, known_size, name_in
from actors.data.shared_redis import shared_redis
from actors.errors import DataCorrupt, DataLost, DataRefused, StoreUnavailable
from actors.sizes import readable

#: Above this a value leaves as it lies in memory, in bytes. redis-py's packer in C copies each: 1 MiB takes four times
#: as long to write.
_APART_BYTES = 1 << 14

Ref = ArrayRef | BlobRef


def _encoded(value: Any) -> Any:
    return value if isinstance(value, bytes | memoryview) else str(value).encode()


#: Of redis-py's connections.
_OPTIONS = {"command_packer": PythonRespSerializer(_APART_BYTES, _encoded)}


class Store(Protocol):
    """One place for bytes."""

    def write(self, data: memoryview, keep_s: float) -> str:
        """Keep `data` for so long; its URL.

        Raises:
            StoreUnavailable: it does not answer, or has no room.
        """
        ...

    def read(self, url: str, size_bytes: int | None, most_bytes: int) -> Iterator[Any]:
        """The bytes, in pieces.

        Args:
            url: where they are.
            size_bytes: how many there must be; None where only the server knows.
            most_bytes: more than these are an error.

        Raises:
            DataLost, DataCorrupt, DataRefused, StoreUnavailable: as their docstrings say.
        """
        ...

    def delete(self, url: str, size_bytes: int | None) -> None:
        """Forget it; nothing happens if it is gone.

        Raises:
            DataRefused, StoreUnavailable: as their docstrings say.
        """
        ...


class BriefStore(Store, Protocol):
    """Ray's object store."""

    def write(self, data: memoryview, keep_s: float, is_brief: bool = False) -> str:
        """As `Store.write`; `is_brief` data end with the actor that makes them."""
        ...


#: How this process reaches Ray's object store, for an app and as configured; it raises StoreUnavailable where it does
#: not. `bridge/object_store.py` sets it, and in executors their start.
reach_ray: "Callable[[Any, StoreConfig], BriefStore] | None" = None


#: What this process's actor has read ahead; only executors have one.
shelf: Shelf | None = None


def worth_reading_ahead(refs: Iterable[Ref]) -> tuple[Wanted, ...]:
    """What an actor may read while its executor is busy: large data in Redis."""
    found = []
    for ref in refs:
        if ref.url.startswith("redis:") and (ref.size_bytes or 0) >= LEAST_BYTES:
            with suppress(DataRefused):  # the executor refuses it, too, and says so
                found.append(Wanted(name_in(ref.url), ref.size_bytes or 0))
    return tuple(found)


class RedisStore:
    """Data in Redis, under keys of their own that expire."""

    def __init__(self, client: Any, prefix: str) -> None:
        self._client, self._prefix = client, prefix

    def write(self, data: memoryview, keep_s: float) -> str:
        """As `Store.write`."""
        name = uuid.uuid4().hex
        try:
            for number, key in enumerate(self._keys(name, data.nbytes)):
                piece = data[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
                self._ask(self._client.set, key, piece, px=max(1, round(keep_s * 1000)))
        except redis.RedisError as error:
            if isinstance(error, redis.ResponseError):  # it answers: what it has taken goes at once
                self._forget(name, data.nbytes)
            raise StoreUnavailable(f"Redis did not take {readable(data.nbytes)}: {reason_of(error)}") from error
        return f"redis:{name}"

    def read(self, url: str, size_bytes: int | None, most_bytes: int) -> Iterator[Any]:
        """As `Store.read`."""
        name, size = name_in(url), known_size(url, size_bytes)
        room = numpy.empty(min(size, CHUNK_BYTES), numpy.uint8).data
        for number, key in enumerate(self._keys(name, size)):
            target = room[: size - number * CHUNK_BYTES]
            try:
                piece = (shelf and shelf.piece(name, number)) or self._value(key, target)
            except redis.RedisError as error:
                raise StoreUnavailable(f"Redis did not answer: {reason_of(error)}") from error
            if piece is None:
                raise DataLost(f"{url} is not in Redis: it has expired, was deleted, or is in another Redis")
            yield piece
        if shelf is not None and size >= LEAST_BYTES:
            with suppress(redis.RedisError, OSError, AttributeError):  # it is for speed alone
                shelf.lend(self._client.connection_pool, self._prefix)

    def delete(self, url: str, size_bytes: int | None) -> None:
        """As `Store.delete`."""
        try:
            self._client.unlink(*self._keys(name_in(url), known_size(url, size_bytes)))
        except redis.RedisError as error:
            raise StoreUnavailable(f"Redis did not answer: {reason_of(error)}") from error

    def _value(self, key: str, target: memoryview) -> Any:
        """A value, in `target` if it is of that size; None where there is none.

        Raises:
            redis.RedisError: as the client says.
        """
        pool, is_there = self._client.connection_pool, False
        connection = pool.get_connection()
        try:
            is_there = get_into(connection._sock, key, target)
        except TimeoutError as error:
            raise redis.TimeoutError("it did not answer in time") from error
        except (OSError, AttributeError):  # it has gone meanwhile, or redis-py keeps its socket elsewhere
            pass
        finally:
            if not is_there:
                connection.disconnect()
            pool.release(connection)
        return target if is_there else self._ask(self._client.get, key)  # the client knows what else Redis may say

    def _ask(self, command: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What Redis answers.

        Raises:
            redis.RedisError: as the client says.
        """
        try:
            return command(*args, **options)
        except redis.RedisError:
            raise
        except BaseException:  # an interrupt, perhaps before the answer was read, which would be the next question's
            self._client.connection_pool.disconnect()
            raise

    def _forget(self, name: str, size_bytes: int) -> None:
        """What has been written of data that were not taken; it expires in any case."""
        with suppress(redis.RedisError):
            self._client.unlink(*self._keys(name, size_bytes))

    def _keys(self, name: str, size_bytes: int) -> list[str]:
        count = max(1, -(-size_bytes // CHUNK_BYTES))
        return [key_of(self._prefix, name, number) for number in range(count)]


class Stores:
    """The stores of a process: Redis for ``redis:`` references, Ray's for ``ray:``, fsspec for all others.

    Args:
        app: the Celery app, whose Redis is used where the configuration names none.
        config: from `bridge/settings.py`, also where an executor runs.
    """

    def __init__(self, app: Any, config: StoreConfig) -> None:
        self.app, self._config = app, config
        self._redis: RedisStore | None = None
        self._rooted = RootedStore(config)

    def put(
        self,
        array: "numpy.ndarray[Any, Any]",
        keep_s: float | None = None,
        once: bool = False,
        store: str | None = None,
        is_brief: bool = False,
    ) -> ArrayRef:
        """Write an array; the reference that finds it.

        Args:
            array: of numbers.
            keep_s: for so long, where data expire; default BRIDGE_DATA_KEEP_S.
            once: delete it when its task has ended.
            store: "ray", or None for the one that BRIDGE_DATA_URL says.
            is_brief: in Ray's object store it may end with this process.

        Raises:
            DataRefused: it is larger than BRIDGE_DATA_LIMIT_BYTES.
            StoreUnavailable: the store does not answer, has no room, or there is none.
        """
        array = numpy.asarray(array)  # not ascontiguousarray, which gives a scalar a dimension
        array = array if array.flags.c_contiguous else array.copy(order="C")
        data = memoryview(array.reshape(-1).view(numpy.uint8) if array.size else b"")  # type: ignore[arg-type]
        written = self._write(data, keep_s, store, is_brief)
        return ArrayRef(dtype=array.dtype.str, shape=array.shape, once=once, **written)

    def put_for_actor(self, array: "numpy.ndarray[Any, Any]") -> ArrayRef:
        """Write an array that a task on another actor waits for: through Ray, or where that takes none as ever."""
        try:
            return self.put(array, store=RAY, is_brief=True)
        except StoreUnavailable:
            return self.put(array)

    def put_bytes(
        self, data: Any, keep_s: float | None = None, once: bool = False, store: str | None = None
    ) -> BlobRef:
        """Write bytes; the reference that finds them. Arguments and errors as `put`."""
        return BlobRef(once=once, **self._write(memoryview(data).cast("B"), keep_s, store))

    def pieces(self, ref: Ref, most_bytes: int | None = None) -> Iterator[Any]:
        """The bytes of a reference, in pieces; they are right only if this ends without an error.

        Args:
            ref: the reference.
            most_bytes: of a file whose size its reference does not tell, at most.

        Raises:
            DataRefused: at once, if they are too many.
            DataLost, DataCorrupt, DataRefused, StoreUnavailable: as their docstrings say.
        """
        self._check_size(ref.size_bytes)
        limit_bytes = self._config.limit_bytes
        return self._checked(ref, limit_bytes if most_bytes is None else min(most_bytes, limit_bytes))

    def get(self, ref: Ref, most_bytes: int | None = None) -> Any:
        """Read an array or bytes into the host's memory; errors as `pieces`.

        In a process that has joined Ray's cluster an array in Ray's object store is not copied, and read-only.
        """
        pieces = self.pieces(ref, most_bytes)
        if isinstance(ref, BlobRef):
            return b"".join(map(bytes, pieces))  # each as it comes: the next may take its place
        store = self._store_of(ref)
        if hasattr(store, "lend"):
            return store.lend(ref.url, ref.size_bytes).view(ref.dtype).reshape(ref.shape)
        return assembled(pieces, ref.shape, ref.dtype)

    def delete(self, ref: Ref) -> None:
        """Forget what a reference points to; nothing happens if it is gone.

        Raises:
            DataRefused: it is not what `put` makes: nothing below BRIDGE_DATA_ROOTS is ever deleted.
            StoreUnavailable: the store does not answer.
        """
        self._check_size(ref.size_bytes)  # or a lie about it makes millions of names
        self._store_of(ref).delete(ref.url, ref.size_bytes)

    def _write(
        self, data: memoryview, keep_s: float | None, store: str | None = None, is_brief: bool = False
    ) -> dict[str, Any]:
        if store not in (None, RAY):
            raise ValueError(f'store is "{RAY}", or None for where BRIDGE_DATA_URL says; not {store!r}')
        self._check_size(data.nbytes)
        wanted_s = self._config.keep_s if keep_s is None else keep_s
        if not 0 < wanted_s < math.inf:
            raise ValueError(f"keep_s is for how many seconds data are kept, more than 0 and not {keep_s!r}")
        if (store or self._config.url) == RAY:  # without a checksum: no object of Ray's ever changes
            if data.nbytes > self._config.ray_bytes:  # before it is copied anywhere
                allowed = readable(self._config.ray_bytes)
                raise StoreUnavailable(
                    f"Ray's object store takes no {readable(data.nbytes)}: BRIDGE_DATA_RAY_BYTES allows {allowed}"
                )
            url, checksum = self._in_ray().write(data, wanted_s, is_brief), ""
        else:
            home: Store = self._rooted if self._rooted.home else self._in_redis()
            url, checksum = home.write(data, wanted_s), f"xxh3:{xxhash.xxh3_64_hexdigest(data)}"
        expires_at = time.time() + wanted_s if url.startswith(("redis:", "ray:")) else None
        return {"url": url, "size_bytes": data.nbytes, "checksum": checksum, "expires_at": expires_at}

    def _checked(self, ref: Ref, most_bytes: int) -> Iterator[Any]:
        digest, count = xxhash.xxh3_64(), 0
        for piece in self._store_of(ref).read(ref.url, ref.size_bytes, most_bytes):
            count += len(piece)
            if ref.size_bytes is None and count > most_bytes:
                raise DataRefused(f"{ref.url} has more than {readable(most_bytes)}, which is what may be read of it")
            if ref.size_bytes is not None and count > ref.size_bytes:
                break
            digest.update(piece)
            yield piece
        if ref.size_bytes not in (count, None):
            raise DataCorrupt(f"{ref.url} is not of the {ref.size_bytes} bytes that its reference says")
        kind, _, wanted = ref.checksum.partition(":")
        if kind == "xxh3" and digest.hexdigest() != wanted:
            raise DataCorrupt(f"{ref.url} has another checksum than its reference: it was damaged or replaced")
        if kind not in ("xxh3", ""):
            raise DataRefused(f"{ref.url}: checksums of kind {kind!r} are not known here; xxh3 is")

    def _check_size(self, size_bytes: int | None) -> None:
        if size_bytes is not None and size_bytes > self._config.limit_bytes:
            raise DataRefused(
                f"data of {readable(size_bytes)}, more than BRIDGE_DATA_LIMIT_BYTES allows "
                f"({readable(self._config.limit_bytes)})"
            )

    def _store_of(self, ref: Ref) -> Store:
        if ref.url.startswith("ray:"):
            return self._in_ray()
        return self._in_redis() if ref.url.startswith("redis:") else self._rooted

    def _in_ray(self) -> BriefStore:
        if reach_ray is None:
            raise StoreUnavailable("this process cannot reach Ray's object store: import bridge.data")
        return reach_ray(self.app, self._config)

    def _in_redis(self) -> RedisStore:
        if self._redis is None:
            place = self._place()
            self._redis = RedisStore(*place)
        return self._redis

    def _place(self) -> tuple[Any, str]:
        config = self._config
        if config.url and is_redis(config.url):
            timeouts = {"socket_timeout": config.timeout_s, "socket_connect_timeout": config.timeout_s}
            client, prefix = redis.Redis.from_url(config.url, **timeouts, **_OPTIONS), ""
        else:
            try:
                shared = shared_redis(self.app, config.timeout_s, _OPTIONS)
            except Exception as error:
                raise StoreUnavailable(f"the app's Redis does not answer: {reason_of(error)}") from error
            if shared is None:
                raise StoreUnavailable(
                    "the app has no Redis for large data: set BRIDGE_DATA_URL, to redis://... or a root"
                )
            client, prefix = shared.client, shared.prefix
        # A connection that went stale is made anew; one that hangs is not waited for twice.
        client.set_retry(Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)))
        return client, prefix
