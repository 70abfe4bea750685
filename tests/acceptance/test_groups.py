"""Redis asked in groups, seen from outside: a backlog, stock workers beside, deaths, drains, a chord of a thousand."""

import json
import os
import signal
import sys
from collections import Counter

import pytest
from celery import Celery, chord

from tests.support.services import RedisServer, Worker, wait_for

GET = {"timeout": 90}
SOON = {"visibility_timeout": 3, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}


def lines(path):
    return path.read_text().split("\n")[:-1] if path.exists() else []


class Site:
    """A Redis of its own, workers on it, and a producer that knows its URL only."""

    def __init__(self, folder, environment):
        self.folder, self.server, self.workers = folder, RedisServer(folder), []
        self.env = {**environment, "CELERY_BROKER_URL": self.server.url, "CELERY_RESULT_BACKEND": self.server.url}
        self.producer = Celery("producer", broker=self.server.url, backend=self.server.url, set_as_current=False)

    def start(self, *options, command=None, **conf):
        self.workers.append(
            Worker(
                self.folder, "-c", "1", "-n", f"groups{len(self.workers)}@%h", *options, app="tests.apps.messages:app",
                command=command, env={**self.env, "CELERY_MESSAGES": json.dumps(conf)},
                log=f"worker-{len(self.workers)}.log",
            )
        )  # fmt: skip
        return self.workers[-1]

    def send(self, name, *args, **options):
        return self.producer.send_task(f"messages.{name}", args, **options)

    @property
    def unacked(self):
        return self.server.client.hlen("unacked")

    def close(self):
        for worker in self.workers:
            worker.kill_group()
        self.producer.close()
        self.server.client.close()
        self.server.kill_group()


@pytest.fixture
def site(environment, tmp_path):
    site = Site(tmp_path, environment)
    yield site
    site.close()


def test_a_backlog_costs_few_questions_and_nothing_stays_behind(site):
    results = [site.send("gpu.same", number) for number in range(400)]
    site.server.client.config_resetstat()
    worker = site.start()
    assert [result.get(**GET) for result in results] == list(range(400))
    counts = {name[8:]: row["calls"] for name, row in site.server.client.info("commandstats").items()}
    assert counts["setex"] == 400
    assert counts["evalsha"] + counts["brpop"] < 400, counts  # two per message, and one per result, without groups
    wait_for(lambda: not site.unacked, "all acknowledgements")
    assert worker.stop() == 0
    assert not site.server.client.zcard("unacked_index") and not site.server.client.llen("celery")


def test_a_worker_killed_in_a_backlog_loses_nothing_to_a_stock_worker(site, tmp_path):
    """`celery worker` without the bridge finds and finishes all that the killed one had in hand."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    results = [site.send("gpu.notes", str(log), str(number)) for number in range(150)]
    results.insert(30, site.send("gpu.holds", str(gate), str(log), "held"))
    results += [site.send("gpu.notes", str(log), str(number)) for number in range(150, 200)]
    first = site.start(broker_transport_options=SOON)
    wait_for(lambda: "held starts" in lines(log) and site.unacked > 1, "the middle of the backlog")
    os.kill(first.pid, signal.SIGKILL)
    first.kill_group()
    assert site.unacked > 1
    gate.touch()
    stock = site.start("-P", "prefork", command=[sys.executable, "-m", "celery"], broker_transport_options=SOON)
    texts = [str(number) for number in range(200)]
    assert [result.get(**GET) for result in results] == [*texts[:30], "held", *texts[30:]]
    assert set(texts) <= set(lines(log))
    wait_for(lambda: not site.unacked and not site.server.client.zcard("unacked_index"), "all acknowledgements")
    assert stock.stop() == 0


def test_beside_a_stock_worker_each_task_runs_once(site, tmp_path):
    site.start()
    site.start("-P", "prefork", command=[sys.executable, "-m", "celery"])
    log = tmp_path / "log"
    results = [site.send("gpu.notes", str(log), str(number)) for number in range(300)]
    assert [result.get(**GET) for result in results] == [str(number) for number in range(300)]
    assert Counter(lines(log)) == {str(number): 1 for number in range(300)}
    wait_for(lambda: not site.unacked, "all acknowledgements")
    assert [worker.stop() for worker in site.workers] == [0, 0]


def test_what_ends_while_the_worker_drains_is_acknowledged_at_once(site, tmp_path):
    """Should the worker be killed before the drain is over, nothing that had finished may run again."""
    worker, log, gates = site.start(), tmp_path / "log", {kind: tmp_path / f"{kind}.go" for kind in ("gpu", "cpu")}
    for kind in gates:
        site.send(f"{kind}.holds", str(gates[kind]), str(log), kind)
    wait_for(lambda: {f"{kind} starts" for kind in gates} <= set(lines(log)), "both bodies to start")
    worker.signal(signal.SIGTERM)
    worker.says("Warm shutdown")
    for kind, left in (("gpu", 1), ("cpu", 0)):
        assert site.unacked == left + 1
        gates[kind].touch()
        wait_for(lambda left=left: site.unacked <= left, f"the {kind} task's acknowledgement")
    assert worker.ends() == 0


def test_a_stopped_worker_leaves_a_busy_queue_to_others(site):
    """What was on its way when it stopped consuming is in the queue again, not in its hands until its end."""
    results = [site.send("gpu.same", number) for number in range(2000)]
    worker = site.start()
    results[100].get(**GET)
    assert worker.stop() == 0
    client = site.server.client
    assert not client.hlen("unacked") and not client.zcard("unacked_index")
    done = len(client.keys("celery-task-meta-*"))
    assert client.llen("celery") + done == 2000, "each message is either done or waits"


def test_a_chord_of_a_thousand(site):
    site.start()
    header = [site.producer.signature("messages.gpu.same", (number,)) for number in range(1000)]
    body = site.producer.signature("messages.cpu.same")
    assert chord(header, app=site.producer)(body).get(**GET) == list(range(1000))
