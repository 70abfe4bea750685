"""A run leaves nothing behind, also when it is killed itself."""

import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.support.services import ROOT, wait_for

RUN = """
import os, subprocess, sys, time
from tests.chaos.cluster import Cluster
cluster = Cluster(appendonly=False)
hidden = subprocess.Popen(["sleep", "600"], cwd="/", env={"CHAOS_FOLDER": str(cluster.folder)}, start_new_session=True)
(cluster.folder / "redis").mkdir()
inside = subprocess.Popen(["sleep", "600"], cwd=cluster.folder / "redis", env={}, start_new_session=True)
print(cluster.folder, hidden.pid, inside.pid, flush=True)
time.sleep(600)
"""


def test_what_a_killed_run_has_started_is_taken_down_with_its_folder(tmp_path):
    with subprocess.Popen([sys.executable, "-c", RUN], cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        folder, *pids = run.stdout.readline().split()
        assert Path(folder).is_dir() and all(psutil.pid_exists(int(pid)) for pid in pids)
        run.send_signal(signal.SIGKILL)
        wait_for(lambda: not Path(folder).exists(), "the folder to be gone")
        wait_for(lambda: not any(psutil.pid_exists(int(pid)) for pid in pids), "the processes to be gone")
