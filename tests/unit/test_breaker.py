"""The breaker of a GPU, fault by fault: what fences it, what does not, and when it is tried again."""

import itertools

import pytest

from actors.actor.breaker import Breaker, BreakerRules

RULES = BreakerRules(faults=3, window_s=100.0, good_tasks=10, pauses_s=(5.0, 20.0))


class Gpu:
    """A breaker and its clock."""

    def __init__(self, rules=RULES):
        self.breaker, self.now = Breaker(rules), 1000.0
        self.numbers = itertools.count()

    def breaks(self, *tasks, name="a", faulty=False, after=1.0):
        self.now += after
        tasks = tasks or (f"task {next(self.numbers)}",)
        return self.breaker.body_broke(frozenset(tasks), name, "its context broke", faulty, self.now)

    def fails_to_start(self, after=1.0):
        self.now += after
        return self.breaker.start_failed("no device", self.now)

    def does_well(self, count, name="b"):
        for _ in range(count):
            self.breaker.succeeded(name)


@pytest.fixture
def gpu():
    return Gpu()


def test_faults_of_different_tasks_fence_it(gpu):
    assert [gpu.breaks() for _ in range(3)] == [False, False, True]
    assert gpu.breaker.reason == "3 faults of the device, the last: its context broke, while a ran"
    assert gpu.breaker.is_fenced


def test_one_task_alone_never_fences_it(gpu):
    assert not any(gpu.breaks("poison") for _ in range(10))


def test_whoever_shared_a_run_with_one_task_counts_once_with_it(gpu):
    assert not gpu.breaks("x", "poison", "y")
    assert not gpu.breaks("poison")
    assert not gpu.breaks("poison", "z")
    assert not gpu.breaks("other")
    assert gpu.breaks("third")


def test_one_kind_of_task_never_fences_it_while_others_do_well(gpu):
    gpu.breaks()
    gpu.does_well(1, name="b")
    assert not any(gpu.breaks() for _ in range(10))


def test_one_kind_of_task_fences_it_when_only_it_does_well(gpu):
    gpu.breaks()
    gpu.does_well(1, name="a")
    assert [gpu.breaks() for _ in range(2)] == [False, True]


def test_what_does_well_before_the_first_fault_proves_nothing(gpu):
    gpu.does_well(5)
    assert [gpu.breaks() for _ in range(3)] == [False, False, True]


def test_old_faults_do_not_count(gpu):
    assert not any(gpu.breaks(after=51) for _ in range(10)), "never three within the window"


def test_good_tasks_make_earlier_faults_forgotten(gpu):
    for _ in range(5):
        assert not gpu.breaks() and not gpu.breaks()
        gpu.does_well(10, name="a")
    assert [gpu.breaks() for _ in range(3)] == [False, False, True]


def test_a_few_good_tasks_do_not(gpu):
    outcomes = []
    for _ in range(3):
        outcomes.append(gpu.breaks())
        gpu.does_well(9, name="a")
    assert outcomes == [False, False, True]


def test_broken_hardware_fences_it_at_once(gpu):
    assert gpu.breaks(faulty=True)


def test_starts_that_fail_count_each(gpu):
    assert not gpu.breaks()
    assert [gpu.fails_to_start(), gpu.fails_to_start()] == [False, True]


def test_probes_have_growing_pauses(gpu):
    for _ in range(3):
        gpu.breaks()
    for pause in (5.0, 20.0, 20.0):
        assert gpu.breaker.probe_at == gpu.now + pause
        assert not gpu.breaker.may_start(gpu.now + pause - 0.1) and gpu.breaker.may_start(gpu.now + pause)
        assert not gpu.fails_to_start(after=pause), "it is fenced already"


def test_a_probe_that_succeeds_ends_the_fence(gpu):
    for _ in range(3):
        gpu.breaks()
    assert gpu.breaker.started() and not gpu.breaker.is_fenced
    assert not gpu.breaker.started()


def test_after_a_fence_one_more_task_is_enough_until_it_has_done_well(gpu):
    for _ in range(3):
        gpu.breaks()
    gpu.breaker.started()
    assert gpu.breaks() and gpu.breaker.probe_at == gpu.now + 20.0, "and the pause has grown"
    gpu.breaker.started()
    gpu.does_well(10, name="a")
    assert [gpu.breaks() for _ in range(3)] == [False, False, True]
    assert gpu.breaker.probe_at == gpu.now + 5.0


def test_after_a_fence_the_same_task_is_still_one(gpu):
    gpu.breaks("poison"), gpu.breaks("second"), gpu.breaks("third")
    gpu.breaker.started()
    assert not gpu.breaks("poison")


def test_a_new_driver_has_a_device_tried_that_never_started_and_no_other(gpu):
    for _ in range(3):
        gpu.fails_to_start()
    assert gpu.breaker.greet(gpu.now) and gpu.breaker.may_start(gpu.now)
    gpu.breaker.started()
    assert gpu.breaks()
    assert not gpu.breaker.greet(gpu.now) and not gpu.breaker.may_start(gpu.now)
