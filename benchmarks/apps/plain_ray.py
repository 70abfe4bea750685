"""Ray alone, the ceiling: a program that calls a warm actor; no queue, no messages, no results stored.

Orders come as JSON through a Redis list, once per measurement: ["backlog", n] keeps `WINDOW` calls in flight and
answers with the seconds of all together, ["one by one", n] with the seconds of each.
"""

import json
import os
import time
from typing import Any

import ray
import redis

#: Calls in flight during a backlog.
WINDOW = 64


class PlainNoop:
    """Does nothing, warm."""

    def noop(self) -> None:
        """Do nothing."""


def backlog(actor: Any, calls: int) -> list[float]:
    """Seconds for all of `calls`, with the oldest awaited when the window is full."""
    began = time.perf_counter()
    flying: list[Any] = []
    for _ in range(calls):
        if len(flying) == WINDOW:
            ray.get(flying[: WINDOW // 2])
            del flying[: WINDOW // 2]
        flying.append(actor.noop.remote())
    ray.get(flying)
    return [time.perf_counter() - began]


def one_by_one(actor: Any, calls: int) -> list[float]:
    """Seconds of each of `calls`."""
    latencies_s = []
    for _ in range(calls):
        began = time.perf_counter()
        ray.get(actor.noop.remote())
        latencies_s.append(time.perf_counter() - began)
    return latencies_s


def main() -> None:
    """Serve orders until the process is ended."""
    queue = os.environ["BENCH_QUEUE"]
    ray.init(address=os.environ["BENCH_RAY_ADDRESS"], namespace="plain", log_to_driver=False, logging_level="ERROR")
    actor = ray.remote(num_cpus=0)(PlainNoop).remote()
    orders = redis.Redis.from_url(os.environ["CELERY_BROKER_URL"], socket_timeout=None)  # BLPOP waits
    while True:
        _, text = orders.blpop([f"{queue}.orders"])
        what, calls = json.loads(text)
        seconds = (backlog if what == "backlog" else one_by_one)(actor, calls)
        orders.rpush(f"{queue}.answers", json.dumps(seconds))


if __name__ == "__main__":
    main()
