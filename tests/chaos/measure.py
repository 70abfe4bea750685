"""What the system holds: processes, memory, threads, descriptors, Redis keys, Ray's actors and object store."""

import contextlib
import json
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psutil

from tests.support.services import ROOT

ROLES = ("worker", "driver", "actor", "executor")
#: What may be more at the end than at the start, for each role: threads, descriptors, and memory as a factor and MiB.
THREADS, DESCRIPTORS, FACTOR, MIB = 4, 12, 1.3, 40
#: Keys of Celery and kombu that stay, each once or once per task.
STAYING = ("celery-task-meta-", "_kombu.binding", "celery-taskset-meta-", "chaos-dead-letter", "chaos-crashes-")
#: How keys of dead letters begin; they stay, as do crashes of poisoned tasks.
LETTER = "chaos-dead-letter-"
#: Answers to the harness's own questions that came too late; Celery lets them expire.
REPLIES = ".reply.celery.pidbox"

_ASK_RAY = """
import json, sys, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
from ray._private import state
total, free = ray.cluster_resources(), ray.available_resources()
states = [each["State"] for each in state.actors().values()]
print(json.dumps({
    "gpus": total.get("GPU", 0), "gpus free": free.get("GPU", 0),
    "object store in use": total["object_store_memory"] - free["object_store_memory"],
    "actors alive": states.count("ALIVE"), "actors starting": len([s for s in states if s not in ("ALIVE", "DEAD")]),
}))
"""


def processes(cluster):
    """``{role: {"count", "MiB", "threads", "descriptors", "of kind"}}``: of each role the largest.

    "of kind" says what the descriptors are, of the process that has most.
    """
    found = {}
    for role in ROLES:
        sizes, kinds = [], Counter()
        for process in cluster.processes(role).values():
            with contextlib.suppress(psutil.Error, OSError):
                sizes.append((process.memory_info().rss >> 20, process.num_threads(), process.num_fds()))
                kinds = max(kinds, descriptors(process, cluster.redis.port), key=Counter.total)
        largest = [max(column) for column in zip(*sizes, strict=True)] if sizes else [0, 0, 0]
        found[role] = dict(zip(("count", "MiB", "threads", "descriptors"), [len(sizes), *largest], strict=True))
        found[role]["of kind"] = dict(sorted(kinds.items()))
    return found


def descriptors(process, redis_port):
    """How many of each kind it has open: connections to Redis, other TCP, Unix sockets, eventfd, files and so on."""
    kinds = Counter()
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(descriptor.readlink())
            name = target.rsplit(":", 1)[-1].strip("[]") if target.startswith("anon_inode") else target.split(":")[0]
            kinds["file" if target.startswith("/") else name] += 1
    for each in process.net_connections("all"):
        kinds["socket"] -= 1  # what stays is closed by its other end and known to no table
        if each.family == socket.AF_UNIX:
            kinds["unix"] += 1
        else:
            to_redis = each.raddr and each.raddr.port == redis_port
            kinds[f"{'redis' if to_redis else 'tcp'} {each.status.lower()}"] += 1
    return kinds


def keys(client):
    """Redis keys that should be gone when nothing is in hand, with their sizes."""
    found = {}
    for key in client.scan_iter(count=1000):
        name = key.decode()
        if not name.startswith(STAYING) and not name.endswith(REPLIES):
            kind = client.type(key).decode()
            sizes = {"hash": client.hlen, "zset": client.zcard, "list": client.llen, "set": client.scard}
            found[name] = sizes[kind](key) if kind in sizes else 1
    return found


def dead_letters(client):
    """Ids of the tasks a dead letter is kept of."""
    return {key.decode().removeprefix(LETTER) for key in client.scan_iter(f"{LETTER}*", count=1000)}


def chords(client):
    """Counters of chords that have ended."""
    return sum(1 for key in client.scan_iter("celery-taskset-meta-*", count=1000) if key.endswith((b".j", b".t")))


def ray_holds(cluster):
    """What the cluster says of itself, asked by a process of its own."""
    command = [sys.executable, "-c", _ASK_RAY, cluster.head.address]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=90)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr[-500:]}


def leaks(before, after):
    """Sentences about what has grown beyond the tolerance."""
    found = []
    for role in ROLES:
        was, now = before[role], after[role]
        bounds = {
            "count": was["count"],
            "MiB": was["MiB"] * FACTOR + MIB,
            "threads": was["threads"] + THREADS,
            "descriptors": was["descriptors"] + DESCRIPTORS,
        }
        found += [
            f"{role}: {what} {was[what]} -> {now[what]}, allowed {bound:.0f}"
            + (f"; of kind {was['of kind']} -> {now['of kind']}" if what == "descriptors" else "")
            for what, bound in bounds.items()
            if now[what] > bound or (what == "count" and now[what] != bound)
        ]
    return found


def leaked_in_ray(before, after):
    """The same for what Ray holds."""
    if "error" in before or "error" in after:
        return [f"Ray could not be asked: {before.get('error') or after.get('error')}"]
    # the object store counts what it has not evicted yet; one large value more or less is no leak
    allowed = {"object store in use": 2 << 20}
    return [
        f"Ray: {what} {was} -> {after[what]}"
        for what, was in before.items()
        if abs(after[what] - was) > allowed.get(what, 0)
    ]
