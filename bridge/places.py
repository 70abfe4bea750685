"""How many actors there should be, and of what kind: pure, from the marks, the cluster's nodes and the settings.

Actors are alike but for the accelerator they are bound to: those that no task names take any GPU that no task names.
All of them reserve the largest share of a GPU that any task of the app needs, so that every actor can run every task.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from actors.contract import PROTOCOL
from bridge.marks import Mark

#: Ray's resource and how it names the GPU model of a node.
_ACCELERATOR = "accelerator_type:"
#: Actors of one kind, at most: their numbers in reports are counted from here for each kind.
KIND_SIZE = 1000
#: So much a share of a GPU may be smaller than a fraction it stands for: three of 0.333 fit on one.
_ROUNDING = 1e-6


class Needs(NamedTuple):
    """What the tasks of an app ask of the cluster."""

    share: float  # of a GPU, for each actor
    kinds: tuple[str, ...]  # accelerators that tasks name; "" first if some task takes any GPU


class Node(NamedTuple):
    """A node that is alive."""

    gpus: float
    accelerator: str  # as Ray names it; "" where unknown


class Place(NamedTuple):
    """Where an actor belongs: the accelerator it is bound to ("" for any) and its number among those."""

    accelerator: str
    number: int

    @property
    def name(self) -> str:
        """The actor's name in Ray, the same for all workers of a namespace."""
        kind = f"{self.accelerator}-" if self.accelerator else ""
        return f"gpu-{kind}{self.number}-v{PROTOCOL}"

    def slot(self, needs: Needs) -> int:
        """Its number in this worker's reports and calls."""
        return needs.kinds.index(self.accelerator) * KIND_SIZE + self.number


class Bounds(NamedTuple):
    """Actors of one kind: so many always, so many at most."""

    least: int
    most: int


def needs(marks: Iterable[Mark]) -> Needs:
    """What the marks of an app ask for together."""
    gpus = [mark.gpu for mark in marks]
    kinds = {gpu.accelerator or "" for gpu in gpus} or {""}
    return Needs(max((gpu.share for gpu in gpus), default=1.0), tuple(sorted(kinds)))


def nodes(rows: Iterable[Mapping[str, Any]]) -> list[Node]:
    """The living nodes among what `ray.nodes` returns."""
    found = []
    for row in rows:
        if row["Alive"]:
            resources = row["Resources"]
            models = [key.removeprefix(_ACCELERATOR) for key in resources if key.startswith(_ACCELERATOR)]
            found.append(Node(resources.get("GPU", 0), models[0] if models else ""))
    return found


def places(cluster: Iterable[Node], needs: Needs) -> dict[str, int]:
    """Actors that fit into the cluster, by kind. A GPU that some task names is kept for actors bound to it."""
    found = dict.fromkeys(needs.kinds, 0)
    for node in cluster:
        kind = node.accelerator if node.accelerator in needs.kinds else ""
        if kind in found:
            whole = int(node.gpus) * int(1 / needs.share + _ROUNDING)
            found[kind] += whole
    return found


def bounds(fitting: int, min_actors: int | None, max_actors: int | None) -> Bounds:
    """For actors of one kind of which `fitting` find a place; without settings there are as many as fit."""
    most = fitting if max_actors is None else max_actors
    return Bounds(min(most, fitting if min_actors is None else min_actors), most)


def missing(there: set[int], pending: bool, wanted: bool, within: Bounds) -> list[int]:
    """Numbers of actors of one kind that are to be created.

    Args:
        there: numbers that exist, pending ones included.
        pending: some of them wait for a GPU: then there will be no more for now.
        wanted: tasks wait for an actor of this kind.
        within: its bounds.
    """
    always = [number for number in range(within.least) if number not in there]
    if not wanted or pending or always:
        return always
    target = min(within.most, max(1, 2 * len(there)))
    free = (number for number in range(within.most) if number not in there)
    return [number for number, _ in zip(free, range(target - len(there)), strict=False)]
