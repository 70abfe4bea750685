"""The seed's second approach: a process and a queue for every call, written as a careful engineer would write it.

``spawn``, because a forked child cannot use CUDA once its parent has. Needs ``--pool threads`` or ``solo``: the
children of Celery's default pool are daemonic, and `multiprocessing` lets such processes start none.
"""

import multiprocessing
import os
import queue
import signal
import time
from multiprocessing.context import SpawnProcess

from celery import Celery
from compute import Outcome, compute

app = Celery('tasks', broker='redis://localhost//')  # fmt: skip

#: Seconds one call may take, the start of the child included.
CALL_TIMEOUT_S = float(os.environ.get("CALL_TIMEOUT_S", "60"))

#: How long a child's death can go unnoticed. An outcome is noticed at once.
LOOK_S = 0.1

#: How long a child that has answered may take to end before it is killed.
GRACE_S = 2.0

SPAWN = multiprocessing.get_context("spawn")


class ChildFailed(Exception):
    """The child raised, ended without an outcome, or took too long; the text says which."""


@app.task
def gpu_intensive_task(data: list[float]) -> float:
    """The sum of squares of a list of numbers."""
    outcomes: multiprocessing.Queue[Outcome] = SPAWN.Queue()
    child = SPAWN.Process(target=compute, args=(data, outcomes), daemon=True)
    child.start()
    try:
        kind, value = wait_for_outcome(child, outcomes)
        child.join(GRACE_S)
    finally:
        child.kill()  # nothing, if it has ended
        child.join()
        outcomes.close()
    if kind == "error":
        raise ChildFailed(value)
    return value


def wait_for_outcome(child: SpawnProcess, outcomes: "multiprocessing.Queue[Outcome]") -> Outcome:
    """What the child put into `outcomes`; ``outcomes.get()`` alone would wait for ever for a child that died."""
    deadline = time.monotonic() + CALL_TIMEOUT_S
    while time.monotonic() < deadline:
        alive = child.is_alive()  # asked before looking: what a dead child has put is in the pipe by now
        try:
            return outcomes.get(timeout=LOOK_S)
        except queue.Empty:
            if not alive:
                raise ChildFailed(f"ended without an answer: {how_it_ended(child.exitcode)}") from None
    raise ChildFailed(f"no answer within {CALL_TIMEOUT_S} s: killed")


def how_it_ended(exitcode: int) -> str:
    """The exit code as a person reads it."""
    return f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exit code {exitcode}"
