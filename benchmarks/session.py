"""The services of a run and its lanes: started together, measured in turns, ended together.

An approach that fails is stopped and reported with the end of its log; the others go on.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis

from benchmarks.approaches import Approach
from benchmarks.lane import Addresses, Lane, lane
from benchmarks.services import Cluster, Running, StartFailed, ask_to_end, ray_cluster, redis_server

#: Tasks that even the slowest approach gets.
FEWEST_TASKS = 4


class Session:
    """One Redis, the Ray clusters that are needed, and lanes that are up.

    Args:
        services: what is started is ended with it.
        folder: for logs and sockets.
        gpus: logical GPUs of each cluster; approaches say which cluster they join.
    """

    def __init__(self, services: ExitStack, folder: Path, gpus: Sequence[int] = (1,)) -> None:
        self.failed: dict[str, str] = {}
        self.lanes: dict[str, Lane] = {}
        self.redis_version = ""
        self._services, self._folder, self._gpus = services, folder, gpus
        self._stacks: dict[str, ExitStack] = {}
        self._workers = ExitStack()

    def start(self, approaches: Sequence[Approach], warm_up: Callable[[Approach], int]) -> None:
        """Start Redis, Ray and the workers one after the other, and warm each up with so many tasks, if any."""
        server, url = self._services.enter_context(redis_server(self._folder))
        with redis.Redis.from_url(url) as client:
            self.redis_version = str(client.info()["redis_version"])
        needed = {a.cluster for a in approaches if a.needs_ray}
        clusters = {index: self._start_ray(index) for index in sorted(needed)}
        # All are asked to end before the first is waited for: workers, and once they have ended, clusters.
        self._services.callback(_ask_all, [cluster.running for cluster in clusters.values() if cluster])
        self._services.enter_context(self._workers)
        self._services.callback(lambda: _ask_all([running.worker for running in self.lanes.values()]))
        for database, approach in enumerate(approaches, start=1):
            cluster = clusters.get(approach.cluster) if approach.needs_ray else None
            with self.may_fail(approach.name):
                self._start_lane(approach, server, url, database, cluster, approaches)
                if tasks := warm_up(approach):
                    self.lanes[approach.name].warm_up(tasks)

    def rounds(self, rounds: int, measure: Callable[[int, Lane], None]) -> None:
        """Measure every lane in every round, beginning with another one each time."""
        for number in range(1, rounds + 1):
            for name in rotated(list(self.lanes), number):
                with self.may_fail(name):
                    measure(number, self.lanes[name])

    @contextmanager
    def may_fail(self, name: str) -> Iterator[None]:
        """What goes wrong inside costs one lane: it is stopped and reported."""
        try:
            yield
        except Exception as error:
            cause = error.__cause__ or error.__context__
            self.failed[name] = f"{type(error).__name__}: {error}" + (f" (from {cause!r})" if cause else "")
            say(f"{name} failed, the others go on: {self.failed[name][:500]}")
            self.lanes.pop(name, None)
            if name in self._stacks:
                self._stacks.pop(name).close()

    def _start_ray(self, index: int) -> Cluster | None:
        gpus = self._gpus[index]
        say(f"starting Ray with {gpus} logical GPU{'s' * (gpus > 1)}")
        try:
            return self._services.enter_context(ray_cluster(self._folder, gpus, f"ray{index or ''}"))
        except StartFailed as error:
            self.failed[f"ray{index or ''}"] = str(error)
            return None

    def _start_lane(
        self,
        approach: Approach,
        server: Running,
        url: str,
        database: int,
        cluster: Cluster | None,
        approaches: Sequence[Approach],
    ) -> None:
        if approach.needs_ray and not cluster:
            raise StartFailed("there is no Ray cluster")
        say(f"starting {approach.name}")
        own = self._stacks[approach.name] = ExitStack()
        self._workers.push(own)
        addresses = Addresses(server, url, database, cluster)
        others = [a for a in approaches if a.cluster == approach.cluster and a.name != approach.name]
        self.lanes[approach.name] = own.enter_context(lane(approach, addresses, self._folder, others))


def _ask_all(processes: Sequence[Running]) -> None:
    for running in processes:
        ask_to_end(running.process)


def rotated(names: list[str], by: int) -> list[str]:
    """The names, beginning with another one for each round."""
    by %= max(1, len(names))
    return names[by:] + names[:by]


def say(text: str) -> None:
    """Progress, apart from the report."""
    print(text, file=sys.stderr, flush=True)
