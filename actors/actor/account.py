"""What an actor has done and how it is, as it tells drivers, and they tell people."""

import os
import platform

from actors.actor.children import Children
from actors.contract import PROTOCOL, ActorState, DeviceState, Health, Outcome, Succeeded


class Tally:
    """What an actor has done, per task name."""

    def __init__(self) -> None:
        self.tasks = 0
        self.calls = 0
        self.crashes = 0
        self._by_task: dict[str, list[float]] = {}

    def add(self, name: str, outcome: Outcome) -> None:
        """Count one task; a batch of n counts as one run."""
        self.tasks += 1
        row = self._by_task.setdefault(name, [0, 0.0, 0.0])
        row[0] += 1
        row[1] += 1 / outcome.batch if isinstance(outcome, Succeeded) else 1
        row[2] += outcome.run_s

    def by_task(self) -> dict[str, dict[str, float]]:
        """Per task name: tasks, runs of its body, mean seconds per task."""
        return {
            name: {"tasks": tasks, "runs": round(runs), "mean_s": seconds / tasks}
            for name, (tasks, runs, seconds) in self._by_task.items()
        }


class Account:
    """Of one actor; all access under its lock.

    Args:
        slot: its number.
        accelerator: the node's GPU model as Ray names it; "" where unknown.
        share: of one GPU that the actor reserves.
    """

    def __init__(self, slot: int, accelerator: str, share: float, children: Children) -> None:
        self.tally = Tally()
        self._slot = slot
        self._accelerator = accelerator
        self._share = share
        self._children = children

    def health(self, release: str, is_closing: bool, queued: int, queue_s: float, running: str) -> Health:
        """How the actor is for a release.

        Args:
            queued: tasks that wait.
            queue_s: seconds that a new call would wait, as far as foreseen.
            running: name of the task that runs now, or "".
        """
        children, tally = self._children, self.tally
        child = children.of(release)
        ready = child.ready if child else None
        device = child.device if child else DeviceState(0, 0, 0, {}, {})
        state, reason = children.state(release)
        if is_closing:
            state, reason = ActorState.DRAINING, "finishes what it has, then ends"
        return Health(
            protocol=PROTOCOL,
            slot=self._slot,
            node=platform.node(),
            pid=os.getpid(),
            state=state,
            reason=reason,
            knows_release=children.knows(release),
            failed_starts=children.failed_starts(release),
            device=ready.device if ready else {},
            executor_pid=child.process.pid if child else 0,
            executor=ready.executor if ready else "",
            generation=children.generation,
            warm_s=ready.warm_s if ready else 0.0,
            tasks=tally.tasks,
            calls=tally.calls,
            crashes=tally.crashes,
            queued=queued,
            queue_s=queue_s,
            running=running,
            by_task=tally.by_task(),
            memory_used_bytes=device.memory_used,
            memory_total_bytes=device.memory_total,
            memory_free_bytes=device.memory_free,
            residents=device.residents,
            warm_for=child.warm_for() if child else (),
            results=device.results._asdict(),
            accelerator=self._accelerator,
            share=self._share,
            recycled=children.recycled,
            device_faults=children.breaker.total,
            probe_in_s=children.probe_in_s(),
        )
