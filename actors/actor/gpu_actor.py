"""The Ray actor: reserves one GPU and lends `ActorShell` to drivers. Only it and `data/ray_store.py` import ray.

Named by slot, detached, shared by all workers of a namespace. Its constructor touches no CUDA: an exception there would
be permanent death for the actor.
"""

import pickle
from collections.abc import Sequence
from typing import Any

import ray

from actors.actor.entries import Limits
from actors.actor.shell import ActorShell
from actors.contract import Busy, Config, Health, Reason, Reply
from actors.data.ray_store import RayStore
from actors.garbage import settle

#: Call threads: two calls and two collects of each driver that shares the actor, with room; threads are cheap.
CALL_THREADS = 64
#: Ray's resource that names the GPU model of a node.
_ACCELERATOR = "accelerator_type:"


@ray.remote(concurrency_groups={"control": 4})
class GpuActor:
    """One GPU: calls in, outcomes out; control methods answer while bodies run."""

    def __init__(self, slot: int, limits: Limits) -> None:
        namespace = ray.get_runtime_context().namespace
        self._shell = ActorShell(
            slot, limits, self._end, accelerator_here(), lambda config: RayStore(namespace, config)
        )
        settle()

    def run(self, call: bytes, wait_s: float, parts: Sequence[Any] = ()) -> bytes:
        """See `ActorShell.run`; both pickled, because Ray's own serialisation of a tuple takes far longer.

        Args:
            parts: of the pickle, as arrays, for Ray lends those from its object store without a copy.
        """
        reply: Reply | Busy = self._shell.run(pickle.loads(call, buffers=parts), wait_s)
        return pickle.dumps(reply, 5)

    def collect(self, call: bytes, wait_s: float) -> bytes:
        """See `ActorShell.collect`; both pickled."""
        reply: Reply = self._shell.collect(pickle.loads(call), wait_s)
        return pickle.dumps(reply, 5)

    def fetch(self, token: str) -> bytes:
        """See `ActorShell.fetch`; a return of its own, so that the caller owns it."""
        return self._shell.fetch(token)

    @ray.method(concurrency_group="control")
    def hello(self, driver: str, supersedes: str, config: Config) -> Health:
        """See `ActorShell.hello`."""
        return self._shell.hello(driver, supersedes, config)

    @ray.method(concurrency_group="control")
    def health(self, driver: str, release: str) -> Health:
        """See `ActorShell.health`."""
        return self._shell.health(driver, release)

    @ray.method(concurrency_group="control")
    def cancel(self, call_id: str, tokens: list[str], how: Reason) -> None:
        """See `ActorShell.cancel`."""
        self._shell.cancel(call_id, tokens, how)

    @ray.method(concurrency_group="control")
    def forget(self, call_id: str, tokens: list[str]) -> None:
        """See `ActorShell.forget`."""
        self._shell.forget(call_id, tokens)

    @ray.method(concurrency_group="control")
    def drain(self) -> None:
        """See `ActorShell.drain`."""
        self._shell.drain()

    def _end(self) -> None:
        """End for good: only a kill from inside keeps Ray from restarting an actor with endless restarts."""
        self._shell.close()
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def accelerator_here() -> str:
    """The GPU model of this node as Ray names it; "" where it does not know one."""
    here = ray.get_runtime_context().get_node_id()
    resources: list[str] = [key for node in ray.nodes() if node["NodeID"] == here for key in node["Resources"]]
    return next((key.removeprefix(_ACCELERATOR) for key in resources if key.startswith(_ACCELERATOR)), "")


def options(name: str, namespace: str, num_cpus: float, num_gpus: float, accelerator: str | None) -> dict[str, object]:
    """How the actor is created: whoever comes first creates it, all others find it."""
    return {
        "name": name,
        "namespace": namespace,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_gpus": num_gpus,
        "num_cpus": num_cpus,
        "accelerator_type": accelerator,
        "enable_task_events": False,  # what Ray's dashboard would tell of calls is here told of tasks, by Celery
        "max_restarts": -1,
        "max_task_retries": 0,  # running again is decided by blame, not by Ray
        "max_concurrency": CALL_THREADS,
    }
