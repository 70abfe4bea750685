"""Which places data may be read from, and what references say of them. Touches nothing but links in the file system."""

import os
import posixpath
import re
from urllib.parse import urlsplit

from actors.errors import DataRefused

#: What BRIDGE_DATA_URL and `data.put(array, store=...)` call Ray's object store.
RAY = "ray"


def is_redis(url: str) -> bool:
    """Whether BRIDGE_DATA_URL names a Redis."""
    return url.startswith(("redis://", "rediss://", "unix://"))


def name_in(url: str) -> str:
    """The random name in a reference to data in Redis or in Ray's object store.

    Raises:
        DataRefused: it holds something else.
    """
    name = url.partition(":")[2]
    if len(name) != 32 or not name.isalnum():
        raise DataRefused(f"{url[:80]} is no reference to data in Redis, nor in Ray's object store")
    return name


def known_size(url: str, size_bytes: int | None) -> int:
    """The size that a reference to such data tells.

    Raises:
        DataRefused: it does not.
    """
    if size_bytes is None:
        raise DataRefused(f"{url}: a reference to such data tells their size_bytes")
    return size_bytes


def allowed_place(url: str, roots: list[str]) -> str:
    """The URL in plain form, when it lies below one of `roots`, each ending in a slash.

    Raises:
        DataRefused: it does not. What ``..``, ``%2e``, ``//`` or a link would make of it counts, not how it is written.
            The text names no root and no other place: whoever sends tasks reads it.
    """
    shown = re.sub(r"//[^/]*@", "//...@", url).partition("?")[0][:200]  # no password, no signature
    refused = DataRefused(f"{shown!r} is not below an allowed root: BRIDGE_DATA_ROOTS lists them")
    if not url.isprintable() or any(odd in url for odd in ("%", "\\", "?", "#", "::")):
        raise refused
    try:
        parts = urlsplit(url)
    except ValueError:
        raise refused from None
    if url != url.strip() or not url.startswith(f"{parts.scheme}:"):  # what is read otherwise than it is written
        raise refused
    plain = posixpath.normpath(parts.path)
    if parts.scheme == "file":
        plain = os.path.realpath(parts.path)
        roots = [f"file://{os.path.realpath(urlsplit(root).path)}/" for root in roots if root.startswith("file:")]
    place = f"{parts.scheme}://{parts.netloc}{plain}"
    if not any(place.startswith(root) for root in roots):
        raise refused
    return place
