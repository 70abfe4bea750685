"""Where large data lie while a message carries a reference to them: Redis, or what fsspec opens below an allowed root.

A store is used by whoever makes the data (a producer, an executor) and whoever needs them (an executor, a producer),
never by the worker or the driver. A reference names a place, never an address or a password of Redis: each reader has
its own configuration. What is written in Redis expires; so does nothing in a file store, whose owner sets a life cycle.
"""

import importlib
import os
import posixpath
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy
import redis
import xxhash
from redis.backoff import NoBackoff
from redis.retry import Retry

from actors.arrays import ArrayRef
from actors.contract import StoreConfig
from actors.errors import DataCorrupt, DataLost, DataRefused, StoreUnavailable
from actors.shared_redis import shared_redis
from actors.sizes import readable

#: One value in Redis; a larger array is kept in several, for Redis serves nobody else while it sends one.
CHUNK_BYTES = 4 << 20
#: What keys of data begin with, after the app's own prefix.
KEY = "bridge-data-"


class Store(Protocol):
    """One place for bytes."""

    def write(self, data: memoryview, keep_s: float) -> str:
        """Keep `data` for so long; its URL.

        Raises:
            StoreUnavailable: it does not answer, or has no room.
        """
        ...

    def read(self, url: str, size_bytes: int) -> Iterator[Any]:
        """The bytes, in pieces.

        Raises:
            DataLost, DataCorrupt, DataRefused, StoreUnavailable: as their docstrings say.
        """
        ...

    def delete(self, url: str, size_bytes: int) -> None:
        """Forget it; nothing happens if it is gone.

        Raises:
            DataRefused, StoreUnavailable: as their docstrings say.
        """
        ...


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
                self._client.set(key, piece, px=max(1, round(keep_s * 1000)))
        except redis.RedisError as error:
            self._forget(name, data.nbytes)
            raise StoreUnavailable(f"Redis did not take {readable(data.nbytes)}: {_text(error)}") from error
        return f"redis:{name}"

    def read(self, url: str, size_bytes: int) -> Iterator[Any]:
        """As `Store.read`."""
        for key in self._keys(_name(url), size_bytes):
            try:
                piece = self._client.get(key)
            except redis.RedisError as error:
                raise StoreUnavailable(f"Redis did not answer: {_text(error)}") from error
            if piece is None:
                raise DataLost(f"{url} is not in Redis: it has expired, was deleted, or is in another Redis")
            yield piece

    def delete(self, url: str, size_bytes: int) -> None:
        """As `Store.delete`."""
        try:
            self._client.unlink(*self._keys(_name(url), size_bytes))
        except redis.RedisError as error:
            raise StoreUnavailable(f"Redis did not answer: {_text(error)}") from error

    def _forget(self, name: str, size_bytes: int) -> None:
        """What has been written of data that were not taken; it expires in any case."""
        with suppress(redis.RedisError):
            self._client.unlink(*self._keys(name, size_bytes))

    def _keys(self, name: str, size_bytes: int) -> list[str]:
        count = max(1, -(-size_bytes // CHUNK_BYTES))
        return [f"{self._prefix}{KEY}{name}-{number}" for number in range(count)]


class FsspecStore:
    """Data below allowed roots, in whatever fsspec opens: files, S3 and others."""

    def __init__(self, config: StoreConfig) -> None:
        self._roots = [root.rstrip("/") + "/" for root in config.roots]
        self._home = config.url.rstrip("/") + "/" if config.url and not config.url.startswith("redis") else ""
        if self._home:
            self._roots.append(self._home)

    def write(self, data: memoryview, keep_s: float) -> str:
        """As `Store.write`; who owns the place says how long it is kept."""
        url = f"{self._home}{uuid.uuid4().hex}"
        system, path = self._opened(url)
        with _answers(url):
            system.makedirs(posixpath.dirname(path), exist_ok=True)
            system.pipe_file(path, bytes(data))
        return url

    def read(self, url: str, size_bytes: int) -> Iterator[Any]:
        """As `Store.read`."""
        system, path = self._opened(url)
        with _answers(url):
            found = system.info(path)["size"]
            if found != size_bytes:
                raise DataCorrupt(f"{url} has {found} bytes, and the reference says {size_bytes}")
            with system.open(path, "rb") as file:
                while piece := file.read(CHUNK_BYTES):
                    yield piece

    def delete(self, url: str, size_bytes: int) -> None:
        """As `Store.delete`."""
        system, path = self._opened(url)
        with _answers(url):
            if system.exists(path):
                system.rm_file(path)

    def _opened(self, url: str) -> tuple[Any, str]:
        """fsspec's file system and its path of a URL below an allowed root.

        Raises:
            DataRefused: any other; the text names the roots.
        """
        place = allowed_place(url, self._roots)
        try:
            fsspec = importlib.import_module("fsspec")
            return fsspec.core.url_to_fs(place)  # type: ignore[no-any-return]
        except ImportError as error:
            raise StoreUnavailable(f"{url} needs a package that is not installed here: {_text(error)}") from error
        except Exception as error:
            raise StoreUnavailable(f"{url} cannot be opened: {_text(error)}") from error


def allowed_place(url: str, roots: list[str]) -> str:
    """The URL in plain form, when it lies below one of `roots`, each ending in a slash.

    Raises:
        DataRefused: it does not. What ``..``, ``%2e``, ``//`` or a link would make of it counts, not how it is written.
    """
    parts = urlsplit(url)
    plain = posixpath.normpath(parts.path)
    if parts.scheme == "file" or not parts.scheme:
        plain = os.path.realpath(parts.path)
        roots = [f"file://{os.path.realpath(urlsplit(root).path)}/" for root in roots if root.startswith("file:")]
    is_odd = "%" in url or "\\" in url or "?" in url or "#" in url or "::" in url or "@" in parts.netloc
    place = f"{parts.scheme}://{parts.netloc}{plain}"
    if is_odd or not any(place.startswith(root) for root in roots):
        names = ", ".join(roots) or "none"
        raise DataRefused(f"{url[:200]} is not below an allowed root (BRIDGE_DATA_ROOTS: {names})")
    return place


class Stores:
    """The stores of a process: Redis for ``redis:`` references, fsspec for all others.

    Args:
        app: the Celery app, whose Redis is used where the configuration names none.
        config: from `bridge/settings.py`, also where an executor runs.
    """

    def __init__(self, app: Any, config: StoreConfig) -> None:
        self._app, self._config = app, config
        self._redis: RedisStore | None = None
        self._fsspec = FsspecStore(config)

    def put(self, array: "numpy.ndarray[Any, Any]", keep_s: float | None = None, once: bool = False) -> ArrayRef:
        """Write an array; the reference that finds it.

        Raises:
            DataRefused: it is larger than BRIDGE_DATA_LIMIT_BYTES.
            StoreUnavailable: the store does not answer, has no room, or there is none.
        """
        array = numpy.asarray(array)  # not ascontiguousarray, which gives a scalar a dimension
        array = array if array.flags.c_contiguous else array.copy(order="C")
        self._check_size(array.nbytes)
        data = memoryview(array.reshape(-1).view(numpy.uint8) if array.size else b"")  # type: ignore[arg-type]
        wanted_s = self._config.keep_s if keep_s is None else keep_s
        home = self._fsspec if self._fsspec._home else self._in_redis()
        url = home.write(data, wanted_s)
        expires_at = time.time() + wanted_s if url.startswith("redis:") else None
        return ArrayRef(
            url=url, dtype=array.dtype.str, shape=array.shape, size_bytes=array.nbytes,
            checksum=f"xxh3:{xxhash.xxh3_64_hexdigest(data)}", expires_at=expires_at, once=once,
        )  # fmt: skip

    def pieces(self, ref: ArrayRef) -> Iterator[Any]:
        """The bytes of a reference, in pieces; they are right only if this ends without an error.

        Raises:
            DataLost, DataCorrupt, DataRefused, StoreUnavailable: as their docstrings say.
        """
        self._check_size(ref.size_bytes)
        digest, count = xxhash.xxh3_64(), 0
        for piece in self._store_of(ref).read(ref.url, ref.size_bytes):
            count += len(piece)
            if count > ref.size_bytes:
                break
            digest.update(piece)
            yield piece
        if count != ref.size_bytes:
            raise DataCorrupt(f"{ref.url} is not of the {ref.size_bytes} bytes that its reference says")
        kind, _, wanted = ref.checksum.partition(":")
        if kind == "xxh3" and digest.hexdigest() != wanted:
            raise DataCorrupt(f"{ref.url} has another checksum than its reference: it was damaged or replaced")
        if kind not in ("xxh3", ""):
            raise DataRefused(f"{ref.url}: checksums of kind {kind!r} are not known here; xxh3 is")

    def get(self, ref: ArrayRef) -> "numpy.ndarray[Any, Any]":
        """Read an array into the host's memory; errors as `pieces`."""
        target = numpy.empty(ref.shape, ref.dtype)
        flat, start = target.reshape(-1).view(numpy.uint8) if target.size else target, 0
        for piece in self.pieces(ref):
            flat[start : start + len(piece)] = numpy.frombuffer(piece, numpy.uint8)
            start += len(piece)
        return target

    def delete(self, ref: ArrayRef) -> None:
        """Forget what a reference points to; nothing happens if it is gone."""
        self._store_of(ref).delete(ref.url, ref.size_bytes)

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._config.limit_bytes:
            raise DataRefused(
                f"an array of {readable(size_bytes)}, more than BRIDGE_DATA_LIMIT_BYTES allows "
                f"({readable(self._config.limit_bytes)})"
            )

    def _store_of(self, ref: ArrayRef) -> Store:
        return self._in_redis() if ref.url.startswith("redis:") else self._fsspec

    def _in_redis(self) -> RedisStore:
        if self._redis is None:
            place = self._place()
            self._redis = RedisStore(*place)
        return self._redis

    def _place(self) -> tuple[Any, str]:
        config = self._config
        if config.url and config.url.startswith("redis"):
            timeouts = {"socket_timeout": config.timeout_s, "socket_connect_timeout": config.timeout_s}
            client = redis.Redis.from_url(config.url, **timeouts, retry=Retry(NoBackoff(), 1))
            return client, ""
        try:
            shared = shared_redis(self._app, config.timeout_s)
        except Exception as error:
            raise StoreUnavailable(f"the app's Redis does not answer: {_text(error)}") from error
        if shared is None:
            raise StoreUnavailable("the app has no Redis for large data: set BRIDGE_DATA_URL, to redis://... or a root")
        return shared.client, shared.prefix


def _name(url: str) -> str:
    name = url.removeprefix("redis:")
    if len(name) != 32 or not name.isalnum():
        raise DataRefused(f"{url[:80]} is no reference to data in Redis")
    return name


@contextmanager
def _answers(url: str) -> Iterator[None]:
    try:
        yield
    except (DataLost, DataCorrupt, DataRefused, StoreUnavailable):
        raise
    except FileNotFoundError as error:
        raise DataLost(f"{url} is not there") from error
    except Exception as error:
        raise StoreUnavailable(f"{url} cannot be read or written: {_text(error)}") from error


def _text(error: BaseException) -> str:
    """A foreign error's text, bounded; redis's own hold no password."""
    return f"{type(error).__name__}: {error}"[:200]
