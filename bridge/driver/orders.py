"""What the scheduler hears and what it says: plain tuples, made and obeyed by the driver."""

from typing import NamedTuple

# ---- events


class TaskWaiting(NamedTuple):
    """A task wants to run; `rank` orders the queue, smaller first. `alone`: it shares no call (it is a suspect)."""

    token: str
    name: str
    rank: int = 0
    alone: bool = False
    actor: int | None = None  # it is pinned: only this actor holds what it takes


class TaskFinished(NamedTuple):
    """A task of a call has its outcome; `run_s` is None when no body ran."""

    token: str
    run_s: float | None


class TaskCancelled(NamedTuple):
    """A task is no longer wanted."""

    token: str


class ActorReady(NamedTuple):
    """An actor is warm, and this is what it has."""

    actor: int
    accelerator: str = ""  # as Ray names it; "" where unknown
    memory_bytes: int = 0  # what one body could have at best; 0 where unknown
    warm_for: frozenset[str] = frozenset()  # names of tasks whose residents are on its device


class ActorBusy(NamedTuple):
    """An actor's own estimate of the work ahead of a new call, that of other drivers included."""

    actor: int
    queue_s: float


class ActorShort(NamedTuple):
    """An actor has too little free memory for tasks of this name, until it is ready anew."""

    actor: int
    name: str


class ActorLost(NamedTuple):
    """An actor takes no calls until it is ready again; its outstanding tasks finish or come back one by one."""

    actor: int


class HoldingsLost(NamedTuple):
    """What an actor held is gone, whether or not it takes calls: tasks pinned to it are handed back."""

    actor: int


class Tick(NamedTuple):
    """The time a WakeAt asked for has come."""


Event = (
    TaskWaiting | TaskFinished | TaskCancelled | ActorReady | ActorBusy | ActorShort | ActorLost | HoldingsLost | Tick
)


# ---- instructions


class StartCall(NamedTuple):
    """Send these tasks to this actor in one call."""

    actor: int
    call: str
    tokens: tuple[str, ...]
    estimate_s: float
    waits_s: float  # what the actor has ahead of it, as far as known


class Interrupt(NamedTuple):
    """Cancel a task that is in a call."""

    actor: int
    call: str
    token: str


class Drop(NamedTuple):
    """A task that was cancelled before it left; nothing runs of it."""

    token: str


class HandBack(NamedTuple):
    """A task that waited for what its actor held; it waits no more."""

    token: str


class WakeAt(NamedTuple):
    """Send a Tick at this time; replaces earlier ones."""

    at: float


Instruction = StartCall | Interrupt | Drop | HandBack | WakeAt
