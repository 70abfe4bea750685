"""In the driver: which actors take calls, and what the worker is told of the fleet. Knows neither tasks nor calls."""

import logging
import os
import time
from typing import Any

from actors.contract import ActorState, Health
from bridge.driver.orders import ActorBusy, ActorLost, ActorReady, Event, HoldingsLost

logger = logging.getLogger(__name__)


class Roster:
    """One row per actor, as last heard of."""

    def __init__(self, driver_id: str) -> None:
        self.ready: set[int] = set()
        self._driver_id = driver_id
        self._cluster: dict[str, Any] | None = None
        self._rows: dict[int, dict[str, Any]] = {}
        self._fenced: set[int] = set()
        self._executors: dict[int, str] = {}  # slot -> the name of the executor that holds results there

    def change(self, slot: int, health: Health | None, reason: str) -> list[Event]:
        """An actor has given its account, or none, and `reason` says why; what that means to the scheduler."""
        row = health._asdict() if health is not None else {**self._rows.get(slot, {}), "slot": slot, "state": "lost"}
        self._rows[slot] = row | {"slot": slot, **({"reason": reason} if reason else {})}
        if health is not None:
            self._note_fence(slot, health)
        return self._note_executor(slot, health) + self._note_state(slot, health, reason)

    def _note_executor(self, slot: int, health: Health | None) -> list[Event]:
        """What an executor held is lost with it, and to all purposes while its actor gives no account or ends."""
        before = self._executors.pop(slot, "")
        now = health.executor if health is not None and health.state is not ActorState.DRAINING else ""
        if now:
            self._executors[slot] = now
        return [HoldingsLost(slot)] if before not in ("", now) else []

    def _note_state(self, slot: int, health: Health | None, reason: str) -> list[Event]:
        if health is not None and health.state is ActorState.DRAINING:
            if slot in self.ready:
                logger.info("GPU actor %d is ending: %s", slot, health.reason)  # as planned: no alarm
                self.ready.discard(slot)
            return [ActorLost(slot)]
        if health is None or health.state is not ActorState.READY:
            return self.lose(slot, reason or (health.reason if health else "")) if slot in self.ready else []
        if slot not in self.ready:
            logger.info("GPU actor %d is ready: %s on %s", slot, health.device.get("name"), health.node)
        self.ready.add(slot)
        return [_ready(slot, health), ActorBusy(slot, health.queue_s)]

    def lose(self, slot: int, reason: str) -> list[Event]:
        """An actor takes no calls for now."""
        if slot in self.ready:
            logger.warning("GPU actor %d takes no calls: %s", slot, reason)
        self.ready.discard(slot)
        return [ActorLost(slot)]

    def _note_fence(self, slot: int, health: Health) -> None:
        """Say once that an actor's GPU is fenced, and once that it is not any more."""
        if health.state is ActorState.FENCED and slot not in self._fenced:
            self._fenced.add(slot)
            logger.error(
                "the GPU of actor %d on %s is fenced: %s; it is tried again in %.0f s, or after `control gpu_restart`",
                slot, health.node, health.reason, health.probe_in_s or 0.0,
            )  # fmt: skip
        elif health.state is ActorState.READY and slot in self._fenced:
            self._fenced.discard(slot)
            logger.warning("the GPU of actor %d on %s is not fenced any more", slot, health.node)

    def why_fenced(self) -> str:
        """The reasons of fenced actors, as the end of a sentence; "" without any."""
        fenced = [row for row in self._rows.values() if row["state"] == ActorState.FENCED]
        return "".join(f"; the GPU of actor {row['slot']} is fenced: {row['reason']}" for row in fenced)

    def release(self, slot: int) -> list[Event]:
        """An actor has ended that is not always there."""
        logger.info("GPU actor %d has ended; another comes when work waits for it", slot)
        self.ready.discard(slot)
        self._fenced.discard(slot)
        self._rows.pop(slot, None)
        self._executors.pop(slot, None)
        return [HoldingsLost(slot), ActorLost(slot)]

    def set_cluster(self, facts: dict[str, Any]) -> None:
        """What is known of the cluster itself."""
        self._cluster = facts

    def node(self, slot: int) -> str:
        """Where an actor is, as last heard; "" where unknown."""
        return str(self._rows.get(slot, {}).get("node", ""))

    def executor(self, slot: int) -> str:
        """The name of the executor that an actor has; "" while it gives no account of one."""
        return self._executors.get(slot, "")

    def accelerator(self, slot: int, unknown: str) -> str:
        """The GPU model of an actor, `unknown` where that is so."""
        return str(self._rows.get(slot, {}).get("accelerator") or unknown)

    def describe(self) -> str:
        """The ready actors in words, for an error about what none of them has."""
        rows = [self._rows[slot] for slot in sorted(self.ready)]
        return "; ".join(f"actor {row['slot']}: {_gpu(row)}" for row in rows) or "no actor is ready"

    def report(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        report = {"driver": os.getpid(), "driver_id": self._driver_id, "actors": list(self._rows.values())}
        return report if self._cluster is None else {**report, "cluster": self._cluster}


class Alarm:
    """Says when something is due that is done every so often; the loop asks it at each turn."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._last = 0.0

    def is_due(self) -> bool:
        """Whether the time has come; the next one counts from here."""
        now = time.monotonic()
        if now - self._last < self._every_s:
            return False
        self._last = now
        return True


def _ready(slot: int, health: Health) -> ActorReady:
    memory = int(health.memory_total_bytes * health.share)
    return ActorReady(slot, health.accelerator, memory, frozenset(health.warm_for or ()))


def _gpu(row: dict[str, Any]) -> str:
    memory = row["memory_total_bytes"] * row["share"]
    size = f", {memory / 2**30:.1f} GiB" if memory else ""
    return f"{row['accelerator'] or 'of unknown type'}{size}"
