"""The promises on other brokers: RabbitMQ with classic and quorum queues, Redis behind TLS and a password."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import uuid

import psutil
import pytest
from celery import Celery
from kombu import Connection
from kombu.pidbox import Mailbox

from tests.support.rabbitmq import PASSWORD, RabbitMQ, need_rabbitmq
from tests.support.services import ROOT, RedisServer, Worker, wait_for
from tests.support.tls import Certificate, TlsProxy

GET = {"timeout": 60}
#: CPU tasks the worker may prefetch: two children, two each.
WINDOW = 4
QUEUES = {
    "classic": {"task_default_queue": "classic", "task_queue_max_priority": 10},
    "quorum": {
        "task_default_queue": "quorum", "task_default_queue_type": "quorum", "task_default_exchange": "quorum",
        "task_default_exchange_type": "topic", "task_default_routing_key": "quorum",
    },
}  # fmt: skip


def lines(path):
    return path.read_text().split("\n")[:-1] if path.exists() else []


@pytest.fixture(scope="session")
def rabbitmq(clean_environment):
    need_rabbitmq()
    server = RabbitMQ()
    yield server
    server.stop()


class Site:
    """A worker of the messages app at a broker, and a producer that knows the broker and its queues only."""

    def __init__(self, folder, environment, broker, name, backend=None, **conf):
        self.folder, self.queue, self.host = folder, conf["task_default_queue"], f"{name}@{socket.gethostname()}"
        self._name, self._starts, self._gates = name, 0, []
        self._env = {
            **environment, "CELERY_BROKER_URL": broker, "CELERY_MESSAGES": json.dumps(conf),
            **({"CELERY_RESULT_BACKEND": backend} if backend else {}),
        }  # fmt: skip
        self._conf, self._backend = conf, backend or environment["CELERY_RESULT_BACKEND"]
        self.producer = None
        self.connect()
        self.start()

    def connect(self):
        """A producer with connections of its own; kombu pools those that look alike."""
        if self.producer is not None:
            self.producer.close()
        broker = self._env["CELERY_BROKER_URL"]
        self.producer = Celery("producer", broker=broker, backend=self._backend, set_as_current=False)
        self.producer.conf.update(self._conf)
        if broker.startswith("amqp"):
            options = {"confirm_publish": True, "client_properties": {"product": str(uuid.uuid4())}}
            self.producer.conf.broker_transport_options = options

    def start(self):
        self._starts += 1
        # Those that connect again and again save the second in which a worker listens for neighbours each time.
        more = ["--without-mingle"] if self.queue in QUEUES else []
        self.worker = Worker(
            self.folder, "-c", "2", "--prefetch-multiplier=2", "-n", f"{self._name}@%h", *more, env=self._env,
            app="tests.apps.messages:app", log=f"worker-{self._starts}.log",
        )  # fmt: skip

    def close(self):
        self.producer.close()
        self.worker.kill_group()

    def send(self, name, *args, **options):
        return self.producer.send_task(f"messages.{name}", args, **options)

    def stats(self):
        """`inspect stats`, on a connection made for it: the tests break what Celery keeps in its pools."""
        with Connection(self._env["CELERY_BROKER_URL"]) as connection:
            replies = Mailbox("celery", type="fanout", accept=["json"])(connection).call(
                [self.host], "stats", timeout=5
            )
        return (replies or [{}])[0].get(self.host)

    def gpu(self, key):
        return self.stats()["pool"]["gpu"][key]

    def hold(self, path, text):
        """A GPU task that runs until `path` / "go" exists; returns its result once it runs."""
        self._gates.append(path / "go")
        result = self.send("gpu.holds", str(path / "go"), str(path / "log"), text)
        wait_for(lambda: f"{text} starts" in lines(path / "log"), "the body to start")
        return result

    def let_go(self):
        """No test may leave a body that runs for ever to the next."""
        for gate in self._gates:
            if gate.parent.exists():
                gate.touch()


@pytest.fixture(scope="module", params=list(QUEUES))
def served(request, rabbitmq, environment, tmp_path_factory):
    site = Site(tmp_path_factory.mktemp("site"), environment, rabbitmq.url, request.param, **QUEUES[request.param])
    yield site
    try:
        assert site.worker.popen.poll() is None, site.worker.output[-5000:]
        rabbitmq.drained(site.queue)
        assert site.worker.stop() == 0, site.worker.output[-5000:]
    finally:
        site.close()


@pytest.fixture
def site(served):
    yield served
    served.let_go()


# ---- RabbitMQ


def test_both_kinds_run_where_they_belong(site, rabbitmq):
    pids = [site.send(f"{kind}.pid").get(**GET) for kind in ("gpu", "cpu")]
    stats = site.stats()
    assert pids[0] == stats["pool"]["gpu"]["actors"][0]["executor_pid"]
    assert pids[1] in stats["pool"]["processes"]
    gpu, cpu = [site.send(f"{kind}.seen", 1, headers={"colour": "red"}).get(**GET) for kind in ("gpu", "cpu")]
    assert gpu == cpu
    assert f"'routing_key': '{site.queue}'" in gpu["request"]["delivery_info"]
    chain = site.producer.signature("messages.gpu.same", (7,)) | site.producer.signature("messages.cpu.same")
    assert (chain | site.producer.signature("messages.gpu.same")).apply_async().get(**GET) == 7
    error = site.send("gpu.fails", 5).get(**GET, propagate=False)
    assert (type(error).__name__, error.args) == ("Odd", (5,))


def test_gpu_tasks_go_in_beyond_the_window_of_cpu_tasks(site, rabbitmq, tmp_path):
    holder = site.hold(tmp_path, "first")
    others = [site.send("gpu.notes", str(tmp_path / "others"), str(n)) for n in range(3 * WINDOW)]
    wait_for(lambda: site.gpu("in_flight") == 1 + len(others), "all GPU tasks to be in the worker")
    assert site.send("cpu.same", "meanwhile").get(**GET) == "meanwhile"
    assert not lines(tmp_path / "others")
    taken = (0, 1 + len(others))
    wait_for(lambda: rabbitmq.messages(site.queue) == taken, "the broker to know them unacknowledged: late")
    (tmp_path / "go").touch()
    assert holder.get(**GET) == "first"
    assert [result.get(**GET) for result in others] == [str(n) for n in range(3 * WINDOW)]
    rabbitmq.drained(site.queue)
    if site.queue == "classic":
        wait_for(lambda: site.stats()["prefetch_count"] == WINDOW, "the window to be as before")


def test_many_tasks_of_both_kinds(site):
    gpu = [site.send("gpu.same", number) for number in range(150)]
    cpu = [site.send("cpu.same", number) for number in range(50)]
    assert [result.get(**GET) for result in gpu] == list(range(150))
    assert [result.get(**GET) for result in cpu] == list(range(50))


def test_countdown(site, rabbitmq, tmp_path):
    """Quorum queues: the broker holds it back, by Celery's native delayed delivery; classic ones: the worker."""
    sent = site.send("gpu.clock", countdown=4)
    waits = 1 if site.queue == "classic" else 0
    retried = site.send("gpu.retries", 2, 1)
    if waits:
        wait_for(lambda: rabbitmq.messages(site.queue)[1] >= waits, "the worker to have the ETA task")
    now = site.send("gpu.clock").get(**GET)
    assert now < sent.get(**GET) - 1, "what has no ETA does not wait behind it"
    eta = now + 3
    assert (
        site.send("gpu.clock", eta=site.producer.now().fromtimestamp(eta, tz=site.producer.timezone)).get(**GET) >= eta
    )
    assert retried.get(**GET) == 2, "self.retry(countdown=1), twice"


