"""In the driver: tasks of ours, for which there is no message, sent to actors for the arrays that they hold.

What they do there is in `actors/executor/errands.py`.
"""

import pickle
import uuid
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from actors.contract import Failed, FailureKind, Outcome, TaskCall
from actors.data.arrays import ArrayRef, ArraySpec
from actors.data.handles import DeviceArray
from actors.executor.device_results import lost
from actors.executor.errands import DELETE, EXPORT
from actors.unopened import Unopened
from bridge.driver.orders import Event, TaskWaiting
from bridge.driver.verdicts import MAX_LOSSES
from bridge.errors import BridgeError

#: Why what an actor held counts as lost.
NOT_HEARD_OF = "its actor takes no calls"
ENDED = "the process that held it (its executor) has ended"

#: Their rank in the queue: a task waits for each, and each is short.
_FIRST = -1000

#: It has not started, and what it is for may still be there: it waits again, as tasks do.
_NOT_STARTED = (FailureKind.HELD_UP, FailureKind.LOST, FailureKind.NO_ROOM)

#: Takes references by id of their handles, and the first error if not all could be fetched.
Then = Callable[[dict[str, ArrayRef], BridgeError | None], None]


class _Errand(NamedTuple):
    call: TaskCall
    actor: int
    executor: str
    then: Callable[[ArrayRef | BridgeError], None]
    losses: int = 0  # times it came back without having started


class Errands:
    """Sends them; `tell` takes events for the scheduler."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        self._tell = tell
        self._under_way: dict[str, _Errand] = {}  # by token

    def fetch(self, handles: Iterable[DeviceArray], then: Then) -> None:
        """Have arrays put into Ray's object store, each by the actor that holds it; `then` is called once, later."""
        wanted = {handle.id: handle for handle in handles}
        refs: dict[str, ArrayRef] = {}
        failed: list[BridgeError] = []

        def take(name: str, answer: ArrayRef | BridgeError) -> None:
            if isinstance(answer, BridgeError):
                failed.append(answer)
            else:
                refs[name] = answer
            if len(refs) + len(failed) == len(wanted):
                then(refs, failed[0] if failed else None)

        for name, handle in wanted.items():
            argument = Unopened(ArraySpec(), handle)
            self._send(EXPORT, (argument, 0, True), handle, lambda answer, name=name: take(name, answer))  # type: ignore[misc]

    def delete(self, handles: Iterable[DeviceArray]) -> None:
        """Have arrays forgotten that nobody will ask for."""
        held: dict[tuple[int, str], list[DeviceArray]] = {}
        for handle in handles:
            held.setdefault((handle.actor, handle.executor), []).append(handle)
        for mine in held.values():
            self._send(DELETE, ([each.model_dump(mode="json") for each in mine],), mine[0], lambda _: None)

    def __contains__(self, token: str) -> bool:
        return token in self._under_way

    def call(self, token: str) -> TaskCall:
        """What the actor is sent."""
        return self._under_way[token].call

    def holder(self, token: str) -> tuple[int, str]:
        """The actor it is for, and its executor."""
        errand = self._under_way[token]
        return errand.actor, errand.executor

    def wait(self, token: str) -> None:
        """The actor has not taken it: it waits."""
        errand = self._under_way[token]
        self._tell(TaskWaiting(token, errand.call.name, _FIRST, actor=errand.actor))

    def take(self, outcome: Outcome) -> None:
        """One has ended, or has to wait again."""
        errand = self._under_way[outcome.token]
        if isinstance(outcome, Failed) and outcome.kind in _NOT_STARTED and errand.losses < MAX_LOSSES:
            counts = outcome.kind is not FailureKind.HELD_UP  # who is behind a slow task gets on
            self._under_way[outcome.token] = errand._replace(losses=errand.losses + counts)
            self.wait(outcome.token)
            return
        del self._under_way[outcome.token]
        if isinstance(outcome, Failed):
            errand.then(_error_of(outcome))
        elif errand.call.name == EXPORT:
            errand.then(_ref_in(outcome.value))

    def lose(self, token: str, why: str) -> None:
        """Its actor is not there any more, or not for now."""
        self._under_way.pop(token).then(lost(why))

    def _send(
        self, name: str, args: tuple[Any, ...], of: DeviceArray, then: Callable[[ArrayRef | BridgeError], None]
    ) -> None:
        token = f"errand-{uuid.uuid4().hex}"
        context = {"id": token, "task": name, "args": [], "delivery_info": {}}
        payload = pickle.dumps((args, {}, context), 5)
        self._under_way[token] = _Errand(TaskCall(token, name, payload, None, None), of.actor, of.executor, then)
        self.wait(token)


def _ref_in(value: bytes) -> ArrayRef | BridgeError:
    try:
        return ArrayRef.model_validate(pickle.loads(value))
    except Exception as error:  # it must cost only the task that waits for it
        return lost(f"its actor has sent something else than a reference ({type(error).__name__})")


def _error_of(failed: Failed) -> BridgeError:
    try:
        error = pickle.loads(failed.exception) if failed.exception else None
    except Exception:
        error = None
    return error if isinstance(error, BridgeError) else lost(f"it could not be fetched: {failed.message}")
