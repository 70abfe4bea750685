"""docs/howto/large-arrays.md and examples/large_arrays: what they show is run as it is written, with a real worker."""

import os
import re
import subprocess
import sys

import pytest

from tests.support.services import ROOT, Worker

HOWTO = (ROOT / "docs" / "howto" / "large-arrays.md").read_text()
TASKS, PRODUCER, *_ = re.findall(r"^```python\n(.*?)^```", HOWTO, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def places(environment):
    """A database of its own: the example uses Celery's default queue."""
    url = environment["CELERY_BROKER_URL"].removesuffix("/0") + "/9"
    return {**environment, "CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}


@pytest.fixture(scope="module")
def worker(places, tmp_path_factory):
    app = "examples.large_arrays.tasks"
    process = Worker(tmp_path_factory.mktemp("worker"), "-c", "1", "-Q", "celery", app=app, env=places)
    yield process
    assert process.stop() == 0, process.output[-5000:]


def run(places, *command):
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **places}, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_howto_shows_the_examples_tasks():
    """All of it, below the module's docstring."""
    assert (ROOT / "examples" / "large_arrays" / "tasks.py").read_text().partition('"""\n\n')[2] == TASKS


def test_the_howtos_producer_runs_as_it_is_written(worker, places):
    lines = [line for line in PRODUCER.splitlines() if line and "import" not in line]
    assert len(lines) <= 10, "the promise is a producer in ten lines"
    checks = "\nassert numpy.allclose(means, points.mean(axis=0)) and (twice == 2 * points).all() and count == 50_000"
    run(places, "-c", PRODUCER + checks)


def test_the_example_sends_some_hundred_bytes_by_reference_and_megabytes_otherwise(worker, places):
    output = run(places, "-m", "examples.large_arrays")
    found = {line[:24].strip(): line[24:].split() for line in output.splitlines()[3:]}
    inside = {way: int(cells[1].replace(",", "")) for way, cells in found.items()}
    assert list(inside) == ["JSON list", "base64 envelope", "by reference", "chain of three, by ref."]
    assert inside["by reference"] < 500 < 1_000_000 < inside["base64 envelope"] < inside["JSON list"], output
    assert found["by reference"][2] == "1,200,000"
