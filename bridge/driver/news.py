"""What the fleet tells the driver's loop: plain tuples, made on threads of its own and of Ray's."""

from typing import NamedTuple

from actors.contract import Busy, Health, Reply
from bridge.errors import StartupError


class Connected(NamedTuple):
    """This process is a driver of the cluster now, or the cluster has changed."""

    address: str
    ray_version: str
    nodes: int
    gpus: int
    accelerators: tuple[str, ...]  # GPU models, as Ray names them


class SlotChanged(NamedTuple):
    """An actor's health is new; `health` is None while it does not answer, and `reason` says why."""

    slot: int
    health: Health | None
    reason: str


class ActorReleased(NamedTuple):
    """An actor beyond those that always stay has ended for good."""

    slot: int


class ClusterLost(NamedTuple):
    """The head does not answer; this process can never use another cluster."""


class StartFailed(NamedTuple):
    """The fleet cannot start."""

    error: StartupError


class Replied(NamedTuple):
    """A call or collect has come back; `reply` is None when the actor is gone, and `reason` says why."""

    call: str
    reply: Reply | Busy | None
    reason: str
    sent: bool = True  # False when the call never left this process


class Fetched(NamedTuple):
    """A large outcome, pickled; None when its actor is gone."""

    token: str
    data: bytes | None


FleetEvent = Connected | SlotChanged | ActorReleased | ClusterLost | StartFailed | Replied | Fetched
