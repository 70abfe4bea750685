"""When an actor stops using its GPU, and when it tries again: pure, with the time handed in.

A fault is an executor that died because its CUDA context broke, or that could not warm the device up. Several of them,
of different tasks within a window, fence the GPU: a single task, or all tasks of one name while others run well, prove
only that a kernel is sick. A fenced GPU is probed with growing pauses by starting an executor, whose warm-up tests it.
docs/decisions/0020-breaker-of-a-gpu.md says why.
"""

import math
from collections import deque
from typing import NamedTuple

#: Faults kept, at most.
_KEPT = 64


class BreakerRules(NamedTuple):
    """The settings the breaker needs; seconds and counts."""

    faults: int = 3
    window_s: float = 600.0
    good_tasks: int = 100  # so many successes in a row and all is forgotten
    pauses_s: tuple[float, ...] = (60.0, 300.0, 1800.0)  # before the first, second, ... probe; the last one repeats


class _Fault(NamedTuple):
    at: float
    tasks: frozenset[str]  # who was running; one of them may be the culprit
    name: str  # of these tasks; "" when the device did not start


class Breaker:
    """Of one actor; `is_fenced` is what it decides."""

    def __init__(self, rules: BreakerRules) -> None:
        self._rules = rules
        self._faults: deque[_Fault] = deque(maxlen=_KEPT)
        self._well: set[str] = set()  # names of tasks that have succeeded since the first of the faults
        self._good = 0  # successes since the last fault
        self._pauses = 0  # taken so far
        self._never_started = False
        self.total = 0  # faults ever
        self.reason = ""
        self.probe_at = math.inf

    @property
    def is_fenced(self) -> bool:
        """Whether the GPU is not to be used."""
        return bool(self.reason)

    def may_start(self, now: float) -> bool:
        """Whether an executor may be started: always while not fenced, else as a probe."""
        return not self.is_fenced or now >= self.probe_at

    def body_broke(self, tasks: frozenset[str], name: str, how: str, is_faulty: bool, now: float) -> bool:
        """An executor has died of its device while `tasks`, all called `name`, ran; whether that fences the GPU.

        Args:
            is_faulty: the device has said that its hardware is at fault; no second opinion is needed.
        """
        return self._count(_Fault(now, tasks, name), f"{how}, while {name} ran", is_faulty)

    def start_failed(self, how: str, now: float) -> bool:
        """An executor could not use the device at its start; whether that fences the GPU."""
        was_fenced = self.is_fenced
        fences = self._count(_Fault(now, frozenset(), ""), how, was_fenced)
        if fences and not was_fenced:
            self._never_started = all(not fault.name for fault in self._faults)
        return fences and not was_fenced

    def succeeded(self, name: str) -> None:
        """A task has succeeded."""
        if not self._faults and not self._pauses:
            return
        self._good += 1
        self._well.add(name)
        if self._good >= self._rules.good_tasks:
            self._faults.clear()
            self._well.clear()
            self._pauses = 0

    def started(self) -> bool:
        """An executor is warm; whether that ends a fence."""
        ended, self.reason, self.probe_at = self.is_fenced, "", math.inf
        self._never_started = False
        return ended

    def greet(self, now: float) -> bool:
        """A new driver is there: a device that never started may have been repaired; whether it is tried at once."""
        if self.is_fenced and self._never_started:
            self.probe_at = min(self.probe_at, now)
            return True
        return False

    def _count(self, fault: _Fault, how: str, at_once: bool) -> bool:
        self.total += 1
        self._good = 0
        while self._faults and fault.at - self._faults[0].at > self._rules.window_s:
            self._faults.popleft()
        if not self._faults:
            self._well.clear()
        before = self._different()
        self._faults.append(fault)
        after = self._different()
        enough = 1 if self._pauses else self._rules.faults  # it has been fenced, and has not done well since
        if not at_once and not (after > before and after >= enough):
            return False
        self.reason = f"{f'{after} faults' if after > 1 else 'a fault'} of the device, the last: {how}"
        pauses = self._rules.pauses_s
        self.probe_at = fault.at + pauses[min(self._pauses, len(pauses) - 1)]
        self._pauses += 1
        return True

    def _different(self) -> int:
        """Faults that cannot be the work of one task, or of one kind of task while others run well."""
        culprits: dict[str, list[frozenset[str]]] = {}
        for fault in self._faults:
            known = culprits.setdefault(fault.name, [])
            if not fault.tasks or not any(fault.tasks & each for each in known):
                known.append(fault.tasks)
        return sum(1 if name and self._well - {name} else len(of_name) for name, of_name in culprits.items())
