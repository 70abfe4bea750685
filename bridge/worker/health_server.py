"""In the worker: answers /livez, /readyz and /health on a private socket, and on a port if one is set.

Threads of its own, so it answers whatever the worker's main thread, drivers and actors are doing. A request reads what
the main thread has noted last (`vitals.py`) and asks nobody.
"""

import json
import logging
import os
import socket
import socketserver
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from bridge.errors import ConfigurationInvalid
from bridge.health import socket_of

logger = logging.getLogger(__name__)

#: What an answer's status is made of, by path; all three say why in their body.
PATHS = {"/livez": ("live",), "/readyz": ("ready",), "/health": ("live", "ready")}
#: What the two short answers hold.
_SHORT = ("worker", "state", "live", "ready", "reasons")
#: Requests answered at the same time, at most; one more is closed unanswered.
MOST_REQUESTS = 8
#: A client has this long for its request and for taking the answer, in seconds.
REQUEST_S = 5.0
#: How often the server looks for clients that have had their time, and whether it is to end, in seconds.
LOOK_S = 0.2

Account = Callable[[], dict[str, Any]]


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"
    server_version, sys_version = "bridge", ""
    timeout = REQUEST_S

    def do_GET(self) -> None:
        """Answer one of `PATHS`."""
        asked = PATHS.get(self.path.partition("?")[0])
        if asked is None:
            self._answer(HTTPStatus.NOT_FOUND, {"paths": list(PATHS)})
            return
        account = self.server.account()
        status = HTTPStatus.OK if all(account[key] for key in asked) else HTTPStatus.SERVICE_UNAVAILABLE
        self._answer(status, account if len(asked) > 1 else {key: account[key] for key in _SHORT})

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds: nothing is logged."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 2 * MOST_REQUESTS

    def __init__(self, family: socket.AddressFamily, address: Any, account: Account) -> None:
        self.address_family = family
        self.account = account
        self._open: dict[Any, float] = {}  # connections, and until when they may last
        super().__init__(address, _Handler)
        os.register_at_fork(after_in_child=self.socket.close)  # or a child would keep it open when the worker is gone
        threading.Thread(target=self.serve_forever, args=(LOOK_S,), name="health", daemon=True).start()

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of the host's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """One thread per request, within bounds."""
        if len(self._open) >= MOST_REQUESTS:
            self.shutdown_request(request)
            return
        self._open[request] = time.monotonic() + REQUEST_S
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """A request has been answered or given up."""
        self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """A client that sends a letter now and then must not hold its place for ever."""
        for request, until in list(self._open.items()):
            if time.monotonic() > until:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)  # its thread sees the end

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has left is nobody's problem; anything else is told."""
        logger.debug("a health request failed", exc_info=True)


class HealthServer:
    """The endpoints of one worker."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._servers: list[_Server] = []
        self._path: Path | None = None

    def open_socket(self, directory: Path, worker: str) -> None:
        """For `python -m bridge.health`. Without the socket the worker works, so a failure is only said."""
        try:
            _make_private(directory)
            _clear_away(directory)
            self._path = socket_of(directory, worker, os.getpid())
            self._path.unlink(missing_ok=True)  # of this process before SIGHUP
            self._servers.append(_Server(socket.AF_UNIX, str(self._path), self._account))
            self._path.chmod(0o600)
        except OSError as error:
            logger.warning(
                "`python -m bridge.health` will not find this worker: %s: %s; set BRIDGE_RUNTIME_DIR to a folder that "
                "belongs to its user, or make room", directory, error,
            )  # fmt: skip

    def open_port(self, host: str, port: int) -> None:
        """For probes over HTTP.

        Raises:
            ConfigurationInvalid: it cannot be listened to there.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._servers.append(_Server(family, (host, port), self._account))
        except (OSError, OverflowError) as error:
            raise ConfigurationInvalid(
                f"BRIDGE_HEALTH_ADDRESS: nothing can listen at {host}:{port}: {error}; "
                "each worker of a host needs a port of its own"
            ) from error

    def close(self) -> None:
        """Answer nobody any more."""
        servers, self._servers = self._servers, []
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        for server in servers:
            server.shutdown()
            server.server_close()


def _make_private(directory: Path) -> None:
    """Raises OSError when others could put sockets of their own there."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError("it belongs to somebody else, or others may write there")


def _clear_away(directory: Path) -> None:
    """Sockets of workers that were killed."""
    for path in directory.glob("*.sock"):
        with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(LOOK_S)
            try:
                sock.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
