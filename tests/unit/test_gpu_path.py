"""What `benchmarks.gpu` measures of the bridge's own way to the device: with a CuPy the test holds, and on NumPy."""

import numpy
import pytest

from actors.executor import pinned
from actors.executor.device import CudaDevice
from actors.executor.pinned import PinnedCopies
from benchmarks import gpu, gpu_path
from benchmarks.records import Record
from tests.unit.test_pinned import Array, FakeCupy


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(pinned, "THREADS", 2)
    monkeypatch.setattr(gpu_path, "SIZES_MIB", (1, 3))
    device, fake = CudaDevice.__new__(CudaDevice), FakeCupy()
    fake.ndarray, fake.ascontiguousarray = Array, lambda array: array
    monkeypatch.setattr("actors.executor.device.is_device_array", lambda value: isinstance(value, Array))
    device._cupy = device.xp = fake
    device._copies = PinnedCopies(fake)
    return device


def test_copies_are_told_beside_one_pinned_copy_of_the_same_size(device):
    figures, _ = gpu_path.copies({}, device)
    for mib in (1, 3):
        share = figures[f"to_device {mib} MiB GB/s"] / figures[f"pinned copy {mib} MiB GB/s"]
        assert figures[f"to_device {mib} MiB to pinned copy"] == pytest.approx(share)
        assert figures[f"in pieces {mib} MiB GB/s"] > 0 and figures[f"to_host {mib} MiB GB/s"] > 0


def test_tuning_tells_rates_by_threads_and_leaves_all_as_it_was(device, monkeypatch):
    monkeypatch.setattr(gpu_path, "TUNING_THREADS", (1, 3))
    monkeypatch.setattr(gpu_path, "TUNING_SLABS_MIB", (1, 2))
    before = pinned.SLAB_BYTES, pinned.SLABS
    figures, lists = gpu_path.tuning({}, device)
    assert figures == {} and lists["tuning threads"] == [1, 3]
    assert all(len(rates) == 2 and min(rates) > 0 for rates in lists.values()) and len(lists) == 1 + 2 * 2
    assert before == (pinned.SLAB_BYTES, pinned.SLABS)


def test_every_byte_that_is_copied_is_counted(device):
    assert device.copied() == (0, 0)
    there = device.to_device(numpy.ones(1 << 18, "float32"))
    assert device.copied() == (1 << 20, 0)
    assert device.to_device(there) is there and device.copied() == (1 << 20, 0), "it is there already"
    assert device.to_host(there).sum() == 1 << 18
    assert device.copied() == (1 << 20, 1 << 20)
    device.receive([bytes(1 << 20), bytes(1 << 20)], (1 << 21,), "|u1")
    assert device.copied() == (3 << 20, 1 << 20)


def test_a_target_is_judged_by_its_own_figures():
    benchmark = gpu.GpuOnly()
    figures = {"to_device 64 MiB to pinned copy": 0.79, "to_device 256 MiB to pinned copy": 0.81}
    figures |= {"chain, arrays copied by the bridge": 0.0}
    benchmark.records = [Record(lane="gpu", round=1, figures=figures)]
    verdicts = {target.what: target.verdict for target in benchmark.conclude().targets}
    assert verdicts["64 MiB to the device against one pinned copy"] == "missed"
    assert verdicts["256 MiB to the device against one pinned copy"] == "met"
    assert verdicts["copied between the steps of a resident chain"] == "met"
    assert verdicts["the same, as CUPTI counts"] == "not measured"


def test_a_part_that_fails_is_left_out_and_told(monkeypatch):
    def fails(size, *_):
        raise RuntimeError("no room")

    monkeypatch.setattr(gpu, "open_device", lambda *_: None)
    parts = [(gpu_path, name) for name in ("from_redis", "tuning", "chain")]
    for module, name in ((gpu, "cold_and_warm"), (gpu, "kernels"), *parts):
        monkeypatch.setattr(module, name, fails)
    for name in ("batch_curve", "bandwidth", "overlap"):
        monkeypatch.setattr(gpu.gpu_kernels, name, fails)
    monkeypatch.setattr(gpu_path, "copies", lambda size, device: ({"to_device 64 MiB to pinned copy": 0.9}, {}))
    benchmark = gpu.GpuOnly()
    benchmark.measure(None, {"rounds": 2})
    assert len(benchmark.failed) == 8 and "copies" not in benchmark.failed
    assert [record.figures for record in benchmark.records] == [{"to_device 64 MiB to pinned copy": 0.9}] * 2
    assert "0.9" in benchmark.conclude().text


def test_a_picture_is_drawn_of_what_there_is():
    """Nothing at all, here: every part of the only round has failed."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    benchmark = gpu.GpuOnly()
    benchmark.records = [Record(lane="gpu", round=1)]
    machine = dict.fromkeys(("cores", "cpu", "python", "celery", "ray", "redis"), "")
    about = {"device": "Some GPU", "machine": machine, "targets": [], "began": "", "size": {}}
    pyplot.close(benchmark.draw(pyplot, about))