def test_shutdown_gives_back_what_has_not_started(site, rabbitmq, tmp_path):
    holder = site.hold(tmp_path, "running")
    others = [site.send("gpu.notes", str(tmp_path / "others"), str(n)) for n in range(10)]
    wait_for(lambda: sum(rabbitmq.messages(site.queue)) == 11, "the broker to have all")
    site.worker.signal(signal.SIGTERM)
    site.worker.says("Warm shutdown")
    (tmp_path / "go").touch()
    assert site.worker.ends() == 0
    assert holder.get(**GET) == "running"
    site.start()
    assert [result.get(**GET) for result in others] == [str(n) for n in range(10)]
    assert sorted(lines(tmp_path / "others"), key=int) == [str(n) for n in range(10)], "each ran once"
    assert lines(tmp_path / "log") == ["running starts", "running ends"]


def test_a_killed_worker_loses_nothing(site, rabbitmq, tmp_path):
    site.hold(tmp_path, "killed")
    others = [site.send("gpu.notes", str(tmp_path / "others"), str(n)) for n in range(5)]
    site.worker.kill_group()
    wait_for(lambda: rabbitmq.messages(site.queue) == (6, 0), "RabbitMQ to take back what was not acknowledged")
    site.start()
    (tmp_path / "go").touch()
    assert [result.get(**GET) for result in others] == [str(n) for n in range(5)]
    wait_for(lambda: "killed ends" in lines(tmp_path / "log"), "the task of the killed worker to run again")
    rabbitmq.drained(site.queue)


