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
    """Processes of the run: those with its folder in their environment or that work in it, and what they started."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and _belongs(process.pid, str(folder)):
                for each in [process, *process.children(recursive=True)]:
                    found[each.pid] = each
    return list(found.values())


def _belongs(pid, folder):
    here = Path(f"/proc/{pid}")
    works_in = str((here / "cwd").readlink())  # Redis: its title is written over its environment
    return works_in.startswith(f"{folder}/") or f"CHAOS_FOLDER={folder}".encode() in (
        here / "environ"
    ).read_bytes().split(b"\0")


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
