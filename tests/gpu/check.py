"""``make gpu-check``: everything that only a GPU can show, in one command; the report is JSON.

Runs the GPU tests, the benchmark `gpu`, the demo on the real device and the benchmark `noop`, each as far as the host
has what it needs, and writes ``benchmarks/results/gpu-<device>.json`` with device, driver and versions; beside it lie
what all of them have printed (``gpu-check.log``) and the figures and the picture of `benchmarks.gpu`. The report is
written after each part, so that a GPU lent for minutes leaves what it had time for: ``--within 540`` leaves out or ends
what comes too late.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.approaches import APPROACHES

ROOT = Path(__file__).resolve().parents[2]


RESULTS = ROOT / "benchmarks" / "results"
#: Parts in order: what only a GPU can show comes first.
PARTS = ("tests", "gpu", "warmth", "demo", "noop")
#: Seconds that a part has, at most, and without which it is not begun.
MOST_S = {"tests": 300, "gpu": 400, "warmth": 60, "demo": 300, "noop": 600}
LEAST_S = 20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--within", type=float, default=3600, help="seconds for all of it")
    options = parser.parse_args()
    if reason := unable():
        sys.exit(f"nothing was run, for every executor would be waited for in vain: {reason}")
    began, deadline = time.time(), time.monotonic() + options.within
    report = {"date": time.strftime("%Y-%m-%d"), "host": host(), "device": device(), "left_out": []}
    name = re.sub(r"[^a-z0-9]+", "-", report["device"].get("name", "none").lower()).strip("-")
    commands = {
        "tests": ["pytest", "tests/gpu", "-q", "-s", "-rs", "--durations=15"],
        "gpu": ["benchmarks.gpu", "--name", f"gpu-{name}-kernels"],
        "demo": ["examples.photos.demo"],
        "noop": ["benchmarks.noop", "--quick", "--name", "noop-gpu", "--only", ",".join(lanes())],
    }
    target = options.out / f"gpu-{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    for part in (part for part in PARTS if part in options.only.split(",")):
        left_s = min(MOST_S[part], deadline - time.monotonic())
        if left_s < LEAST_S:
            report["left_out"].append(part)
        elif part == "warmth":
            report[part] = warmth()
        else:
            report[part] = step([sys.executable, "-m", *commands[part]], left_s, options.out / "gpu-check.log")
        if part == "gpu" and part in report:
            report[part]["targets"] = targets(RESULTS / f"gpu-{name}-kernels.json", report[part]["began"])
        if options.out != RESULTS:
            for made in (*RESULTS.glob(f"gpu-{name}-kernels.*"), *RESULTS.glob("noop-gpu.*")):
                if made.stat().st_mtime >= began:
                    shutil.copy2(made, options.out)
        target.write_text(json.dumps(report, indent=2) + "\n")
    print(f"report: {target}")
    failed = [part for part in PARTS if report.get(part, {}).get("exit_code")]
    if not report["device"].get("name"):
        sys.exit(f"no usable CUDA device: {report['device'].get('error')}; the report says what could run without one")
    if skipped := [line for line in report.get("tests", {}).get("tail", []) if re.search(r"\d+ skipped", line)]:
        failed.append(f"tests ({skipped[-1]}, though there is a GPU)")
    failed += [f"{part} (no time left)" for part in report["left_out"]]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def unable():
    """Why no executor and no driver can start here, a package that is not installed for example; else nothing."""
    code = "import actors.executor.loop, bridge.driver.loop, bridge.worker.command, tests.support.services"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def targets(result, began):
    """What was to be reached, from the figures that have just been written; else nothing."""
    if not result.exists() or result.stat().st_mtime < began:
        return []
    found = json.loads(result.read_text())["targets"]
    for each in found:
        print(f"{each['verdict'].upper():>12}  {each['what']}: {each['measured'] and each['measured'][0]}")
    return found


def lanes():
    """Of `noop`: all, without Ray Serve where it is not there."""
    ray = importlib.util.find_spec("ray")
    has_serve = ray is not None and Path(ray.origin).with_name("serve").exists()
    return [each.name for each in APPROACHES if has_serve or each.name != "serve"]


def host():
    versions = {}
    for package in ("celery", "ray", "redis", "pydantic", "numpy", "cupy-cuda12x", "cupy-cuda13x"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "kernel": platform.release(), "packages": versions}


def device():
    """What the GPU is, asked in a process of its own: this one must not touch CUDA."""
    code = (
        "import json; from actors.executor.device import open_device; d = open_device('cuda', '90%'); d.warm_up(); "
        "print(json.dumps(d.describe()._asdict()))"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    except subprocess.TimeoutExpired:
        return {"error": "it was not warm after 120 s"}
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr else "no output"}
    return json.loads(done.stdout.splitlines()[-1])


def warmth(rounds=5):
    """Seconds until the first sum on the device: in a new process, and in one that is warm."""
    code = (
        "import json, time; t = time.perf_counter(); from actors.executor.device import open_device; "
        "d = open_device('auto', '90%'); xp = d.xp; f = lambda: (float(xp.arange(1e6).sum()), d.synchronize()); f(); "
        "cold = time.perf_counter() - t; ws = []; "
        "[(ws.append(-time.perf_counter()), f(), ws.append(ws.pop() + time.perf_counter())) for _ in range(101)]; "
        "print(json.dumps([cold, sorted(ws)[50]]))"
    )
    samples = []
    for _ in range(rounds):
        try:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
        except subprocess.TimeoutExpired:
            return {"error": "no sum after 60 s", "exit_code": 124}
        if done.returncode:
            return {"error": done.stderr[-2000:], "exit_code": done.returncode}
        samples.append(json.loads(done.stdout))
    cold, warm = (sorted(column)[rounds // 2] for column in zip(*samples, strict=True))
    return {"cold_s": cold, "warm_s": warm, "ratio": cold / warm, "samples": samples}


def step(command, limit_s, log):
    """Run it in a session of its own, which ends when its time is over.

    It prints into a file: a pipe would be waited for as long as anything lives that was started in another session.
    """
    began, started = time.time(), time.monotonic()
    print(f"running {' '.join(command[1:])}", flush=True)
    with log.open("ab") as printed:
        start = printed.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            printed.write(f"\nended after {limit_s:.0f} s\n".encode())
            code = 124
    output = log.read_bytes()[start:].decode(errors="replace")
    print(output[-4000:], flush=True)
    seconds = round(time.monotonic() - started, 1)
    return {"began": began, "exit_code": code, "seconds": seconds, "tail": output.splitlines()[-60:]}


if __name__ == "__main__":
    main()
