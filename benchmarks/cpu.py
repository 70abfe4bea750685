"""CPU time of all processes that take part in an approach, by kind of process.

A process that ended and was waited for leaves its time with its parent ("reaped"); the short-lived processes of the
seed's approaches are counted that way. In Ray's tree only living processes count: its node manager ignores SIGCHLD, so
nothing is left by processes that end, and those are idle ones that did no task's work.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks import machine


class Kind(StrEnum):
    """The processes a task meets, in the order of its way."""

    WORKER = "worker"  # Celery's main process
    CHILD = "child"  # a prefork child, or a helper process of a library
    DRIVER = "driver"  # a child of the worker that has joined Ray
    SPAWNED = "spawned"  # processes that lived for one call
    ACTOR = "actor"
    EXECUTOR = "executor"  # a child process of an actor
    RAY = "ray"  # control service, node manager, agents
    REDIS = "redis"


class Usage(NamedTuple):
    """CPU seconds of one process: its own, and those of its children that ended and were waited for."""

    kind: Kind
    own: float
    reaped: float


Key = tuple[int, float]  # pid and start time: a pid alone can be used again
Snapshot = Mapping[Key, Usage]

#: Titles of Ray's own processes. Every other ``ray::`` process is an actor.
RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")

#: Kinds of processes that wait for the children they started.
REAPERS = (Kind.WORKER, Kind.CHILD, Kind.DRIVER)


class Family:
    """The processes of one approach: its worker's tree, Redis and, where it uses Ray, the cluster with its actors.

    Args:
        worker: pid of Celery's main process.
        redis: pid of the Redis server.
        ray: pid of the process that started the cluster, if this approach uses it.
        not_mine: titles of actors that belong to other approaches on the same cluster.
    """

    def __init__(self, worker: int, redis: int, ray: int | None, not_mine: tuple[str, ...]) -> None:
        self._worker, self._redis = psutil.Process(worker), psutil.Process(redis)
        self._ray = psutil.Process(ray) if ray else None
        self._not_mine = not_mine

    def snapshot(self) -> Snapshot:
        """CPU time of every member so far."""
        return {(p.pid, p.create_time()): usage for p, kind in self.members() if (usage := usage_of(p, kind))}

    def members(self) -> Iterator[tuple[psutil.Process, Kind]]:
        """The living processes of the family."""
        yield self._redis, Kind.REDIS
        yield self._worker, Kind.WORKER
        for process in self._worker.children(recursive=True):
            yield process, Kind.DRIVER if has_joined_ray(process) else Kind.CHILD
        if self._ray:
            yield from self._ray_members(self._ray)

    def _ray_members(self, root: psutil.Process) -> Iterator[tuple[psutil.Process, Kind]]:
        yield root, Kind.RAY
        kinds: dict[int, Kind | None] = {root.pid: Kind.RAY}
        for process in root.children(recursive=True):  # parents come before their children
            kind = self._kind_in_ray(process, kinds)
            kinds[process.pid] = kind
            if kind:
                yield process, kind

    def _kind_in_ray(self, process: psutil.Process, kinds: Mapping[int, Kind | None]) -> Kind | None:
        try:
            parent, title = kinds.get(process.ppid()), (process.cmdline() or [""])[0]
        except psutil.Error:  # it has just ended
            return None
        if parent is None or title.startswith(self._not_mine):
            return None
        if parent in (Kind.ACTOR, Kind.EXECUTOR):
            return Kind.EXECUTOR
        return Kind.ACTOR if title.startswith("ray::") and not title.startswith(RAYS_OWN) else Kind.RAY


def usage_of(process: psutil.Process, kind: Kind) -> Usage | None:
    """CPU time of a process so far; None if it has just ended."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return None
    return Usage(kind, times.user + times.system, times.children_user + times.children_system)


def has_joined_ray(process: psutil.Process) -> bool:
    """Whether Ray's core library is loaded. The command line tells nothing: a forked process has that of its parent."""
    try:
        return "_raylet" in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False


def spent(before: Snapshot, after: Snapshot) -> dict[Kind, float]:
    """CPU seconds by kind between two snapshots of one family."""
    seconds: defaultdict[Kind, float] = defaultdict(float)
    for key, now in after.items():
        then = before.get(key, Usage(now.kind, 0.0, 0.0))
        seconds[now.kind] += now.own - then.own
        if now.kind in REAPERS:
            seconds[Kind.SPAWNED] += now.reaped - then.reaped
    for ended in before.keys() - after.keys():
        if before[ended].kind in REAPERS:  # its parent's reaped time has grown by its whole life
            seconds[Kind.SPAWNED] -= before[ended].own + before[ended].reaped
    return {kind: value for kind, value in seconds.items() if value > 0}


class Watch:
    """CPU time of a family, and of everybody else on the machine, from now on."""

    def __init__(self, family: Family) -> None:
        self._family, self._me = family, psutil.Process()
        self._before, self._busy, self._mine = family.snapshot(), machine.busy(), sum(self._me.cpu_times()[:2])
        self._began = time.perf_counter()

    def end(self) -> tuple[dict[Kind, float], float]:
        """CPU seconds by kind, and the share of the machine's CPU that others used, stolen time included."""
        window = time.perf_counter() - self._began
        busy, cpu_s = machine.busy(), spent(self._before, self._family.snapshot())
        ours = sum(cpu_s.values()) + sum(self._me.cpu_times()[:2]) - self._mine
        foreign = busy.used - self._busy.used - ours + busy.stolen - self._busy.stolen
        return cpu_s, max(0.0, foreign) / (window * (psutil.cpu_count() or 1))
