"""Whether a body may start, with a device the test holds."""

import numpy
import pytest

from actors.executor import device, residents
from actors.executor.admission import Admission
from actors.executor.device import CpuDevice
from actors.executor.device_results import DeviceResults
from actors.executor.leaks import Leaks
from actors.executor.residents import Residents, resident

KIB = 1024


class Gpu(CpuDevice):
    """A logical memory that counts how often it is asked."""

    def __init__(self, memory_bytes, others=0):
        super().__init__("", memory_bytes)
        self.asked, self.others, self.freed = 0, others, 0

    def memory(self, held_bytes):
        self.asked += 1
        return super().memory(held_bytes + self.others)

    def free(self):
        self.freed += 1


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu(100 * KIB)
    monkeypatch.setattr(device, "_current", gpu)
    monkeypatch.setattr(residents, "shared", Residents())
    monkeypatch.setattr(residents, "_registry", [])
    return gpu


@pytest.fixture
def results():
    return DeviceResults()


@pytest.fixture
def admission(gpu, results):
    return Admission(gpu, residents.shared, results)


@pytest.fixture
def table(gpu):
    @resident
    def table(kib):
        return numpy.zeros(kib * KIB, numpy.uint8)

    return table


def test_what_declares_nothing_costs_nothing(admission, gpu):
    assert admission.admit(0, 5, ()) == 5
    assert gpu.asked == 0


def test_an_unknown_memory_has_room_for_everything(monkeypatch):
    unknown = Gpu(0)
    admission = Admission(unknown, Residents(), DeviceResults())
    assert admission.admit(1 << 60, 3, ()) == 3
    assert unknown.freed == 0


def test_those_that_fit_together_may_run_together(admission):
    assert admission.admit(30 * KIB, 8, ()) == 3
    assert admission.admit(30 * KIB, 2, ()) == 2
    assert admission.admit(100 * KIB, 2, ()) == 1


def test_the_device_is_asked_once_per_call(admission, gpu, table):
    for _ in range(10):
        admission.admit(30 * KIB, 1, ())
    assert gpu.asked == 1
    admission.forget()
    admission.admit(30 * KIB, 1, ())
    assert gpu.asked == 2
    table(1)
    admission.admit(30 * KIB, 1, ())
    assert gpu.asked == 3, "a resident has come"


def test_what_does_not_fit_is_refused_with_numbers(admission, gpu):
    gpu.others = 75 * KIB
    assert admission.admit(50 * KIB, 1, ()) == 0
    assert admission.refusal(50 * KIB) == "needs 50.0 KiB, 25.0 KiB of 100.0 KiB are free"
    assert gpu.freed == 1, "unused memory of the pool was given back before"


def test_arrays_in_cycles_are_let_go_before_a_refusal(admission, gpu):
    class Array:
        def __init__(self):
            gpu.others, self.itself = 75 * KIB, self

        def __del__(self):
            gpu.others = 0

    Array()
    assert gpu.others
    assert admission.admit(50 * KIB, 1, ()) == 1


def test_the_refused_may_start_as_soon_as_there_is_room(admission, gpu):
    gpu.others = 75 * KIB
    assert admission.admit(50 * KIB, 1, ()) == 0
    gpu.others = 0
    assert admission.admit(50 * KIB, 1, ()) == 1, "also within the same call"


def test_residents_go_for_it_the_least_recently_used_first_and_no_more_than_needed(admission, table):
    table(30), table(31), table(32), table(30)
    assert admission.admit(30 * KIB, 1, ()) == 1
    assert [name[-3:-1] for name in residents.shared.sizes()] == ["32", "30"]


def test_those_the_task_itself_uses_stay(admission, table):
    table(30), table(31), table(32)
    own = [name for name in residents.shared.sizes() if "31" in name]
    assert admission.admit(69 * KIB, 1, own) == 1
    assert list(residents.shared.sizes()) == own


def test_residents_do_not_go_for_nothing(admission, table):
    """What will not fit even without them waits, and may do so for long."""
    table(30), table(31), table(32)
    own = [name for name in residents.shared.sizes() if "31" in name]
    assert admission.admit(70 * KIB, 1, own) == 0
    assert len(residents.shared.sizes()) == 3
    assert admission.refusal(70 * KIB).startswith("needs 70.0 KiB, 7.0 KiB of")


def test_residents_do_not_go_so_that_more_can_run_together(admission, table):
    table(40)
    assert admission.admit(40 * KIB, 2, ()) == 1
    assert residents.shared.sizes()


def test_results_that_stay_go_to_the_host_before_residents_do(admission, results, table):
    table(30)
    for _ in range(2):
        results.put(numpy.zeros(30 * KIB, numpy.uint8), 60)
    results.forget_touched()
    assert admission.admit(40 * KIB, 1, ()) == 1
    assert (results.holdings().device_bytes, results.holdings().host_bytes) == (30 * KIB, 30 * KIB)
    assert residents.shared.sizes()
    assert admission.admit(80 * KIB, 1, ()) == 1
    assert (results.holdings().arrays, results.holdings().device_bytes) == (2, 0)
    assert not residents.shared.sizes()


def test_the_device_is_asked_anew_when_a_result_has_come(admission, gpu, results):
    admission.admit(30 * KIB, 1, ())
    results.put(numpy.zeros(KIB, numpy.uint8), 60)
    assert admission.admit(99 * KIB, 1, ()) == 1
    assert gpu.asked == 2


def test_results_that_stay_are_no_leak(results):
    class Pool(CpuDevice):
        def pooled_bytes(self):
            return self.used

    pool = Pool("")
    pool.used = 0
    leaks = Leaks(pool, Residents(), results, 10 * KIB)
    results.put(numpy.zeros(20 * KIB, numpy.uint8), 60)
    pool.used = 20 * KIB
    leaks.note("task")
    assert leaks.complaint() == ""
    pool.used = 40 * KIB
    leaks.note("task")
    assert "task" in leaks.complaint()
