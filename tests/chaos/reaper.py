"""Takes everything of a run down: its processes by pid, then its folder. Also when the run itself was killed.

`python -m tests.chaos.reaper FOLDER PARENT` waits until PARENT has ended. It has a session of its own, so Ctrl-C
does not reach it.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

#: Looks for what is left, until nothing is, at most this often.
TRIES = 50


def members(folder):
    """Processes of the run: those whose session began with its folder in the environment, and what they started."""
    mark = f"CHAOS_FOLDER={folder}".encode()
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                for each in [process, *process.children(recursive=True)]:
                    found[each.pid] = each
    return list(found.values())


def take_down(folder):
    """SIGKILL to every process of the run; the names of those that would not go."""
    left = []
    for _ in range(TRIES):
        left = [each for each in members(folder) if _lives(each)]
        if not left:
            return []
        for each in left:
            with contextlib.suppress(psutil.Error):
                each.send_signal(signal.SIGKILL)
        time.sleep(0.1)
    return [f"{each.pid} {each.name()}" for each in left]


def _lives(process):
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def main(folder, parent):
    """Wait for the end of the run, then take down what it has left."""
    while psutil.pid_exists(parent) and os.getppid() == parent:
        time.sleep(0.2)
    take_down(folder)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
