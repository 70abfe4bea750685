"""One approach, up and idle on a queue and a result database of its own; and the two measurements made of it.

Throughput is that of a backlog: all messages are put into a list that no worker reads, and one RENAME makes that list
the worker's queue. So the clock starts at a known moment, and sending costs the workers no CPU. Latency is that of a
caller who sends one task, waits for its result, and sends the next.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import redis
from celery import Celery

from benchmarks import machine
from benchmarks.approaches import APPROACHES, Approach
from benchmarks.cpu import Family, Kind, spent
from benchmarks.samples import Sample
from benchmarks.services import Cluster, Running, StartFailed, started

#: Until the first result of a worker that has just been started, and until the last one of a round.
FIRST_RESULT_S, LAST_RESULT_S = 120.0, 120.0

#: Between two looks at how many results there are; a look is one DBSIZE, about 10 us of Redis' time.
LOOK_S = 0.005


class LaneFailed(Exception):
    """An approach gave wrong results, or none in time."""


class Addresses(NamedTuple):
    """Where an approach finds what it needs; its results go to a Redis database of their own."""

    redis: Running
    redis_url: str
    database: int
    cluster: Cluster | None

    @property
    def broker(self) -> str:
        return f"{self.redis_url}/0"

    @property
    def results(self) -> str:
        return f"{self.redis_url}/{self.database}"


class Lane:
    """An approach with its running worker."""

    def __init__(self, approach: Approach, worker: Running, addresses: Addresses) -> None:
        self.approach, self.worker = approach, worker
        self._broker = redis.Redis.from_url(addresses.broker)
        self._results = redis.Redis.from_url(addresses.results)
        self._caller = Celery(broker=addresses.broker, backend=addresses.results, set_as_current=False)
        # Without a backend, sending does not subscribe to results that nobody will read.
        self._sender = Celery(broker=addresses.broker, set_as_current=False)
        cluster = addresses.cluster.running if addresses.cluster and approach.needs_ray else None
        self._needed = (worker, addresses.redis, cluster) if cluster else (worker, addresses.redis)
        others = tuple(a.actor_title for a in APPROACHES if a.actor_title and a.name != approach.name)
        pids = worker.process.pid, addresses.redis.process.pid, cluster.process.pid if cluster else None
        self._family = Family(*pids, others)

    def warm_up(self, tasks: int) -> None:
        """Wait for the first result, then run more: processes, connections and code paths are warm afterwards."""
        for count, patience_s in ((1, FIRST_RESULT_S), (tasks, LAST_RESULT_S)):
            self._stage(count)
            self._release()
            self._await_results(count, patience_s)

    def measure(self, round_number: int, tasks: int, calls: int) -> Sample:
        """One round: `tasks` as a backlog, then `calls` one after the other."""
        producer_s = self._stage(tasks)
        seconds, cpu_s, foreign_share = self._measure_backlog(tasks)
        before = self._family.snapshot()
        latencies_s = [self._call() for _ in range(calls)]
        alone_s = spent(before, self._family.snapshot())
        return Sample(
            approach=self.approach.name,
            round=round_number,
            tasks=tasks,
            seconds=seconds,
            cpu_ms=per_task_ms(cpu_s, tasks),
            latencies_ms=[round(1000 * latency, 3) for latency in latencies_s],
            alone_cpu_ms=per_task_ms(alone_s, calls),
            producer_cpu_ms=1000 * producer_s / tasks,
            foreign_share=foreign_share,
        )

    def idle_ms_per_s(self, seconds: float) -> dict[str, float]:
        """CPU time by kind of process while nothing is sent."""
        before = self._family.snapshot()
        time.sleep(seconds)
        return {kind.value: 1000 * value / seconds for kind, value in spent(before, self._family.snapshot()).items()}

    def _measure_backlog(self, tasks: int) -> tuple[float, dict[Kind, float], float]:
        me, before, busy_before = psutil.Process(), self._family.snapshot(), machine.busy()
        mine_before = sum(me.cpu_times()[:2])
        began = time.perf_counter()
        self._release()
        seconds = self._await_results(tasks, LAST_RESULT_S) - began
        self._await(lambda: not self._broker.hlen("unacked"), LAST_RESULT_S, "unacknowledged messages")
        window = time.perf_counter() - began
        busy_after, cpu_s = machine.busy(), spent(before, self._family.snapshot())
        ours = sum(cpu_s.values()) + sum(me.cpu_times()[:2]) - mine_before
        foreign = busy_after.used - busy_before.used - ours + busy_after.stolen - busy_before.stolen
        return seconds, cpu_s, max(0.0, foreign) / (window * (psutil.cpu_count() or 1))

    def _stage(self, tasks: int) -> float:
        """Fill the list that no worker reads; CPU seconds this took the sender."""
        self._results.flushdb()
        began = time.process_time()
        for _ in range(tasks):
            self._sender.send_task(self.approach.task, self.approach.args, queue=self._staged)
        return time.process_time() - began

    def _release(self) -> None:
        self._broker.rename(self._staged, self.approach.name)

    @property
    def _staged(self) -> str:
        return f"{self.approach.name}.staged"

    def _await_results(self, tasks: int, patience_s: float) -> float:
        """When the last of `tasks` results was seen."""
        self._await(lambda: self._results.dbsize() >= tasks, patience_s, f"{tasks} results")
        seen = time.perf_counter()
        for text in self._results.mget(self._results.keys("celery-task-meta-*")):
            if (meta := json.loads(text))["status"] != "SUCCESS":
                raise LaneFailed(f"a task ended as {meta['status']}: {meta['result']}\n{self.worker.log_tail()}")
        return seen

    def _await(self, condition: Callable[[], bool], patience_s: float, what: str) -> None:
        deadline = time.perf_counter() + patience_s
        while not condition():
            for running in self._needed:
                running.check()
            if time.perf_counter() > deadline:
                raise LaneFailed(f"waited {patience_s:.0f} s for {what}\n{self.worker.log_tail()}")
            time.sleep(LOOK_S)

    def _call(self) -> float:
        began = time.perf_counter()
        result = self._caller.send_task(self.approach.task, self.approach.args, queue=self.approach.name)
        result.get(timeout=FIRST_RESULT_S)
        return time.perf_counter() - began


@contextmanager
def lane(approach: Approach, addresses: Addresses, folder: Path) -> Iterator[Lane]:
    """Start an approach's worker; wait for nothing yet.

    Raises:
        StartFailed: it needs Ray and there is none.
    """
    if approach.needs_ray and not addresses.cluster:
        raise StartFailed("there is no Ray cluster")
    env = {"CELERY_BROKER_URL": addresses.broker, "CELERY_RESULT_BACKEND": addresses.results}
    if addresses.cluster:
        env |= addresses.cluster.env
        env |= {"BENCH_RAY_ADDRESS": addresses.cluster.address, "BRIDGE_RAY_ADDRESS": addresses.cluster.address}
        env |= {"BRIDGE_NAMESPACE": "bench"}
    command = [sys.executable, "-m", *approach.command, "-Q", approach.name, "-n", f"{approach.name}@bench"]
    quiet = ["--without-mingle", "--without-gossip", "--without-heartbeat"]
    with started([*command, *quiet], folder, approach.name, env, approach.folder) as worker:
        yield Lane(approach, worker, addresses)


def per_task_ms(seconds: dict[Kind, float], tasks: int) -> dict[str, float]:
    """Milliseconds per task by kind of process."""
    return {kind.value: round(1000 * value / tasks, 4) for kind, value in seconds.items()}
