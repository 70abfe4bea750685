"""Real services for the tests: Redis, Ray, and the real worker command, each a process taken down by pid."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import redis

from bridge.worker.standalone import free_port, redis_binary

ROOT = Path(__file__).resolve().parents[2]
#: The Redis of the tests: a program named here instead of the one `--standalone` would start.
REDIS = os.environ.get("TESTS_REDIS_SERVER") or redis_binary()
#: How long any wait of the tests may take before it counts as failed; generous, the machines are slow and shared.
PATIENCE_S = 60.0


def wait_for(condition, what, timeout_s=PATIENCE_S, every_s=0.05):
    """Wait until `condition()` is true and return what it returned; AssertionError names `what` after the timeout."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(every_s)


def inspected(app, name, what):
    """What a worker answers to `inspect what`. It is asked again: one that says "ready" may not listen on Redis yet."""
    inspect = app.control.inspect(destination=[name], timeout=5)
    return wait_for(lambda: inspect._request(what) or {}, f"{name} to answer", every_s=0)[name]


def keep_token(home, token):
    """Put a token where Ray looks for it: `ray start` then asks for it, and bridge drivers show it; the file."""
    path = Path(home) / ".ray" / "auth_token"
    path.parent.mkdir(parents=True, mode=0o700)
    path.touch(mode=0o600)
    path.write_text(token)
    return path


class Process:
    """A server or command under test; its output goes to a file."""

    def __init__(self, command, log, env=None, cwd=ROOT, stdin=None):
        self.log = Path(log)
        self.command = command
        with self.log.open("ab") as output:
            self.popen = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, cwd=cwd,
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        if stdin:
            self.popen.stdin.write(stdin.encode())
            self.popen.stdin.close()

    @property
    def pid(self):
        return self.popen.pid

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    def says(self, text, timeout_s=PATIENCE_S):
        """Wait until the output holds `text`."""

        def found():
            assert text in self.output or self.popen.poll() is None, f"ended ({self.popen.returncode}):\n{self.output}"
            return text in self.output

        wait_for(found, f"{text!r} in\n{self.output[-3000:]}", timeout_s)

    def signal(self, number):
        os.kill(self.pid, number)

    def ends(self, timeout_s=PATIENCE_S):
        """Wait for the end; the exit code."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.command} did not end within {timeout_s} s:\n{self.output[-3000:]}") from None

    def stop(self, timeout_s=PATIENCE_S):
        """SIGTERM, then the end; the exit code."""
        if self.popen.poll() is None:
            self.signal(signal.SIGTERM)
        return self.ends(timeout_s)

    def kill_group(self):
        """SIGKILL to the process and what it started in its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait(10)


class RedisServer(Process):
    """A Redis of its own on loopback."""

    def __init__(self, folder, password="", port=None, options=(), wait=True):
        self.port = port or free_port()
        self.password = password
        lines = [f"port {self.port}", "bind 127.0.0.1", f"dir {folder}", 'save ""', *options]
        if password:
            lines.append(f"requirepass {password}")
        super().__init__([REDIS, "-"], Path(folder) / "redis.log", stdin="\n".join(lines) + "\n")
        self.url = f"redis://{':' + password + '@' if password else ''}127.0.0.1:{self.port}/0"
        self.client = redis.Redis.from_url(self.url)
        if wait:
            wait_for(self.answers, "Redis to answer")

    def answers(self):
        try:
            return self.client.ping()
        except redis.ConnectionError:
            return False


class RayCluster(Process):
    """`ray start --head` as a user would, with logical GPUs."""

    def __init__(self, folder, gpus=1, env=None, launcher=None, own_folder=True, options=()):
        # Ray puts sockets into its folder: the path must be short; its default is what `ray start` alone uses
        self.folder = tempfile.mkdtemp(prefix="t-", dir="/tmp") if own_folder else None
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        command = [
            *(launcher or [sys.executable, "-m", "ray.scripts.scripts"]), "start", "--head", "--block",
            f"--port={self.port}", "--node-ip-address=127.0.0.1", f"--num-gpus={gpus}", "--num-cpus=4",
            "--include-dashboard=false", "--include-log-monitor=false", "--object-store-memory=100000000",
            *([f"--temp-dir={self.folder}"] if own_folder else []), *options,
        ]  # fmt: skip
        env = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", **(env or {})}
        super().__init__(command, Path(folder) / "ray.log", env=env)
        self.says("Ray runtime started")


class RayNode(Process):
    """`ray start --address=...`: one more node of a cluster, on this machine."""

    def __init__(self, folder, cluster, *options, gpus=1):
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={cluster.address}",
            "--node-ip-address=127.0.0.1", f"--num-gpus={gpus}", "--num-cpus=4", "--include-log-monitor=false",
            "--object-store-memory=100000000", *options,
        ]  # fmt: skip
        env = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "RAY_AUTH_MODE": "token"}
        super().__init__(command, Path(folder) / "node.log", env=env)
        self.says("Ray runtime started")


class Worker(Process):
    """`python -m bridge.worker`, or another command, on a test app."""

    started = []  # of this module of tests

    def __init__(self, folder, *options, app="tests.apps.shop:app", env, command=None, log="worker.log", ready=True):
        command = command or [sys.executable, "-m", "bridge.worker"]
        if command[-1] == "bridge.worker":
            words = [*command, "-A", app, "-l", "INFO", *options]
        else:
            words = [*command, "-A", app, "worker", "-l", "INFO", *options]
        super().__init__(words, Path(folder) / log, env=env)
        Worker.started.append(self)
        if ready:
            self.says(" ready.")
