"""Facts of the machine that a number means little without, and how busy others keep it. No names, no paths."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import psutil


class Busy(NamedTuple):
    """CPU seconds of the whole machine since it started."""

    used: float
    stolen: float  # by other guests of the same host


def facts(redis_version: str) -> dict[str, Any]:
    """What to know about the machine and the software on it."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "redis": redis_version,
        **{name: importlib.metadata.version(name) for name in ("celery", "kombu", "ray", "numpy")},
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "commit": commit(),
    }


def cpu_model() -> str:
    """As the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The measured commit; ``+`` when files differ from it; empty without git."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return described.stdout.strip()


def busy() -> Busy:
    """The machine's CPU time so far; the difference of two tells who else was running."""
    times = psutil.cpu_times()
    return Busy(times.user + times.nice + times.system + times.irq + times.softirq, times.steal)
