"""Large data below allowed roots: on web servers, and in whatever fsspec opens: files, S3 and others."""

import importlib
import posixpath
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded

from actors.contract import StoreConfig
from actors.data.roots import RAY, allowed_place, is_redis
from actors.data.web import fetch
from actors.errors import DataCorrupt, DataError, DataLost, DataRefused, StoreUnavailable

#: Read from a file at once, in bytes.
PIECE_BYTES = 1 << 20
#: The name of what `RootedStore.write` makes.
_IS_OURS = re.compile(r"[0-9a-f]{32}")


class RootedStore:
    """Data below allowed roots: on web servers, and in whatever fsspec opens: files, S3 and others.

    Nothing but what `write` has made, below BRIDGE_DATA_URL, is ever deleted.
    """

    def __init__(self, config: StoreConfig) -> None:
        self._timeout_s = config.timeout_s
        self.home = (
            config.url.rstrip("/") + "/" if config.url and config.url != RAY and not is_redis(config.url) else ""
        )
        self._roots = [root.rstrip("/") + "/" for root in config.roots] + ([self.home] if self.home else [])

    def write(self, data: memoryview, keep_s: float) -> str:
        """As `Store.write`; who owns the place says how long it is kept."""
        url = f"{self.home}{uuid.uuid4().hex}"
        system, path = self._opened(url, [self.home])
        try:
            with _answers(url):
                if url.startswith("file:"):  # elsewhere this would make a bucket, by whoever mistypes its name
                    system.makedirs(posixpath.dirname(path), exist_ok=True)
                system.pipe_file(path, bytes(data))
        except BaseException as error:  # a full disk, an interrupt of the body
            with suppress(Exception):
                system.rm_file(path)
            if isinstance(error, DataLost):
                raise StoreUnavailable(f"{url} cannot be written: there is no such folder or bucket") from error
            raise
        return url

    def read(self, url: str, size_bytes: int | None, most_bytes: int) -> Iterator[Any]:
        """As `Store.read`."""
        place = allowed_place(url, self._roots)
        if place.startswith(("http://", "https://")):  # never through fsspec, which follows redirects anywhere
            yield from fetch(place, most_bytes if size_bytes is None else size_bytes, self._timeout_s)
            return
        system, path = self._opened(url, self._roots)
        with _answers(url):
            info = system.info(path)
            if info["type"] != "file":  # a folder, a pipe, a device
                raise FileNotFoundError(url)
            if size_bytes is not None and info["size"] not in (size_bytes, None):
                raise DataCorrupt(f"{url} has {info['size']} bytes, and the reference says {size_bytes}")
            with system.open(path, "rb") as file:
                while piece := file.read(PIECE_BYTES):
                    yield piece

    def delete(self, url: str, size_bytes: int | None) -> None:
        """As `Store.delete`."""
        system, path = self._opened(url, [self.home] if self.home else [])
        if not _IS_OURS.fullmatch(url.removeprefix(self.home)):
            raise DataRefused("only what `put` has made is deleted")
        with _answers(url):
            if system.exists(path):
                system.rm_file(path)

    def _opened(self, url: str, roots: list[str]) -> tuple[Any, str]:
        """fsspec's file system and its path of a URL below an allowed root.

        Raises:
            DataRefused: any other.
            StoreUnavailable: a package is not installed here, or the file system cannot be had.
        """
        place = allowed_place(url, roots)
        try:
            fsspec = importlib.import_module("fsspec")
            return fsspec.core.url_to_fs(place)  # type: ignore[no-any-return]
        except ImportError as error:
            raise StoreUnavailable(f"{url} needs a package that is not installed here: {reason_of(error)}") from error
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:
            raise StoreUnavailable(f"{url} cannot be opened: {reason_of(error)}") from error


@contextmanager
def _answers(url: str) -> Iterator[None]:
    try:
        yield
    except (DataError, SoftTimeLimitExceeded):
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DataLost(f"{url} is not there") from error
    except PermissionError as error:
        raise DataRefused(f"{url} may not be read or written by this process") from error
    except Exception as error:
        raise StoreUnavailable(f"{url} cannot be read or written: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """A foreign error's text, bounded: Redis' own hold no password, and of the system's goes the reason alone."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"[:200]
