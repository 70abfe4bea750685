"""For `python -m bridge.doctor`: one executor started on a GPU node as an actor would start it, then ended again."""

import platform
import select
import time
from typing import Any, NamedTuple

from actors.actor.child import Child
from actors.contract import Config


class Trial(NamedTuple):
    """What became of it; `problem` is empty if it became ready."""

    node: str
    device: dict[str, Any]  # DeviceInfo as a dict, empty when it did not become ready
    warm_s: float
    problem: str


def try_executor(config: Config, timeout_s: float) -> Trial:
    """Import the app, warm the device with its kernels, load residents, run examples; run no task.

    Args:
        config: what an actor would start it with.
        timeout_s: it is ended when it is not ready by then.
    """
    child, deadline = Child(config), time.monotonic() + timeout_s
    try:
        problem = _wait(child, deadline)
    finally:
        child.kill("the trial is over")
        child.reap()
        child.close()
    ready = child.ready
    return Trial(platform.node(), ready.device if ready else {}, ready.warm_s if ready else 0.0, problem)


def _wait(child: Child, deadline: float) -> str:
    """Until it is ready, or why it is not."""
    while child.ready is None:
        if child.failed is not None:
            return child.failed.reason
        if not select.select([child.socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return f"it is not ready in time, still at: {child.step}"
        try:
            child.receive()
        except EOFError:
            return f"its executor ended while it was at: {child.step} ({child.reap()})"
    return ""
