"""Faults as they strike: a signal to a process found by its role, or a word to Redis; each is noted with its victim."""

import contextlib
import os
import signal
import threading
import time

import redis

from tests.chaos.ledger import note

#: A worker told to stop finishes its bodies; longer than this is a fault of its own.
WARM_SHUTDOWN_S = 40
#: How often a worker or node that has gone is looked for.
LOOK_EVERY_S = 0.3


class Faults:
    """Injects faults and heals them: what ended is started again, what was stopped goes on."""

    def __init__(self, cluster, path):
        self.cluster, self._path = cluster, path
        self._timers = []
        self._stopped = set()  # pids
        self._ended = threading.Event()
        self._lock = threading.RLock()  # starts of services
        self.problems = []  # what the harness saw of the system itself that must not be
        self._healer = threading.Thread(target=self._heal, name="healer", daemon=True)
        self._healer.start()

    def strike(self, fault):
        """Inject a fault; returns its line."""
        verb, _, role = fault.kind.partition(" ")
        victim, pid = self._victim(role, fault.pick)
        at = time.time()
        if role in ("all", "one"):
            self._reset(role, fault.pick)
        elif victim is None:
            victim = "nobody was there"
        elif verb == "kill":
            self._kill(role, pid)
        elif verb == "term":
            self._term(victim, pid)
        elif verb == "stop":
            self._stop(pid, fault.seconds)
        else:
            self._restart_redis(fault.seconds)
        said = {"kind": fault.kind, "planned": fault.at, "victim": victim, "victim_pid": pid, "struck": at}
        note(self._path, **said)
        return said

    def _victim(self, role, pick):
        alive = sorted(self.cluster.find(role).items()) if role not in ("all", "one") else []
        return alive[int(pick * len(alive))] if alive else (None, None)

    def _kill(self, role, pid):
        with contextlib.suppress(ProcessLookupError):
            if role == "worker":  # the whole group, with its driver and its children
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGKILL)

    def _term(self, victim, pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        worker = self.cluster.workers[victim.split()[1]]

        def ended():
            if worker.popen.poll() is None:
                self.problems.append(f"{victim} (pid {pid}) did not end {WARM_SHUTDOWN_S} s after SIGTERM")
                worker.kill_group()

        self._later(WARM_SHUTDOWN_S, ended)

    def _stop(self, pid, seconds):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            self._stopped.add(pid)
        self._later(seconds, lambda: self._go_on(pid))

    def _go_on(self, pid):
        self._stopped.discard(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def _reset(self, role, pick):
        with contextlib.suppress(redis.RedisError):
            client = self.cluster.redis.client
            if role == "all":
                for kind in ("normal", "pubsub"):
                    client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
                return
            clients = [each["addr"] for each in client.client_list() if each["cmd"] != "client"]
            if clients:
                client.client_kill(clients[int(pick * len(clients))])

    def _restart_redis(self, seconds):
        with self._lock:
            server = self.cluster.redis
            if self.cluster.appendonly:
                server.kill_group()
            else:
                with contextlib.suppress(redis.RedisError):
                    server.client.execute_command("SHUTDOWN", "SAVE")
                server.popen.wait(20)
            server.client.close()
            time.sleep(min(2.0, seconds))
            self.cluster.start_redis()

    def _later(self, seconds, what):
        timer = threading.Timer(seconds, what)
        timer.daemon = True
        timer.start()
        self._timers.append((timer, what))

    def _heal(self):
        while not self._ended.wait(LOOK_EVERY_S):
            with self._lock, contextlib.suppress(redis.RedisError):
                try:
                    self.cluster.ensure()
                except AssertionError as error:  # a node that did not start: the next look tries again
                    note(self._path, kind="harness", said=str(error)[-300:])

    def end(self):
        """Everything goes on and is started again from now on only by whoever asks."""
        for pid in list(self._stopped):
            self._go_on(pid)
        self._ended.set()
        self._healer.join()
