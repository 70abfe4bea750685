"""The harness itself: a seed is a plan, and each rule that is broken is found. Without any service."""

import pytest

from tests.chaos import plan
from tests.chaos.verdict import Verdict

DONE = [("SUCCESS", "", "2026-01-01T00:00:00+00:00")]
POISONED = [("FAILURE", "TaskPoisoned", "2026-01-01T00:00:00+00:00")]


def failed(error):
    return [("FAILURE", error, "")]


class Told:
    """Ledgers made by hand."""

    def __init__(self):
        self.sent, self.effects, self.histories, self.faults = [], [], {}, []

    def task(self, task, kind, history, starts=1, ends=1, received=1, pid=1):
        self.sent.append({"what": "sent", "id": task, "kind": kind, "tries": 1, "at": 0.0})
        for what, times in (("received", received), ("start", starts), ("end", ends)):
            self.effects += [{"id": task, "what": what, "pid": pid, "at": 0.0}] * times
        self.histories[task] = history

    def fault(self, kind, pid=1):
        self.faults.append({"kind": kind, "victim_pid": pid, "struck": 0.0})

    def verdict(self):
        return Verdict(self.sent, self.effects, self.histories, self.faults)


@pytest.fixture
def told():
    return Told()


def test_the_same_seed_is_the_same_plan_and_every_kind_is_sent():
    assert plan.units(7, 60) == plan.units(7, 60) != plan.units(8, 60)
    assert plan.faults(7, 60) == plan.faults(7, 60) != plan.faults(8, 60)
    units = plan.units(7, 30)
    assert {unit.kind for unit in units} == set(plan.SHARES)
    ids = [each for unit in units for each in unit.ids]
    assert len(ids) == len(set(ids))
    assert {fault.kind for seed in range(40) for fault in plan.faults(seed, 60)} == set(plan.WEIGHTS)


def test_a_run_in_which_all_is_well(told):
    told.task("a", "noop_late", DONE)
    told.task("b", "poison", POISONED, starts=2, ends=0)
    told.task("c", "once", DONE, starts=2)
    told.task("d", "invalid", failed("PayloadInvalid"), starts=0, ends=0)
    told.task("e", "nap_early", failed("WorkerLostError"), ends=0)
    verdict = told.verdict()
    assert (verdict.violations(), verdict.lost, verdict.duplicated) == ([], [], {})


@pytest.mark.parametrize(
    ("kind", "history", "counts", "said"),
    [
        ("noop_late", [], {"starts": 0, "ends": 0}, "never ended"),
        ("noop_late", [], {"starts": 0, "ends": 0, "received": 0}, "lost on their way"),
        ("noop_early", [], {"starts": 0, "ends": 0, "received": 0}, "lost on their way"),
        ("retry_late", [("RETRY", "0", "")], {}, "lost on their way"),
        ("retry_late", [("RETRY", "0", "")], {"received": 2}, "never ended"),
        ("noop_late", [("STARTED", "", "")], {"ends": 0}, "never ended"),
        ("noop_early", [], {"starts": 0, "ends": 0}, "early tasks were lost"),
        ("noop_late", failed("WorkerLostError"), {}, "ended as WorkerLostError"),
        ("nap_late", POISONED, {}, "ended as TaskPoisoned"),
        ("poison", DONE, {"starts": 2}, "ended as SUCCESS"),
        ("invalid", failed("PayloadInvalid"), {}, "ran"),
        ("noop_late", [*failed("KeyError"), *DONE], {}, "final state changed"),
        ("noop_late", [*DONE, ("RETRY", "0", "")], {}, "final state changed"),
        ("noop_late", DONE, {"starts": 0, "ends": 0}, "without having run"),
        ("noop_late", DONE, {"ends": 0}, "without having run"),
        ("noop_early", DONE, {"starts": 2, "ends": 2}, "acknowledged early, ran 2 times"),
        ("noop_late", DONE, {"starts": 2, "ends": 2}, "bodies ran once more"),
    ],
)
def test_a_rule_that_is_broken_is_found(told, kind, history, counts, said):
    told.task("a", kind, history, **counts)
    assert said in "\n".join(told.verdict().violations())


def test_what_the_faults_explain(told):
    told.task("a", "noop_late", DONE, starts=2, ends=2, received=2)
    told.task("b", "noop_early", [], starts=1, ends=0)
    told.task("c", "nap_late", POISONED, starts=2, ends=0, pid=77)
    told.task("e", "revoked", [("REVOKED", "TaskRevokedError", ""), *DONE])
    assert len(told.verdict().violations()) == 3
    told.fault("kill worker")
    told.fault("kill executor", pid=77)
    assert told.verdict().violations() == []


def test_how_long_after_a_fault_a_task_sent_later_succeeded(told):
    told.task("a", "noop_late", DONE)
    told.sent[0]["at"] = 1767225590.0
    told.fault("kill actor")
    told.faults[0]["struck"] = 1767225580.0
    assert told.verdict().recoveries() == {"kill actor": [20.0]}
