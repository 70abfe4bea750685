"""The seed's first approach: a fresh Python process for every call, written as a careful engineer would write it.

What every call pays for: starting Python, importing the array library and, on a GPU, creating a CUDA context.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from celery import Celery

app = Celery('tasks', broker='redis://localhost//')  # fmt: skip

#: Seconds one call may take, the start of the child included.
CALL_TIMEOUT_S = float(os.environ.get("CALL_TIMEOUT_S", "60"))

#: Characters of the child's stderr that travel in an error: its end names the exception.
STDERR_TAIL = 2000

COMPUTE = [sys.executable, str(Path(__file__).with_name("compute.py"))]


class ChildFailed(Exception):
    """The child ended without an answer, or took too long; the text says how, and shows the end of its stderr."""


@app.task
def gpu_intensive_task(data: list[float]) -> float:
    """The sum of squares of a list of numbers."""
    return json.loads(ask_child(json.dumps(data)))


def ask_child(request: str) -> str:
    """What the child answers. `subprocess.run` kills and reaps it, whatever is raised here, also a soft time limit."""
    try:
        child = subprocess.run(COMPUTE, input=request, capture_output=True, text=True, timeout=CALL_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        stderr = (error.stderr or b"").decode(errors="replace")  # bytes here, also with text=True
        raise ChildFailed(f"no answer within {CALL_TIMEOUT_S} s: killed. {tail(stderr)}") from None
    if child.returncode:
        raise ChildFailed(f"ended without an answer: {how_it_ended(child.returncode)}. {tail(child.stderr)}")
    return child.stdout


def how_it_ended(exitcode: int) -> str:
    """The exit code as a person reads it."""
    return f"killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"exit code {exitcode}"


def tail(stderr: str) -> str:
    """The end of a child's stderr, where the exception stands."""
    return stderr[-STDERR_TAIL:].strip()
