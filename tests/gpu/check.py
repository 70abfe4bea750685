"""``make gpu-check``: everything that only a GPU can show, in one command; the report is JSON.

Runs the GPU tests, the demo on the real device and the benchmarks `noop` and `gpu`, each as far as the host has what it
needs, and writes ``benchmarks/results/gpu-<device>.json`` with device, driver and versions; the figures and the picture
of `benchmarks.gpu` lie beside it as ``gpu-<device>-kernels``.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", default="tests,warmth,demo,noop,gpu", help="parts, separated by commas")
    options = parser.parse_args()
    parts = options.only.split(",")
    report = {"date": time.strftime("%Y-%m-%d"), "host": host(), "device": device()}
    name = re.sub(r"[^a-z0-9]+", "-", report["device"].get("name", "none").lower()).strip("-")
    if "tests" in parts:
        report["tests"] = step([sys.executable, "-m", "pytest", "tests/gpu", "-q", "-s", "-rs"], 900)
    if "warmth" in parts:
        report["warmth"] = warmth()
    if "demo" in parts:
        report["demo"] = step([sys.executable, "-m", "examples.photos.demo"], 300)
    if "noop" in parts:
        report["noop"] = step([sys.executable, "-m", "benchmarks.noop", "--quick", "--name", "noop-gpu"], 600)
    if "gpu" in parts:
        report["gpu"] = step([sys.executable, "-m", "benchmarks.gpu", "--name", f"gpu-{name}-kernels"], 300)
    target = options.out / f"gpu-{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=2) + "\n")
    print(f"report: {target}")
    failed = [part for part in ("tests", "demo", "noop", "gpu") if report.get(part, {}).get("exit_code")]
    if not report["device"].get("name"):
        sys.exit(f"no usable CUDA device: {report['device'].get('error')}; the report says what could run without one")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
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
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            return {"error": done.stderr[-2000:]}
        samples.append(json.loads(done.stdout))
    cold, warm = (sorted(column)[rounds // 2] for column in zip(*samples, strict=True))
    return {"cold_s": cold, "warm_s": warm, "ratio": cold / warm, "samples": samples}


def step(command, limit_s):
    started = time.monotonic()
    print(f"running {' '.join(command[1:])}", flush=True)
    try:
        done = subprocess.run(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit_s
        )
        code, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, output = 124, str(error.stdout or "")
    print(output[-2000:], flush=True)
    return {"exit_code": code, "seconds": round(time.monotonic() - started, 1), "tail": output.splitlines()[-40:]}


if __name__ == "__main__":
    main()
