"""Whether a worker lives and whether a GPU task sent now would run: pure, from what the worker knows at this moment."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from actors.contract import ActorState
from bridge.marks import Gpu

#: A driver reports every 5 s at least (`REPORT_S` in `bridge/driver/loop.py`); one silent for longer is stuck.
DRIVER_SILENT_S = 15.0
#: Redis answers a worker that waits for messages within a second; beyond this it counts as gone, in seconds.
BROKER_SILENT_S = 10.0
#: Texts from elsewhere are cut to this many letters.
_LONGEST = 300
_PASSWORD = re.compile(r"://[^/@\s]*@")


class DriverFacts(NamedTuple):
    """One driver process as the worker knows it."""

    pid: int | None
    heard_s: float | None  # how long ago it said something; None when it is not there or has not spoken yet


class Facts(NamedTuple):
    """What the worker knows; ages in seconds."""

    waits_for: str  # what the start waits for; "" once the worker has started
    stops: bool  # it was told to end
    loop_s: float  # since its main thread last showed that it turns
    loop_limit_s: float
    consumes: bool  # connected to the broker, and asking it for messages
    broker_s: float  # since a question to the broker that has no answer yet
    drivers: tuple[DriverFacts, ...]
    has_cluster: bool
    actors: tuple[dict[str, Any], ...]  # rows of `bridge/driver/roster.py`
    tasks: dict[str, Gpu]  # the marks, by task name
    on_demand: bool  # actors come with the first task (BRIDGE_MIN_ACTORS=0)
    results: str = ""  # why the result backend stores nothing now


class Reason(NamedTuple):
    """Why it is not well, and what a person does about it."""

    what: str
    do: str


class Condition(NamedTuple):
    """What probes ask for."""

    state: str  # starting, ready, not ready, stopping or hung
    live: bool
    ready: bool
    reasons: tuple[Reason, ...]


def condition_of(facts: Facts) -> Condition:
    """Live: its loop turns, or it was told to end. Ready: it consumes, and every GPU task would find an actor."""
    if facts.stops:
        return Condition("stopping", True, False, (Reason("it was told to stop and takes nothing new", _NOTHING),))
    if facts.loop_s > facts.loop_limit_s:
        what = f"the worker's loop has not turned for {facts.loop_s:.0f} s"
        return Condition("hung", False, False, (Reason(what, _HUNG),))
    if facts.waits_for:
        reason = Reason(f"it is starting: {clean(facts.waits_for)}", "wait; if it stays so, the text says for what")
        return Condition("starting", True, False, (reason,))
    reasons = (*_broker(facts), *_drivers(facts))
    reasons = reasons or tuple(_actors(facts))
    return Condition("not ready" if reasons else "ready", True, not reasons, reasons)


_NOTHING = "nothing, it ends when what runs has finished; start another worker if tasks are to go on"
_HUNG = (
    "see where it hangs (`py-spy dump --pid PID` of the main process), then restart it. A broker that takes "
    "connections and answers nothing does this, too: set socket_timeout in broker_transport_options"
)


def _broker(facts: Facts) -> Iterator[Reason]:
    if not facts.consumes:
        yield Reason("there is no connection to the broker", "bring it back; the worker connects again by itself")
    elif facts.broker_s > BROKER_SILENT_S:
        yield Reason(f"the broker has not answered for {facts.broker_s:.0f} s", "look after it and the network to it")


def _drivers(facts: Facts) -> Iterator[Reason]:
    if not facts.tasks:
        return
    for driver in facts.drivers:
        if driver.heard_s is None:
            yield Reason("the GPU driver is not there", "it is started again by itself; the log says why it ended")
        elif driver.heard_s > DRIVER_SILENT_S:
            yield Reason(
                f"the GPU driver (pid {driver.pid}) has said nothing for {driver.heard_s:.0f} s",
                "a signal handler, a hook or the result backend holds it up: the log line `held the driver` tells",
            )
    if facts.results:
        yield Reason(
            f"the result backend stores no results: {clean(facts.results)}",
            "give it room, or a primary that takes writes: results wait for it, and GPU tasks for their slots",
        )
    if not facts.has_cluster:
        yield Reason("there is no connection to a Ray cluster", "bring its head back; a driver joins it by itself")


def _actors(facts: Facts) -> Iterator[Reason]:
    if not facts.tasks or (facts.on_demand and not facts.actors):
        return
    ready = [row for row in facts.actors if row["state"] == ActorState.READY]
    if not ready:
        rows = [f"actor {row['slot']} is {row['state']}: {row.get('reason') or '?'}" for row in facts.actors[:3]]
        yield Reason(
            f"no GPU actor is ready ({clean('; '.join(rows)) or 'there is none'})",
            "`ray status` shows GPUs and nodes; an actor that fails says why, one that is lost comes back by itself",
        )
        return
    kinds = {None, *(row.get("accelerator") for row in facts.actors)}
    tasks = {name: gpu for name, gpu in facts.tasks.items() if not facts.on_demand or gpu.accelerator in kinds}
    for needed, names in _unsuited(ready, tasks):
        names_text = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        yield Reason(
            f"no ready GPU actor suits {names_text}: {needed} is needed",
            "join a node that has it, or change the task's gpu=Gpu(...)",
        )


def _unsuited(ready: Iterable[dict[str, Any]], tasks: dict[str, Gpu]) -> Iterator[tuple[str, list[str]]]:
    """What tasks need that no ready actor has, and those tasks' names."""
    found: dict[str, list[str]] = {}
    rows = list(ready)
    for name, gpu in sorted(tasks.items()):
        if not any(suits(row, gpu) for row in rows):
            found.setdefault(gpu.needs(), []).append(name)
    yield from found.items()


def suits(row: dict[str, Any], gpu: Gpu) -> bool:
    """Whether a ready actor has what a mark asks for, as the scheduler decides it."""
    memory = int(row["memory_total_bytes"] * row["share"])
    return gpu.accelerator in (None, row["accelerator"]) and (not memory or (gpu.memory or 0) <= memory)


def clean(text: str) -> str:
    """A text from elsewhere: one line, short, without passwords of URLs."""
    text = _PASSWORD.sub("://**@", " ".join(text.split()))
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
