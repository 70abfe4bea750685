"""In the worker: Celery events `gpu-fenced` and `gpu-unfenced`, made from what the driver reports of its actors."""

from collections.abc import Iterable, Iterator
from typing import Any

from actors.contract import ActorState


class FenceEvents:
    """Which actors are fenced, as told so far."""

    def __init__(self) -> None:
        self._fenced: set[int] = set()

    def changes(self, actors: Iterable[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Event type and fields for each actor whose GPU is fenced now and was not before, or is ready again."""
        for actor in actors:
            slot, is_fenced = actor["slot"], actor["state"] == ActorState.FENCED
            if is_fenced == (slot in self._fenced) or not (is_fenced or actor["state"] == ActorState.READY):
                continue  # no news, or not known: what was told still stands
            self._fenced ^= {slot}
            fields = {"actor": slot, "node": actor.get("node", "")}
            if is_fenced:
                fields |= {"reason": actor["reason"], "probe_in_s": actor["probe_in_s"]}
            yield ("gpu-fenced" if is_fenced else "gpu-unfenced"), fields
