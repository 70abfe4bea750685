"""One approach, up and idle on a queue and a result database of its own; and the two measurements made of it.

Throughput is that of a backlog: all messages are put into a list that no worker reads, and one RENAME makes that list
the worker's queue. So the clock starts at a known moment, and sending costs the workers no CPU. Latency is that of a
caller who sends one task, waits for its result, and sends the next.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import redis
from celery import Celery
from celery.exceptions import TimeoutError as CeleryTimeoutError

from benchmarks.approaches import Approach
from benchmarks.cpu import Family, Kind, Watch, spent
from benchmarks.services import Cluster, Running, started

#: Redis' last database, unless it has more than it has by default.
DATA_DATABASE = 15

#: Until the first result of a worker that has just been started, and until the last one of a round.
FIRST_RESULT_S, LAST_RESULT_S = 120.0, 180.0

#: Between two looks at how many results there are; a look is one DBSIZE, about 10 us of Redis' time.
LOOK_S = 0.005

#: Results read in one MGET, which would otherwise hold up Redis and be one reply of many megabytes.
READ_AT_ONCE = 1000


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

    @property
    def data(self) -> str:
        """Large data lie apart from results, which are counted."""
        return f"{self.redis_url}/{DATA_DATABASE}"


class Message(NamedTuple):
    """One task to send."""

    task: str
    args: tuple[object, ...] = ()


class Backlog(NamedTuple):
    """A backlog worked off: seconds until the last result, and CPU by kind until the last acknowledgement."""

    seconds: float
    cpu_s: dict[Kind, float]
    foreign_share: float  # of the machine's CPU, used by others meanwhile


class Lane:
    """An approach with its running worker."""

    def __init__(self, approach: Approach, worker: Running, addresses: Addresses, not_mine: tuple[str, ...]) -> None:
        self.approach, self.worker = approach, worker
        self.broker = redis.Redis.from_url(addresses.broker)
        self.results = redis.Redis.from_url(addresses.results)
        self.data = redis.Redis.from_url(addresses.data)
        self.addresses = addresses
        self.caller = Celery(broker=addresses.broker, backend=addresses.results, set_as_current=False)
        # Without a backend, sending does not subscribe to results that nobody will read.
        self._sender = Celery(broker=addresses.broker, set_as_current=False)
        cluster = addresses.cluster.running if addresses.cluster and approach.needs_ray else None
        self._needed = (worker, addresses.redis, cluster) if cluster else (worker, addresses.redis)
        pids = worker.process.pid, addresses.redis.process.pid, cluster.process.pid if cluster else None
        self.family = Family(*pids, not_mine)

    @property
    def usual(self) -> Message:
        """The message of this approach."""
        return Message(self.approach.task, self.approach.args)

    def warm_up(self, tasks: int) -> None:
        """Wait for the first result, then run more: processes, connections and code paths are warm afterwards."""
        for count, patience_s in ((1, FIRST_RESULT_S), (tasks, LAST_RESULT_S)):
            self.stage([self.usual] * count)
            self.release()
            self.await_results(count, patience_s)
        self.await_acknowledged()

    def stage(self, messages: Sequence[Message]) -> float:
        """Fill the list that no worker reads; CPU seconds this took the sender."""
        self.results.flushdb()
        began = time.process_time()
        for message in messages:
            self._sender.send_task(message.task, message.args, queue=self._staged)
        return time.process_time() - began

    def release(self) -> float:
        """Make the staged list the worker's queue; when, by the performance counter."""
        began = time.perf_counter()
        self.broker.rename(self._staged, self.approach.name)
        return began

    def backlog(self, messages: int) -> Backlog:
        """Release what is staged and wait for all of it, watching CPU time."""
        watch = Watch(self.family)
        seconds = self._work_off(messages)
        self.await_acknowledged()
        return Backlog(seconds, *watch.end())

    def one_by_one(self, calls: int) -> tuple[list[float], dict[Kind, float]]:
        """Seconds from send to result of `calls` tasks one after the other, and the CPU they took by kind."""
        before = self.family.snapshot()
        latencies_s = self._latencies(calls)
        return latencies_s, spent(before, self.family.snapshot())

    def call(self, message: Message | None = None) -> float:
        """Send one task and wait for its result; seconds."""
        task, args = message or self.usual
        began = time.perf_counter()
        self.caller.send_task(task, args, queue=self.approach.name).get(timeout=FIRST_RESULT_S)
        return time.perf_counter() - began

    def call_timed(self) -> tuple[int, int, Any]:
        """Send one task and wait for its result: nanoseconds of the monotonic clock before and after, and the value."""
        began = time.monotonic_ns()
        value = self.caller.send_task(*self.usual, queue=self.approach.name).get(timeout=FIRST_RESULT_S)
        return began, time.monotonic_ns(), value

    def open_connections(self) -> None:
        """Have the caller make its connections, so that its first call does not pay for them."""
        result = self.caller.send_task("nobody", queue=f"{self.approach.name}.nobody")
        with contextlib.suppress(CeleryTimeoutError):
            result.get(timeout=0.2)
        result.forget()

    def await_answer(self) -> None:
        """Return once the worker answers a ping: it has started."""
        name = f"{self.approach.name}@bench"
        ping = self.caller.control.ping
        self.wait(lambda: bool(ping(destination=[name], timeout=0.5)), FIRST_RESULT_S, "an answer to a ping")

    def send(self, message: Message) -> None:
        """Send one task straight to the worker's queue and forget it; its value is among `values` later."""
        self._sender.send_task(message.task, message.args, queue=self.approach.name)

    def await_results(self, tasks: int, patience_s: float = LAST_RESULT_S) -> float:
        """When the last of `tasks` results was seen, all of them successes."""
        seen = self.await_stored(tasks, patience_s)
        if self.approach.stores_started:
            seen = self.await_acknowledged()
        self.values()
        return seen

    def await_stored(self, tasks: int, patience_s: float = LAST_RESULT_S) -> float:
        """When the result database held `tasks` results."""
        self.wait(lambda: self.results.dbsize() >= tasks, patience_s, f"{tasks} results")
        return time.perf_counter()

    def await_acknowledged(self) -> float:
        """When the broker held no message that a worker has and has not acknowledged."""
        self.wait(lambda: not self.broker.hlen("unacked"), LAST_RESULT_S, "unacknowledged messages")
        return time.perf_counter()

    def values(self) -> list[Any]:
        """What the tasks since the last `stage` returned, in no order.

        Raises:
            LaneFailed: a task did not succeed.
        """
        keys = self.results.keys("celery-task-meta-*")
        values = []
        for start in range(0, len(keys), READ_AT_ONCE):
            for text in self.results.mget(keys[start : start + READ_AT_ONCE]):
                meta = json.loads(text)
                if meta["status"] != "SUCCESS":
                    raise LaneFailed(f"a task ended as {meta['status']}: {meta['result']}\n{self.worker.log_tail()}")
                values.append(meta["result"])
        return values

    def idle_ms_per_s(self, seconds: float) -> dict[str, float]:
        """CPU time by kind of process while nothing is sent."""
        before = self.family.snapshot()
        time.sleep(seconds)
        return {kind.value: 1000 * value / seconds for kind, value in spent(before, self.family.snapshot()).items()}

    def wait(self, condition: Callable[[], bool], patience_s: float, what: str) -> None:
        """Return once `condition` holds; raise if that takes too long or a process that it needs has ended."""
        deadline = time.perf_counter() + patience_s
        while not condition():
            for running in self._needed:
                running.check()
            if time.perf_counter() > deadline:
                raise LaneFailed(f"waited {patience_s:.0f} s for {what}\n{self.worker.log_tail()}")
            time.sleep(LOOK_S)

    def _work_off(self, messages: int) -> float:
        began = self.release()
        return self.await_results(messages) - began

    def _latencies(self, calls: int) -> list[float]:
        return [self.call() for _ in range(calls)]

    @property
    def _staged(self) -> str:
        return f"{self.approach.name}.staged"


