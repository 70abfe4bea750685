"""What a person sees while a worker starts."""

import io
import sys

import pytest

from actors.batching import Batch
from bridge.marks import Gpu, Mark
from bridge.worker import banner
from bridge.worker.banner import Progress, gpu_banner

DEVICE = {"kind": "cuda", "name": "NVIDIA H200", "memory_bytes": 140 << 30, "libraries": "CuPy 14.2", "note": ""}
CPU = {"kind": "cpu", "name": "NumPy on CPU", "memory_bytes": 0, "libraries": "NumPy 2", "note": "no NVIDIA driver"}


def mark(name, batch=None, configured=False):
    return Mark(name=name, gpu=Gpu(), batch=batch, configured=configured)


def actor(slot=0, state="ready", device=DEVICE, **options):
    return {
        "slot": slot,
        "state": state,
        "device": device,
        "node": "gpu1",
        "executor_pid": 77,
        "warm_s": 1.25,
        **options,
    }


def info(*actors, nodes=1):
    return {"cluster": "10.0.0.1:6379", "ray": "2.60.0", "nodes": nodes, "gpus": 2, "slots": 32, "actors": list(actors)}


def test_without_marked_tasks_it_says_how_to_mark_one():
    text = gpu_banner({}, {})
    assert "gpu=True" in text and "BRIDGE_GPU_TASKS" in text


def test_a_gpu_is_named_with_its_memory_and_actors():
    text = gpu_banner(info(actor(0), actor(1, nodes=2), nodes=2), {"shop.add": mark("shop.add")})
    assert "NVIDIA H200, 140 GiB (CuPy 14.2)" in text
    assert "10.0.0.1:6379 (Ray 2.60.0, 2 nodes, 2 GPUs)" in text
    assert "actor 0:     ready on gpu1, NVIDIA H200, executor pid 77, warm in 1." in text
    assert ". shop.add" in text
    assert "NO GPU" not in text


def test_a_cpu_is_said_loudly_with_the_reason():
    text = gpu_banner(info(actor(device=CPU)), {"shop.add": mark("shop.add")})
    assert "*** NO GPU IS USED ***" in text
    assert "no NVIDIA driver" in text


def test_an_actor_that_is_not_ready_says_why():
    failing = actor(state="failing", device={}, reason="ImportError: no module named shop")
    text = gpu_banner(info(failing), {"shop.add": mark("shop.add")})
    assert "failing: ImportError: no module named shop" in text
    assert "not known yet" in text


def test_tasks_are_listed_in_order_with_what_is_special():
    marks = {
        "shop.b": mark("shop.b", Batch(len, 16, 0.0)),
        "shop.a": mark("shop.a", configured=True),
    }
    text = gpu_banner(info(actor()), marks)
    assert text.index("shop.a (BRIDGE_GPU_TASKS)") < text.index("shop.b (batches of up to 16)")


@pytest.fixture
def stderr(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(sys, "__stderr__", written)
    return written


def test_without_a_terminal_a_line_is_written_once_per_text(stderr):
    with Progress() as progress:
        for text in ["connecting", "connecting", "creating", "creating"]:
            progress.say(text)
    lines = stderr.getvalue().splitlines()
    assert [line.split(" … ")[0] for line in lines] == ["bridge: connecting", "bridge: creating"]


def test_a_long_wait_is_repeated(stderr, monkeypatch):
    monkeypatch.setattr(banner, "REPEAT_S", -1.0)
    with Progress() as progress:
        progress.say("connecting"), progress.say("connecting")
    assert len(stderr.getvalue().splitlines()) == 2


def test_on_a_terminal_the_line_is_rewritten_and_wiped(stderr, monkeypatch):
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    with Progress() as progress:
        progress.say("connecting")
    assert "\n" not in stderr.getvalue()
    assert stderr.getvalue().endswith("\r\033[K")


def test_without_any_stderr_nothing_breaks(monkeypatch):
    monkeypatch.setattr(sys, "__stderr__", None)
    with Progress() as progress:
        progress.say("connecting")
