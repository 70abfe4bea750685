"""`make gpu-check` without a GPU: what a part that fails, hangs or comes too late leaves in the report."""

import json
import os
import signal
import sys
import time

import pytest

from tests.gpu import check

NAME = {"kind": "cuda", "name": "Some GPU"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the parts given as Python code by name; the report, and what it ends with."""
    monkeypatch.setattr(check, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(check, "warmth", dict)
    monkeypatch.setattr(check, "device", lambda: NAME)
    real = check.step

    def run(codes, *options):
        def step(command, limit_s, log):
            part = next(part for part, word in WORDS.items() if word in command)
            return real([sys.executable, "-c", codes.get(part, "")], limit_s, log)

        monkeypatch.setattr(check, "step", step)
        monkeypatch.setattr(sys, "argv", ["check", "--out", str(tmp_path), *options])
        with pytest.raises(SystemExit) as ended:
            check.main()
        return json.loads((tmp_path / "gpu-some-gpu.json").read_text()), ended.value.code

    return run


WORDS = {"tests": "pytest", "gpu": "benchmarks.gpu", "demo": "examples.photos.demo", "noop": "benchmarks.noop"}


def test_all_that_goes_well_ends_with_0(run):
    report, code = run({"tests": "print('82 passed in 100 s')"})
    assert code == 0 and report["tests"]["tail"] == ["82 passed in 100 s"] and report["left_out"] == []


def test_a_test_that_was_skipped_beside_a_gpu_is_a_failure(run):
    assert "though there is a GPU" in run({"tests": "print('81 passed, 1 skipped in 100 s')"})[1]


def test_a_part_that_hangs_is_ended_and_the_others_run(run, monkeypatch, tmp_path):
    """Also when it has started something that lives on and has its output open."""
    monkeypatch.setitem(check.MOST_S, "tests", 1)
    monkeypatch.setattr(check, "LEAST_S", 0)
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
print("begun", flush=True)
time.sleep(60)
"""
    report, ended = run({"tests": code, "gpu": "print('measured')"})
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)  # it was there still, and was not waited for
    assert report["tests"]["exit_code"] == 124 and report["tests"]["tail"] == ["begun", "", "ended after 1 s"]
    assert report["gpu"]["tail"] == ["measured"] and ended == "failed: tests"


def test_what_there_is_no_time_for_is_left_out_and_told(run):
    report, code = run({}, "--within", "0")
    assert report["left_out"] == list(check.PARTS) and "gpu (no time left)" in code


def test_without_a_package_that_executors_need_nothing_is_run(run, monkeypatch, tmp_path):
    (tmp_path / "simdjson.py").write_text("raise ModuleNotFoundError('No module named simdjson')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "No module named simdjson" in check.unable()
    monkeypatch.setattr(sys, "argv", ["check", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="nothing was run"):
        check.main()


def test_targets_are_read_only_from_what_was_written_now(tmp_path, capsys):
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps({"targets": [{"what": "fast", "verdict": "met", "measured": [0.9, 0.8, 1.0]}]}))
    assert check.targets(file, time.time() + 5) == []
    assert check.targets(file, time.time() - 5)[0]["what"] == "fast"
    assert "MET  fast: 0.9" in capsys.readouterr().out
