"""The system under test in one folder: Redis, a Ray head without GPUs, GPU nodes, workers; each found by its role."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from tests.chaos import reaper
from tests.support.services import ROOT, RayCluster, RayNode, RedisServer, Worker, keep_token, wait_for

WORKERS = ("a", "b")
NODES = ("1", "2")
#: GPU tasks one worker holds at once.
SLOTS = 16


class Cluster:
    """Everything that runs, and how each part is started again."""

    def __init__(self, appendonly):
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))
        self.appendonly = appendonly
        self.redis = self.head = None
        self.workers, self.nodes = {}, {}
        self._starts = 0
        self._outside = {}
        self._starting = {}  # name of a node -> thread
        self.environment = {
            "CHAOS_FOLDER": str(self.folder),
            "HOME": str(self.folder),  # the token of this machine's user is none of the run's
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [sys.executable, "-m", "tests.chaos.reaper", str(self.folder), str(os.getpid())]
        self._reaper = subprocess.Popen(command, cwd=ROOT, start_new_session=True)

    def start(self):
        """Bring everything up; returns when both workers have a ready actor."""
        self._outside = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)  # the support's processes inherit it
        keep_token(self.folder, secrets.token_hex(32))
        for name in ("once", "redis", "logs"):
            (self.folder / name).mkdir()
        self.start_redis()
        self.head = RayCluster(self._logs(), gpus=0, own_folder=False, options=(f"--temp-dir={self.folder}/r",))
        for name in NODES:
            self.start_node(name)
        for name in WORKERS:
            self.start_worker(name)
        for worker in self.workers.values():
            worker.says(" ready.", 90)

    def _logs(self):
        self._starts += 1
        folder = self.folder / "logs" / f"{self._starts:03}"
        folder.mkdir()
        return folder

    def start_redis(self):
        lines = ["appendonly yes", "appendfsync no"] if self.appendonly else []
        port = self.redis.port if self.redis else None
        (folder := self.folder / "redis").mkdir(exist_ok=True)
        self.redis = RedisServer(folder, port=port, options=lines)

    def start_node(self, name):
        self.nodes[name] = RayNode(self._logs(), self.head)

    def start_worker(self, name):
        env = {
            "CELERY_BROKER_URL": self.redis.url,
            "CELERY_RESULT_BACKEND": self.redis.url,
            "BRIDGE_RAY_ADDRESS": self.head.address,
            "BRIDGE_NAMESPACE": "chaos",
            "BRIDGE_BEAT_S": "1",
            "BRIDGE_KEEP_IDLE_S": "10",  # an actor beyond the GPUs ends after this
            "BRIDGE_GPU_SLOTS": str(SLOTS),
            "BRIDGE_ENVIRONMENT": '["CHAOS_*"]',
        }
        options = ("-c", "1", "-n", f"{name}@%h")
        folder = self._logs()
        self.workers[name] = Worker(
            folder, *options, app="tests.chaos.app:app", env=env, log=f"worker-{name}.log", ready=False
        )

    def ensure(self):
        """Start again what has ended; True when everything is there."""
        if not self.redis.answers():
            return False
        for name, worker in list(self.workers.items()):
            if worker.popen.poll() is not None:
                self.start_worker(name)
        for name, node in list(self.nodes.items()):
            starting = self._starting.get(name)
            if node.popen.poll() is not None and not (starting and starting.is_alive()):
                # Apart, because it takes long; should it fail, the next look tries again.
                self._starting[name] = threading.Thread(target=self._try_to_start, args=(name,), daemon=True)
                self._starting[name].start()
        return True

    def _try_to_start(self, name):
        with contextlib.suppress(AssertionError):
            self.start_node(name)

    # ---- who is who

    def find(self, role):
        """Living processes of a role by name: ``{"worker a": pid, ...}``."""
        return {name: process.pid for name, process in self.processes(role).items() if reaper._lives(process)}

    def processes(self, role):
        """The same as `psutil.Process`."""
        match role:
            case "redis":
                return _alive({"redis": self.redis})
            case "worker":
                return _alive({f"worker {name}": each for name, each in self.workers.items()})
            case "driver":
                return {
                    f"driver {name[-1]}": child
                    for name, worker in self.processes("worker").items()
                    for child in _children(worker)
                    if _has_ray(child)
                }
            case "node":
                nodes = _alive({f"node {name}": each for name, each in self.nodes.items()})
                return {
                    name: each for name, node in nodes.items() for each in _children(node) if each.name() == "raylet"
                }
            case "actor":
                return {
                    f"actor on {name}": child
                    for name, raylet in self.processes("node").items()
                    for child in _children(raylet)
                    if "GpuActor" in _title(child)
                }
            case "executor":
                return {
                    f"executor of {name}": child
                    for name, actor in self.processes("actor").items()
                    for child in _children(actor)
                    if "actors.executor" in _title(child)
                }
        raise ValueError(role)

    def gpu(self, app):
        """What `inspect gpu` says of each worker that answers."""
        names = [f"{name}@{socket.gethostname()}" for name in self.workers]
        return app.control.inspect(destination=names, timeout=10)._request("gpu") or {}

    def is_whole(self, app):
        """Whether both workers see an actor ready on each node, and nothing in flight."""
        with contextlib.suppress(Exception):
            said = self.gpu(app)
            return len(said) == len(WORKERS) and all(
                [actor["state"] for actor in one["actors"]] == ["ready"] * len(NODES) for one in said.values()
            )
        return False

    def wait_until_whole(self, app, timeout_s):
        """Seconds until capacity is back; AssertionError after `timeout_s`."""
        started = time.monotonic()

        def whole():
            return self.ensure() and self.is_whole(app)

        wait_for(whole, f"{len(NODES)} ready actors in both workers: {self._said(app)}", timeout_s, 0.5)
        return time.monotonic() - started

    def _said(self, app):
        return _Late(lambda: self.gpu(app))

    def end(self):
        """Take everything down; what would not go."""
        for name, value in self._outside.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        left = reaper.take_down(self.folder)
        for each in [*self.workers.values(), *self.nodes.values(), self.head, self.redis]:
            if each is not None:
                each.popen.poll()
        self._reaper.kill()
        self._reaper.wait()
        reaper.shutil.rmtree(self.folder, ignore_errors=True)
        return left


class _Late:
    """Text that is made when it is shown."""

    def __init__(self, make):
        self._make = make

    def __str__(self):
        try:
            return repr(self._make())
        except Exception as error:
            return repr(error)


def _alive(services):
    found = {}
    for name, each in services.items():
        if each is not None and each.popen.poll() is None:
            with contextlib.suppress(psutil.Error):
                found[name] = psutil.Process(each.pid)
    return found


def _children(process):
    try:
        return process.children()
    except psutil.Error:
        return []


def _title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _has_ray(process):
    with contextlib.suppress(OSError):
        return "_raylet" in Path(f"/proc/{process.pid}/maps").read_text()
    return False
