"""Each benchmark's smoke run, on real services. Never asserts that a target is met: these numbers mean nothing."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import NAMES
from benchmarks.run import RESULTS

ROOT = Path(__file__).parents[2]

#: As little of each as shows all of its parts; what is left out by --only runs elsewhere in this list.
SMOKE = {
    "noop": "--rounds 1 --only prefork,blocking-ray,bridge,plain-ray,subprocess",
    "latency": "--calls 5",
    "batching": "--rounds 1 --only bridge-batched",
    "waiting": "--rounds 1 --only bridge",
    "mixed": "--rounds 1 --only bridge,blocking-ray,prefork",
    "growth": "--rounds 1 --only bridge",
    "scaling": "--rounds 1 --only bridge-1,bridge-8,bridge-second",
    "warm": "--only bridge-noop",
    "photos": "--rounds 1 --only bridge,prefork",
    "arrays": "--rounds 1 --only bridge,blocking-ray",
    "data": "",
}


def run(name, *options):
    """Standard output of a benchmark that must end with 0."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("name", SMOKE)
def test_a_smoke_run_prints_verdicts_and_leaves_json_and_a_picture(name):
    result = f"test-{name}-quick"
    json_file, picture = RESULTS / f"{result}.json", RESULTS / f"{result}.png"
    try:
        output = run(name, "--quick", "--name", result, *SMOKE[name].split())
        document = json.loads(json_file.read_text())
        assert picture.read_bytes().startswith(b"\x89PNG")
    finally:
        json_file.unlink(missing_ok=True)
        picture.unlink(missing_ok=True)
    assert document["benchmark"] == name
    assert document["failed"] == []
    assert {"cpu", "cores", "memory_gib", "kernel", "python", "celery", "ray", "redis", "commit"} <= document[
        "machine"
    ].keys()
    assert document["samples"] and document["summary"] and document["commands"] and document["size"]
    assert document["targets"], "nothing was promised"
    for target in document["targets"]:
        verdict = target["verdict"]
        assert verdict in ("met", "missed", "not measured")
        assert any(target["what"] in line and verdict.upper() in line for line in output.splitlines()), output
    assert any(target["measured"] for target in document["targets"])


def test_without_a_gpu_the_gpu_benchmark_says_so():
    from benchmarks.gpu_kernels import find_device

    device, reason = find_device()
    if device:
        pytest.skip(f"there is a GPU here: {device}")
    assert reason and f"measures nothing here: {reason}" in run("gpu", "--quick")


def test_every_benchmark_can_be_run_and_is_among_all():
    assert set(SMOKE) | {"gpu"} == set(NAMES)
    for name in NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        assert module.__doc__.startswith(f"`python -m benchmarks.{name}`")
