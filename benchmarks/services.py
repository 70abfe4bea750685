"""The servers and workers of a run: started on free loopback ports in a folder of their own, ended by process id."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import redis

from benchmarks.approaches import ROOT
from bridge.worker.standalone import free_port, redis_binary

#: How long a server may take until it answers, and a process until it has ended, before it is killed.
START_S, STOP_S = 60.0, 15.0

#: Bytes; Ray accepts no less than 75 MB, and no-op tasks need none.
OBJECT_STORE_BYTES = 100_000_000


class StartFailed(Exception):
    """A server or worker did not come up; the text shows the end of its log."""


class Ended(StartFailed):
    """A server or worker ended that should run."""


class Running(NamedTuple):
    """A process of ours, and where it logs."""

    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raise if it has ended."""
        if self.process.poll() is not None:
            raise Ended(f"{self.log.stem} ended with exit code {self.process.returncode}\n{self.log_tail()}")

    def log_tail(self, lines: int = 25) -> str:
        """What it last said."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Cluster(NamedTuple):
    """A local Ray cluster and what a process needs to join it."""

    running: Running
    address: str
    env: Mapping[str, str]
    gpus: int


@contextmanager
def started(command: list[str], folder: Path, name: str, env: Mapping[str, str], cwd: Path = ROOT) -> Iterator[Running]:
    """A process with a log in `folder`; at the end it and everything it started is gone."""
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield Running(process, log)
    finally:
        stop(process)


#: Trees of processes that were asked to end, by the pid of their root: as they were when they were asked.
_asked: dict[int, list[psutil.Process]] = {}


def ask_to_end(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM, once; `stop` waits."""
    if process.poll() is None and process.pid not in _asked:
        root = psutil.Process(process.pid)
        _asked[process.pid] = [root, *root.children(recursive=True)]
        process.terminate()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and kill what is left of its tree after `STOP_S`."""
    ask_to_end(process)
    _, left = psutil.wait_procs(_asked.pop(process.pid, []), timeout=STOP_S)
    for member in left:
        member.kill()
    process.wait()


@contextmanager
def redis_server(folder: Path) -> Iterator[tuple[Running, str]]:
    """An empty Redis without persistence, and its URL without a database."""
    port = free_port()
    command = [redis_binary(), "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)]
    with started(command, folder, "redis", {}) as server, redis.Redis(port=port) as client:
        await_start(server, lambda: bool(client.ping()))
        yield server, f"redis://127.0.0.1:{port}"


@contextmanager
def ray_cluster(folder: Path, gpus: int = 1, name: str = "ray") -> Iterator[Cluster]:
    """A one-node cluster with logical GPUs. Ray listens beyond loopback whatever it is told, so it gets a token.

    One CPU is declared for each GPU's actor and one more, whatever the machine has.
    """
    port = free_port()
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
        "--include-dashboard=false", "--include-log-monitor=false", "--node-ip-address=127.0.0.1", f"--port={port}",
        "--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0", f"--num-cpus={gpus + 1}",
        f"--num-gpus={gpus}",
        f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder / name}",
    ]  # fmt: skip
    env = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),  # Ray may lie there
    }
    with started(command, folder, f"{name}-start", env) as head:
        await_start(head, lambda: "block forever" in head.log.read_text(errors="replace"))
        yield Cluster(head, f"127.0.0.1:{port}", env, gpus)


def await_start(server: Running, answers: Callable[[], bool]) -> None:
    """Return once `answers` says so."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        server.check()
        try:
            if answers():
                return
        except redis.ConnectionError:
            pass
        time.sleep(0.05)
    raise StartFailed(f"no answer within {START_S} s\n{server.log_tail()}")
