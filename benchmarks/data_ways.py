"""The ways in which a large array gets to a body and its result back, as producers write them, for `benchmarks.data`.

A way's call goes from the array in the producer's memory to the result in its hands: encoding, putting and deleting are
inside. Only the list is made beforehand, since producers that send lists have lists.
"""

import base64
import json
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy
from celery import chain
from celery.result import AsyncResult

from benchmarks.apps.bridge_data import RESULTS
from benchmarks.lane import FIRST_RESULT_S, Lane, LaneFailed
from bridge import data

MIB = 2**20
#: A list of nobody's: what is sent there stays and can be measured.
NOBODY = "data.nobody"
#: Seconds that what is put for a chain stays in Redis, if nothing flushes it before.
KEEP_S = 120.0


class Between(NamedTuple):
    """Bytes in Redis between two steps of a chain."""

    message: int
    result: int
    form: int  # of the array in either


class Way(NamedTuple):
    """One way for one array of so many MiB."""

    name: str
    worker: str  # the approach whose worker takes it
    title: str
    mib: int
    encode: Callable[[Any], Any]  # what is sent for an array
    tasks: tuple[str, ...] = ("total",)

    def call(self, running: Lane) -> None:
        """Send, wait for the result, look at it."""
        argument = self.encode(floats(self.mib))
        self.check(self._sent(running, argument, running.approach.name).get(timeout=FIRST_RESULT_S))

    def check(self, found: float) -> None:
        """Raise where this is not the result."""
        expected = floats(self.mib).sum() * 2 ** (len(self.tasks) - 1)
        if abs(found - expected) > 1e-9 * expected:
            raise LaneFailed(f"{self.name}: the sum is {found}, not {expected}")

    def between(self, running: Lane) -> Between:
        """What the first step of a chain leaves in Redis for the second."""
        caller = running.caller
        first = caller.signature(self.tasks[0], (self.encode(floats(self.mib)),), queue=running.approach.name)
        second = caller.signature(self.tasks[1], queue=NOBODY)
        result = chain(first, second).apply_async().parent
        result.get(timeout=FIRST_RESULT_S)
        running.wait(lambda: bool(running.broker.llen(NOBODY)), FIRST_RESULT_S, "the second step's message")
        message = running.broker.lpop(NOBODY)
        stored = running.results.get(f"celery-task-meta-{result.id}")
        body = json.loads(base64.b64decode(json.loads(message)["body"]))
        return Between(len(message), len(stored), len(json.dumps(body[0][0])))

    def _sent(self, running: Lane, argument: Any, queue: str) -> AsyncResult:
        caller = running.caller
        if len(self.tasks) == 1:
            return caller.send_task(self.tasks[0], (argument,), queue=queue)
        first, *others = (caller.signature(task, queue=queue) for task in self.tasks)
        return chain(first.clone(args=(argument,)), *others).apply_async()


@cache
def floats(mib: int) -> Any:
    """Random float64 of so many MiB, the same ones in every run."""
    return numpy.random.default_rng(1).random(mib * MIB // 8)


@cache
def _list(mib: int) -> list[float]:
    return floats(mib).tolist()


def as_list(array: Any) -> list[float]:
    """What the producer has anyway."""
    return _list(array.nbytes // MIB)


def as_base64(array: Any) -> str:
    """The bytes as text: what people do by hand."""
    return base64.b64encode(array.tobytes()).decode("ascii")


def as_envelope(array: Any) -> Any:
    """Base64 too, with dtype and shape."""
    return data.Inline.of(array)


def as_ref(array: Any) -> data.ArrayRef:
    """Put beside the message; deleted when its task has ended."""
    return data.put(array, once=True)


def as_kept_ref(array: Any) -> data.ArrayRef:
    """Put beside the message, and left to expire."""
    return data.put(array, keep_s=KEEP_S)


def ways() -> tuple[Way, ...]:
    """All of them, the device's only where `Gpu` has it."""
    found = []
    for mib in (1, 16):
        found += [
            Way("prefork-base64", "prefork", "prefork, base64", mib, as_base64, ("total_base64",)),
            Way("bridge-ref", "bridge", "bridge, by reference", mib, as_ref),
            Way("bridge-envelope", "bridge", "bridge, envelope", mib, as_envelope),
        ]
    found += [
        Way("prefork-list", "prefork", "prefork, JSON list", 1, as_list),
        Way("bridge-list", "bridge", "bridge, JSON list", 1, as_list),
    ]
    for mib in (1, 16):
        steps = ("doubled_base64", "doubled_base64", "total_base64")
        found.append(Way("prefork-chain-base64", "prefork", "chain, prefork, base64", mib, as_base64, steps))
        for kind, title in (("ref", "by reference"), ("device", "on the device")):
            if kind in RESULTS:
                steps = (f"doubled_{kind}", f"doubled_{kind}", "total")
                found.append(Way(f"bridge-chain-{kind}", "bridge", f"chain, bridge, {title}", mib, as_kept_ref, steps))
    return tuple(found)
