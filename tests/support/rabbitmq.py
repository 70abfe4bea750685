"""A RabbitMQ of the tests' own on loopback: the installed package's programs, nothing of its service."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest

from bridge.worker.standalone import free_port
from tests.support.services import Process, wait_for

PASSWORD = "guest"  # RabbitMQ's own, good on loopback only


def programs():
    """The folder with RabbitMQ's programs, or None. The ones on PATH insist on the user and folders of the service."""
    found = shutil.which("rabbitmq-server", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if not found:
        return None
    package = Path(found).parent.parent / "lib" / "rabbitmq" / "bin"
    return package if (package / "rabbitmq-server").exists() else Path(found).resolve().parent


def need_rabbitmq():
    """Skip where RabbitMQ is not installed; fail where it must be."""
    if programs() is None:
        reason = "rabbitmq-server is not installed (Debian: apt-get install rabbitmq-server)"
        if os.environ.get("CI") and not os.environ.get("TESTS_WITHOUT_RABBITMQ"):
            pytest.fail(reason)
        pytest.skip(reason)


class RabbitMQ:
    """One node with folders, ports, cookie and epmd of its own; taken down by process id."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="rmq-"))
        self.port, self._epmd_port = free_port(), free_port()
        self.url = f"amqp://guest:{PASSWORD}@127.0.0.1:{self.port}//"
        (self.folder / "plugins").write_text("[].\n")
        (self.folder / "rabbitmq-env.conf").touch()
        self._env = {
            "HOME": str(self.folder),  # for the cookie
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "RABBITMQ_NODENAME": f"t{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "rabbitmq-env.conf"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(self.folder / "config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "-kernel inet_dist_use_interface {127,0,0,1} -rabbit quorum_tick_interval 100 +S 2:2"  # fresh counts
            ),
            "RABBITMQ_CTL_ERL_ARGS": "+S 1:1",
        }
        epmd = ["epmd", "-port", str(self._epmd_port), "-address", "127.0.0.1"]
        self._epmd = Process(epmd, self.folder / "epmd.log", env=self._env)
        self._starts = 0
        self.start()

    def start(self):
        self._starts += 1
        command = [str(programs() / "rabbitmq-server")]
        self._server = Process(command, self.folder / f"server-{self._starts}.log", env=self._env)
        self._server.says("Server startup complete")

    def restart(self):
        """As `systemctl restart` does it: what is durable is there afterwards, connections are not."""
        assert self._server.stop() == 0
        self.start()

    def stop(self):
        for process in (self._server, self._epmd):
            process.kill_group()
        shutil.rmtree(self.folder, ignore_errors=True)

    def control(self, *words):
        """`rabbitmqctl`; the rows it prints."""
        command = [str(programs() / "rabbitmqctl"), "-q", *words]
        done = subprocess.run(command, env={**os.environ, **self._env}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return [line.split("\t") for line in done.stdout.splitlines() if line]

    def close_connections_of(self, pid):
        """Close what a process and its children have open here; how many that were."""
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        ports = {each.laddr.port for process in processes for each in process.net_connections("tcp")}
        closed = 0
        for name, port in self.control("list_connections", "pid", "peer_port", "--no-table-headers"):
            if int(port) in ports:
                self.control("close_connection", name, "the test closes it")
                closed += 1
        return closed

    def messages(self, queue):
        """(ready, unacknowledged) of a queue, exactly."""
        rows = self.control("list_queues", "name", "messages_ready", "messages_unacknowledged", "--no-table-headers")
        return next((int(ready), int(taken)) for name, ready, taken in rows if name == queue)

    def drained(self, queue):
        """Wait until a queue has nothing left, neither ready nor unacknowledged."""
        wait_for(lambda: self.messages(queue) == (0, 0), f"{queue} to be empty", every_s=0.3)
