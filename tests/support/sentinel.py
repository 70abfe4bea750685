"""A Redis that fails over: a master, a replica and one sentinel that is enough to decide."""

from pathlib import Path

import redis

from bridge.worker.standalone import free_port
from tests.support.services import REDIS, Process, RedisServer, wait_for

NAME = "shop"
#: The sentinel takes a master for dead after this, in milliseconds: enough for a slow machine, and soon.
DOWN_MS = 1000


class Sentinel(Process):
    """`redis-server --sentinel` for one master; it writes what it finds out into its file."""

    def __init__(self, folder, master):
        self.port = free_port()
        self.url = f"sentinel://127.0.0.1:{self.port}/0"
        path = Path(folder) / "sentinel.conf"
        path.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {NAME} 127.0.0.1 {master.port} 1\n"
            f"sentinel down-after-milliseconds {NAME} {DOWN_MS}\n"
            f"sentinel failover-timeout {NAME} 10000\n"
        )
        super().__init__([REDIS, str(path), "--sentinel"], Path(folder) / "sentinel.log")
        self.client = redis.Redis(port=self.port)
        wait_for(lambda: self._known("replicas"), "the sentinel to know the replica")

    def _known(self, what):
        try:
            return [each for each in self.client.execute_command("SENTINEL", what, NAME) if each]
        except (redis.ConnectionError, redis.ResponseError):
            return []

    def master_port(self):
        """Where the master is, as the sentinel tells whoever asks."""
        return int(self.client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)[1])


class RedisPair:
    """A master with a replica, watched by a sentinel."""

    def __init__(self, folder):
        folders = [Path(folder) / name for name in ("master", "replica")]
        for each in folders:
            each.mkdir()
        self.master = RedisServer(folders[0])
        self.replica = RedisServer(folders[1], options=[f"replicaof 127.0.0.1 {self.master.port}"])
        wait_for(lambda: self.replica.client.info("replication")["master_link_status"] == "up", "the replica")
        self.sentinel = Sentinel(folder, self.master)
        self.url = self.sentinel.url

    def fail_over(self):
        """Kill the master; the replica becomes the master. It has all: what lags behind would be lost for anybody."""
        self.master.client.execute_command("WAIT", 1, 0)
        self.master.client.close()
        self.master.kill_group()
        wait_for(lambda: self.sentinel.master_port() == self.replica.port, "the failover")

    def close(self):
        """End them all, by process id."""
        for each in (self.sentinel, self.replica, self.master):
            each.client.close()
            each.kill_group()
