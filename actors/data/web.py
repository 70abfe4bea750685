"""Files on web servers below allowed roots, over HTTP and HTTPS.

Not through fsspec: it follows redirects to anywhere, takes the page of one it may not follow for the file, and believes
what a server says of a size. Here a redirect is an error, no piece may take longer than BRIDGE_DATA_TIMEOUT_S however
slowly its bytes come, proxies named in the environment are not used, and what was cut off is noticed.
"""

import http.client
import io
import ssl
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import quote, urlsplit

from actors.errors import DataCorrupt, DataLost, DataRefused, StoreUnavailable
from actors.sizes import readable

#: What must come within BRIDGE_DATA_TIMEOUT_S; by default at least 25 kB/s.
PIECE_BYTES = 256 << 10


def fetch(place: str, most_bytes: int, timeout_s: float) -> Iterator[bytes]:
    """The bytes of a file, in pieces; they are all there only if this ends without an error.

    Args:
        place: its URL, which has been allowed.
        most_bytes: one byte more is an error, whatever the server says of the size.
        timeout_s: to connect, to answer, and for each piece.

    Raises:
        DataLost, DataCorrupt, DataRefused, StoreUnavailable: as their docstrings say.
    """
    parts = urlsplit(place)
    secure = parts.scheme == "https"
    connection = (
        http.client.HTTPSConnection(parts.netloc, timeout=timeout_s, context=ssl.create_default_context())
        if secure
        else http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
    )
    with closing(connection):
        try:
            connection.connect()
            with closing(connection.sock) as sock:
                connection.sock = patient = _Patient(sock, timeout_s)
                connection.request("GET", quote(parts.path))
                with closing(connection.getresponse()) as response:
                    _check_status(place, response.status)
                    yield from _pieces(place, response, most_bytes, patient)
        except http.client.IncompleteRead as error:
            raise DataCorrupt(f"{place} was cut off by its server") from error
        except (OSError, http.client.HTTPException) as error:
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise StoreUnavailable(f"{place} cannot be read: {text[:200]}") from error


def _pieces(place: str, response: http.client.HTTPResponse, most_bytes: int, patient: "_Patient") -> Iterator[bytes]:
    count = 0
    while True:
        patient.begin()
        # one byte beyond tells that there is more, and a server that says so is believed at once
        piece = response.read(min(PIECE_BYTES, most_bytes - count + 1)) if (response.length or 0) <= most_bytes else b""
        count += len(piece)
        if count > most_bytes or (response.length or 0) > most_bytes:
            raise DataRefused(f"{place} has more than {readable(most_bytes)}, which is what may be read of it")
        if not piece:
            break
        yield piece
    if response.length:
        raise DataCorrupt(f"{place} was cut off by its server, {readable(response.length)} before its end")


def _check_status(place: str, status: int) -> None:
    if status == http.client.OK:
        return
    if 300 <= status < 400:
        raise DataRefused(f"{place} is answered with a redirect, which is not followed: name the place it leads to")
    if status in (http.client.NOT_FOUND, http.client.GONE):
        raise DataLost(f"{place} is not there")
    if status in (http.client.UNAUTHORIZED, http.client.FORBIDDEN):
        raise DataRefused(f"{place} is refused by its server ({status})")
    raise StoreUnavailable(f"{place} cannot be read: its server answers {status}")


class _Patient:
    """A connected socket as `http.client` uses it, whose reads together take no longer than is allowed."""

    def __init__(self, sock: Any, timeout_s: float) -> None:
        self._sock, self._timeout_s = sock, timeout_s
        self.begin()

    def begin(self) -> None:
        """Time counts from now."""
        self._ends = time.monotonic() + self._timeout_s

    def sendall(self, data: Any) -> None:
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Raw(self))

    def close(self) -> None:
        """Nothing: `http.client` is done with it before the answer is read; `fetch` closes the socket."""

    def receive(self, buffer: Any) -> int:
        left_s = self._ends - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(left_s)
        count: int = self._sock.recv_into(buffer)
        return count


class _Raw(io.RawIOBase):
    def __init__(self, patient: _Patient) -> None:
        self._patient = patient

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._patient.receive(buffer)