def test_a_poisoned_task_is_replayed(site, rabbitmq, tmp_path):
    held, killed = site.hold(tmp_path, "held"), 0
    for times in (1, 2):
        wait_for(lambda times=times: lines(tmp_path / "log").count("held starts") == times, f"run {times}")
        killed = wait_for(lambda before=killed: _executor(site, before), "the executor's pid")
        os.kill(killed, signal.SIGKILL)
    assert type(held.get(propagate=False, **GET)).__name__ == "TaskPoisoned"
    rabbitmq.drained(site.queue)
    (tmp_path / "go").touch()
    command = [sys.executable, "-m", "bridge.dead", "-A", "tests.apps.messages:app", "replay", held.id]
    done = subprocess.run(
        command, env={**os.environ, **site._env}, cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert done.returncode == 0 and site.queue in done.stdout, done.stdout + done.stderr
    wait_for(lambda: site.producer.AsyncResult(held.id).state == "SUCCESS", "the replayed task to succeed")
    assert lines(tmp_path / "log")[-1] == "held ends"


def _executor(site, before):
    pid = site.gpu("actors")[0]["executor_pid"]
    return pid if pid != before else 0


def goes_on(site, rabbitmq, tmp_path, others, holder):
    """After a break: what ran goes on, what waited runs, and as much fits into the worker as before."""
    (tmp_path / "go").touch()
    assert [result.get(**GET) for result in others] == [str(n) for n in range(len(others))]
    assert holder.get(**GET) == "running"
    rabbitmq.drained(site.queue)
    assert sorted(set(lines(tmp_path / "others")), key=int) == [str(n) for n in range(len(others))]
    (tmp_path / "again").mkdir()
    second = site.hold(tmp_path / "again", "later")
    more = [site.send("gpu.same", n) for n in range(2 * WINDOW)]
    wait_for(lambda: site.gpu("in_flight") == 1 + len(more), "as many GPU tasks in the worker as ever")
    assert site.send("cpu.same", "meanwhile").get(**GET) == "meanwhile"
    (tmp_path / "again" / "go").touch()
    assert [result.get(**GET) for result in [second, *more]] == ["later", *range(2 * WINDOW)]
    rabbitmq.drained(site.queue)


def break_connections(site, rabbitmq):
    before = site.worker.output.count("Connected to")
    assert rabbitmq.close_connections_of(site.worker.pid) >= 1
    wait_for(lambda: site.worker.output.count("Connected to") > before, "the worker to connect again")


def test_closed_connections(site, rabbitmq, tmp_path):
    holder = site.hold(tmp_path, "running")
    others = [site.send("gpu.notes", str(tmp_path / "others"), str(n)) for n in range(WINDOW)]
    executor = site.gpu("actors")[0]["executor_pid"]
    for _ in range(2):
        break_connections(site, rabbitmq)
    assert psutil.pid_exists(executor), "the body goes on meanwhile"
    goes_on(site, rabbitmq, tmp_path, others, holder)
    assert site.gpu("actors")[0]["executor_pid"] == executor


def test_a_restarted_broker(site, rabbitmq, tmp_path):
    holder = site.hold(tmp_path, "running")
    others = [site.send("gpu.notes", str(tmp_path / "others"), str(n)) for n in range(3 * WINDOW)]
    rabbitmq.restart()
    site.connect()
    wait_for(site.stats, "the worker to be there again")
    goes_on(site, rabbitmq, tmp_path, others, holder)


def test_what_waited_runs_once_after_a_reconnect(site, rabbitmq, tmp_path):
    """What had not started is the broker's again, also when the GPU is free before the worker is connected again."""
    holder = site.hold(tmp_path, "running")
    others = [site.send("gpu.notes", str(tmp_path / "others"), str(n)) for n in range(WINDOW)]
    wait_for(lambda: site.gpu("in_flight") == 1 + WINDOW, "all to be in the worker")
    break_connections(site, rabbitmq)
    (tmp_path / "go").touch()
    assert [result.get(**GET) for result in [holder, *others]] == ["running", *(str(n) for n in range(WINDOW))]
    rabbitmq.drained(site.queue)
    assert sorted(lines(tmp_path / "others"), key=int) == [str(n) for n in range(WINDOW)]


@pytest.mark.parametrize("served", ["classic"], indirect=True)
def test_the_window_is_as_before_after_a_reconnect(site, rabbitmq, tmp_path):
    holder = site.hold(tmp_path, "running")
    others = [site.send("gpu.same", n) for n in range(WINDOW)]
    break_connections(site, rabbitmq)
    (tmp_path / "go").touch()
    assert [result.get(**GET) for result in [holder, *others]] == ["running", *range(WINDOW)]
    rabbitmq.drained(site.queue)
    for number in range(WINDOW):  # Celery widens it again with each acknowledgement
        assert site.send("cpu.same", number).get(**GET) == number
    wait_for(lambda: site.stats()["prefetch_count"] == WINDOW, "the window to be as before", timeout_s=20)


@pytest.mark.parametrize("served", ["classic"], indirect=True)
def test_the_highest_priority_goes_first(site, tmp_path):
    holder = site.hold(tmp_path, "first")
    order = [0, 5, 0, 9, 1, 9]
    sent = [site.send("gpu.notes", str(tmp_path / "order"), str(each), priority=each) for each in order]
    wait_for(lambda: site.gpu("in_flight") == 1 + len(sent), "all to wait in the worker")
    (tmp_path / "go").touch()
    assert [result.get(**GET) for result in [holder, *sent]] == ["first", *map(str, order)]
    assert lines(tmp_path / "order") == ["9", "9", "5", "1", "0", "0"]


def test_results_over_rpc(rabbitmq, environment, tmp_path):
    site = Site(tmp_path, environment, rabbitmq.url, "rpc", backend="rpc://", task_default_queue="rpc")
    try:
        sent = [site.send(f"{kind}.same", [kind, n]) for kind in ("gpu", "cpu") for n in range(10)]
        assert [result.get(**GET) for result in sent] == [[kind, n] for kind in ("gpu", "cpu") for n in range(10)]
        error = site.send("gpu.fails", 5).get(**GET, propagate=False)
        assert (type(error).__name__, error.args) == ("Odd", (5,))
        telling, states = site.send("gpu.tells", str(tmp_path / "go")), []

        def told(meta):
            states.append((meta["status"], meta["result"]))
            (tmp_path / "go").touch()

        assert telling.get(**GET, on_message=told) == "done"
        assert states == [("HALFWAY", {"done": 1}), ("SUCCESS", "done")]
        assert site.worker.stop() == 0, site.worker.output[-5000:]
    finally:
        site.close()


def test_rabbitmq_over_tls(rabbitmq, environment, tmp_path):
    authority, other = Certificate(tmp_path, "authority"), Certificate(tmp_path, "other")
    proxy = TlsProxy(Certificate(tmp_path, "rabbitmq", authority), rabbitmq.port)
    url, site = f"amqps://guest:{PASSWORD}@localhost:{proxy.port}//", None
    ours, wrong = [{"ca_certs": str(each.file), "cert_reqs": ssl.CERT_REQUIRED} for each in (authority, other)]
    try:
        site = Site(tmp_path, environment, url, "tls-rmq", task_default_queue="tls-rmq", broker_use_ssl=ours)
        gpu, cpu = [site.send(f"{kind}.seen", "x" * 200_000) for kind in ("gpu", "cpu")]
        assert gpu.get(**GET) == cpu.get(**GET)
        sent = [site.send("gpu.same", n) for n in range(50)]
        assert [result.get(**GET) for result in sent] == list(range(50))
        assert proxy.connections >= 2, "producer and worker came through it"
        assert site.worker.stop() == 0, site.worker.output[-5000:]
        code, said, output = refused(environment, url, broker_use_ssl=wrong)
        assert code == 66 and "certificate verify failed" in said and "check the authority's file" in said, output
        assert f":{PASSWORD}@" not in output
    finally:
        if site:
            site.close()
        proxy.stop()


# ---- Redis behind TLS and a password


def test_redis_with_tls_and_a_password(environment, tmp_path):
    server = RedisServer(tmp_path, password="s3cret-word")
    authority, other = Certificate(tmp_path, "authority"), Certificate(tmp_path, "other")
    proxy = TlsProxy(Certificate(tmp_path, "redis", authority), server.port)
    url = f"rediss://:s3cret-word@localhost:{proxy.port}/0?ssl_cert_reqs=required&ssl_ca_certs="
    site = None
    try:
        site = Site(tmp_path, environment, url + str(authority.file), "tls", url + str(authority.file),
                    task_default_queue="tls")  # fmt: skip
        gpu, cpu = [site.send(f"{kind}.seen", "x" * 200_000) for kind in ("gpu", "cpu")]
        assert gpu.get(**GET) == cpu.get(**GET)
        sent = [site.send("gpu.same", n) for n in range(50)]
        assert [result.get(**GET) for result in sent] == list(range(50))
        assert site.gpu("in_flight") == 0
        assert site.worker.stop() == 0, site.worker.output[-5000:]
        assert "s3cret-word" not in site.worker.output
        code, said, output = refused(environment, url + str(other.file))
        assert code == 66 and "certificate verify failed" in said, output
    finally:
        if site:
            site.close()
        proxy.stop()
        server.client.close()
        server.kill_group()


# ---- transports that cannot serve GPU tasks


def refused(environment, broker, **conf):
    """Start a worker that must not start: its exit code, the line it says, all its output."""
    env = {
        **os.environ, **environment, "CELERY_BROKER_URL": broker, "CELERY_MESSAGES": json.dumps(conf),
        "BRIDGE_CONNECT_WAIT_S": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "bridge.worker", "-A", "tests.apps.messages:app"]
    done = subprocess.run(command, env=env, cwd=ROOT, timeout=60, capture_output=True, text=True)
    output = done.stdout + done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("bridge: ")]
    assert len(said) == 1 and "Traceback" not in output and "s3cret" not in output, output
    return done.returncode, said[0], output


@pytest.mark.parametrize("broker", ["filesystem://", "memory://"])
def test_a_transport_without_an_event_loop_is_refused(environment, tmp_path, broker):
    folders = {"data_folder_in": str(tmp_path), "data_folder_out": str(tmp_path), "control_folder": str(tmp_path)}
    code, said, output = refused(environment, broker, broker_transport_options=folders)
    assert code == 67 and "use Redis or RabbitMQ" in said, output