class DirectLane(Lane):
    """A program without Celery that makes the calls itself: orders go to it through Redis, once per measurement."""

    def warm_up(self, tasks: int) -> None:
        """Wait until it answers, and have it make some calls."""
        self._ordered("backlog", 1, FIRST_RESULT_S)
        self._ordered("backlog", tasks, LAST_RESULT_S)

    def stage(self, messages: Sequence[Message]) -> float:
        """There is no queue to fill."""
        return 0.0

    def call_timed(self) -> tuple[int, int, Any]:
        """One call, by the program's own clock, which begins with it."""
        return 0, round(1e9 * self._latencies(1)[0]), None

    def _work_off(self, messages: int) -> float:
        return self._ordered("backlog", messages, LAST_RESULT_S)[0]

    def _latencies(self, calls: int) -> list[float]:
        return self._ordered("one by one", calls, LAST_RESULT_S)

    def _ordered(self, what: str, calls: int, patience_s: float) -> list[float]:
        self.broker.rpush(f"{self.approach.name}.orders", json.dumps([what, calls]))
        answers = f"{self.approach.name}.answers"
        self.wait(lambda: bool(self.broker.llen(answers)), patience_s, f"{calls} calls")
        seconds: list[float] = json.loads(self.broker.lpop(answers))
        return seconds


@contextmanager
def lane(approach: Approach, addresses: Addresses, folder: Path, others: Sequence[Approach]) -> Iterator[Lane]:
    """Start an approach's worker; wait for nothing yet. `others` are the ones on the same cluster."""
    env = {"CELERY_BROKER_URL": addresses.broker, "CELERY_RESULT_BACKEND": addresses.results}
    env |= {"BENCH_QUEUE": approach.name, "BRIDGE_DATA_URL": addresses.data}
    if addresses.cluster:
        env |= addresses.cluster.env
        env |= {"BENCH_RAY_ADDRESS": addresses.cluster.address, "BRIDGE_RAY_ADDRESS": addresses.cluster.address}
        env |= {"BENCH_ACTORS": str(addresses.cluster.gpus), "BRIDGE_NAMESPACE": "bench"}
    command = [sys.executable, "-m", *approach.command]
    if approach.is_celery:
        command += ["-Q", approach.name, "-n", f"{approach.name}@bench"]
        command += ["--without-mingle", "--without-gossip", "--without-heartbeat"]
    not_mine = tuple(a.actor_title for a in others if a.actor_title and a.actor_title != approach.actor_title)
    kind = DirectLane if approach.name == "plain-ray" else Lane
    with started(command, folder, approach.name, env, approach.folder) as worker:
        yield kind(approach, worker, addresses, not_mine)


def per_task_ms(seconds: dict[Kind, float], tasks: int) -> dict[str, float]:
    """Milliseconds per task by kind of process."""
    return {kind.value: round(1000 * value / tasks, 4) for kind, value in seconds.items()}
