"""A cluster whose head can be killed and started again while its GPU node lives: two Ray nodes on this machine."""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

import psutil

from tests.support.services import Process, RayNode

#: Drivers prefer a head they find on their machine. In production there is none: here its raylet goes by another name.
DISGUISED = (
    "import ray._private.services as s; s.RAYLET_EXECUTABLE = {!r}; from ray.scripts.scripts import main; main()"
)
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # the token is found at home


def kill_all_of(server):
    """SIGKILL to a server and whatever it has started, as if its machine were gone."""
    process = psutil.Process(server.pid)
    everything = [process, *process.children(recursive=True)]
    for each in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    server.popen.wait(10)
    psutil.wait_procs(everything, 10)


class Head(Process):
    """`ray start --head --num-gpus=0`, on ports that stay the same for the next one."""

    def __init__(self, folder, port, ray_folder, env=None, log="head.log"):
        from ray._private import services

        self.address = f"127.0.0.1:{port}"
        disguise = Path(ray_folder) / "node-manager"
        if not disguise.is_symlink():
            disguise.symlink_to(services.RAYLET_EXECUTABLE)
        command = [
            sys.executable, "-c", DISGUISED.format(str(disguise)), "start", "--head", "--block", f"--port={port}",
            "--node-ip-address=127.0.0.1", "--num-gpus=0", "--num-cpus=1", "--include-dashboard=false",
            "--include-log-monitor=false", "--object-store-memory=100000000", f"--temp-dir={ray_folder}",
        ]  # fmt: skip
        super().__init__(command, Path(folder) / log, env={**QUIET, **(env or {})})
        self.says("Ray runtime started")


class TwoNodes:
    """A head without GPUs and a node with one; `env` holds what makes the head's state outlive it, if anything does."""

    def __init__(self, folder, port, env=None):
        self.folder, self.port, self.env = folder, port, env or {}
        self.ray_folder = tempfile.mkdtemp(prefix="t-", dir="/tmp")
        self.starts, self.nodes = 0, []
        self.start_head()
        self.start_node()

    @property
    def address(self):
        return self.head.address

    def start_head(self):
        self.starts += 1
        # Ray refuses a second head where it finds the first one's address and a raylet, the GPU node's, that has it.
        (Path(self.ray_folder) / "ray_current_cluster").unlink(missing_ok=True)
        self.head = Head(self.folder, self.port, self.ray_folder, self.env, f"head-{self.starts}.log")

    def start_node(self):
        self.node = RayNode(self.folder, self.head)
        self.nodes.append(self.node)

    def close(self):
        for each in self.nodes:
            if each.popen.poll() is None:
                each.stop()
        self.head.stop()
        shutil.rmtree(self.ray_folder, ignore_errors=True)
