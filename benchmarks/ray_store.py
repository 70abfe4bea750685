"""`python -m benchmarks.ray_store [MIB] [ROUNDS]`: large arrays through Ray's object store against through Redis.

Two workers of two actors each on one Redis and one Ray, alike but for their store; the caller has joined the cluster.
Each round takes every way through both, one task at a time, the first of each not counted. It prints medians and the
ratio.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy

from benchmarks.services import await_start, ray_cluster, redis_server, started

MIB = 1 << 20
#: What each worker has in its environment. Without room in Ray's store what goes between actors goes through Redis.
STORES: dict[str, Mapping[str, str]] = {"redis": {"BRIDGE_DATA_RAY_BYTES": "0"}, "ray": {"BRIDGE_DATA_URL": "ray"}}


def argument(store: str, array: Any) -> Callable[[], None]:
    """Put an array, have a task take it, delete it."""
    from benchmarks.apps.ray_store import total
    from bridge import data

    def once() -> None:
        ref = data.put(array, store="ray" if store == "ray" else None)
        assert total.apply_async((ref,), queue=store).get(timeout=60) == array.size
        data.delete(ref)

    return once


def put(store: str, array: Any) -> Callable[[], None]:
    """Put an array and delete it: no task."""
    from bridge import data

    return lambda: data.delete(data.put(array, store="ray" if store == "ray" else None))


def result(store: str, array: Any) -> Callable[[], None]:
    """Have a task make an array, and get it."""
    from benchmarks.apps.ray_store import app, ones
    from bridge import data

    def once() -> None:
        made = ones.apply_async((array.size,), queue=store)
        assert made.get(timeout=60).size == array.size
        data.delete(json.loads(app.backend.client.get(f"celery-task-meta-{made.id}"))["result"]["__value__"])

    return once


def get(store: str, array: Any) -> Callable[[], None]:
    """Read what lies there: no task."""
    from bridge import data

    ref = data.put(array, store="ray" if store == "ray" else None)
    return lambda: data.get(ref)


def between(store: str, array: Any) -> Callable[[], None]:
    """Have a task take two arrays that stay on different actors."""
    from benchmarks.apps.ray_store import held, joined

    with tempfile.TemporaryDirectory() as folder:
        pair = [held.apply_async((array.size, folder, name), queue=store) for name in "ab"]
        handles = [each.get(timeout=60) for each in pair]
    assert len({handle.executor for handle in handles}) == 2

    def once() -> None:
        assert joined.apply_async((handles,), queue=store).get(timeout=60) == 2 * array.size

    return once


WAYS = {
    "an argument: put, task, delete": argument,
    "the same without a task": put,
    "a result by reference, and get": result,
    "data.get alone": get,
    "an array of another actor": between,
}


def measured(mib: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by way and store."""
    array = numpy.ones(mib * MIB // 8)
    steps = {(way, store): make(store, array) for way, make in WAYS.items() for store in STORES}
    found: dict[str, dict[str, list[float]]] = {way: {store: [] for store in STORES} for way in WAYS}
    for number in range(rounds + 1):
        for (way, store), step in steps.items():
            begun = time.perf_counter()
            step()
            if number:
                found[way][store].append(time.perf_counter() - begun)
    return found


def main(mib: int = 16, rounds: int = 9) -> None:
    """Start everything, measure, print."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="b-", dir="/tmp")))
        _, url = stack.enter_context(redis_server(folder))
        cluster = stack.enter_context(ray_cluster(folder, 2 * len(STORES)))
        common = {**cluster.env, "CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}
        common |= {"BRIDGE_RAY_ADDRESS": cluster.address, "BRIDGE_MIN_ACTORS": "2", "BRIDGE_MAX_ACTORS": "2"}
        command = [
            sys.executable,
            "-m",
            "bridge.worker",
            "-A",
            "benchmarks.apps.ray_store:app",
            "-c",
            "1",
            "-l",
            "INFO",
        ]
        for store, env in STORES.items():
            words = [*command, "-n", f"{store}@%h", "-Q", store]
            env = {**common, **env, "BRIDGE_NAMESPACE": f"ray-store-{store}"}
            worker = stack.enter_context(started(words, folder, store, env))
            await_start(worker, lambda worker=worker: " ready." in worker.log.read_text())  # type: ignore[misc]
        os.environ.update(common, BRIDGE_NAMESPACE="ray-store-ray")  # before ours reads any setting
        from benchmarks.apps.ray_store import app
        from bridge.driver.cluster import connect

        connect(cluster.address, "ray-store-ray", 60.0)
        app.set_current()
        print(f"{mib} MiB, medians of {rounds} rounds: through Redis, through Ray's object store, and the ratio")
        for way, seconds in measured(mib, rounds).items():
            redis_s, ray_s = (statistics.median(seconds[store]) for store in ("redis", "ray"))
            print(f"{way:32} {1000 * redis_s:8.1f} ms {1000 * ray_s:8.1f} ms {redis_s / ray_s:6.2f} x")
        import ray

        ray.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
