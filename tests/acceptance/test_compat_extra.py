"""What else Celery's documentation promises: routes, annotations, log formats, bootsteps, commands, multi, rdb, ...

For GPU tasks as for CPU tasks; docs/celery-compatibility.md names these tests.
"""

import json
import os
import re
import socket
import subprocess
import sys
import uuid

import psutil
import pytest
from celery import Celery, chain
from celery.utils.nodenames import worker_direct
from kombu import Exchange, Producer

from tests.apps import compat
from tests.apps.compat import EXCLUDED, IMAGES, KINDS, MAIN
from tests.support.services import ROOT, Worker, wait_for

GET = {"timeout": 15}
APP = "tests.apps.compat:app"
#: What producer and worker must agree on.
SHARED = {
    "broker_transport_options": {"global_keyprefix": "compat-broker-"},
    "result_backend_transport_options": {"global_keyprefix": "compat-results-"},
    "result_compression": "gzip",
    "task_remote_tracebacks": True,
}
CONF = {
    **SHARED,
    "worker_direct": True,
    "worker_consumer": "tests.apps.compat:OwnConsumer",
    "worker_autoscaler": "tests.apps.compat:OwnAutoscaler",
    "worker_eta_task_limit": 3,
    "worker_pool_restarts": True,
    "worker_log_datefmt": "one day",
    "worker_task_log_datefmt": "another day",
    "worker_log_format": "worker %(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s",
    "worker_task_log_format": "task %(asctime)s %(levelname)s %(processName)s %(task_name)s <%(task_id)s> "
    "%(funcName)s %(colour)s: %(message)s",
    "worker_redirect_stdouts_level": "ERROR",
    "worker_cancel_long_running_tasks_on_connection_loss": True,
    "result_failure_expires": 555,
    "result_expires": 333,
}


INCLUDED = """
import os
from celery import shared_task

TEXT = "before"

@shared_task(name="gpu.included", gpu=True)
def gpu():
    return [TEXT, os.getpid()]

@shared_task(name="cpu.included")
def cpu():
    return [TEXT, os.getpid()]
"""


def settings(folder, **conf):
    return {"CELERY_COMPAT": json.dumps(conf), "CELERY_COMPAT_FOLDER": str(folder)}


def name_of(short):
    return f"{short}@{socket.gethostname()}"


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


class Site:
    """A worker on the compat app, the folder its tasks write to, and a client that knows names and queues only."""

    def __init__(self, environment, folder, short, *options, env=None, **conf):
        self.folder, self.short, self.environment = folder, short, environment
        env = {**environment, **settings(folder, **conf), **(env or {})}
        self.worker = Worker(
            folder, "-c", "1", "-n", f"{short}@%h", *options, app=APP, env=env, log=f"{short}.log", ready=False
        )
        self.client = client(environment, **{key: conf[key] for key in SHARED if key in conf})
        own_log = folder / "root.log"
        try:
            wait_for(lambda: " ready." in self.worker.output + "".join(lines(own_log)), "the worker to be ready")
            if conf.get("worker_enable_remote_control", True):
                wait_for(self.answers, "an answer: on Redis a worker is ready before it listens")
        except BaseException:
            self.close()
            raise

    def answers(self):
        return self.client.control.ping(destination=[name_of(self.short)], timeout=1, limit=1)

    def send(self, name, *args, **options):
        return self.client.send_task(name, args, **options)

    def ask(self, command, **arguments):
        (answer,) = self.client.control.broadcast(
            command, arguments=arguments, reply=True, timeout=20, limit=1, destination=[name_of(self.short)]
        )
        return answer[name_of(self.short)]

    def stop(self):
        try:
            assert self.worker.stop() == 0, self.worker.output[-5000:]
        finally:
            self.close()

    def close(self):
        self.worker.kill_group()
        close(self.client)


def client(environment, **conf):
    urls = {"broker": environment["CELERY_BROKER_URL"], "backend": environment["CELERY_RESULT_BACKEND"]}
    app = Celery("client", set_as_current=False, **urls)
    app.conf.update(
        task_default_queue=MAIN, task_default_exchange="compat.direct", task_default_routing_key="compat.key", **conf
    )
    return app


def close(app):
    app.backend.result_consumer.stop()
    app.backend.result_consumer.subscribed_to.clear()
    app.close()


@pytest.fixture(scope="module")
def site(environment, tmp_path_factory):
    folder, more = tmp_path_factory.mktemp("compat"), tmp_path_factory.mktemp("included")
    (more / "compat_included.py").write_text(INCLUDED)
    options = ("-I", "compat_included", "--tag=blue", "--preloaded=early", "-X", EXCLUDED, "--autoscale=1,1")
    site = Site(environment, folder, "compat", *options, env={"PYTHONPATH": str(more)}, **CONF)
    site.included = more / "compat_included.py"
    try:
        yield site
        assert site.worker.popen.poll() is None, site.worker.output[-5000:]
        site.stop()
    finally:
        site.close()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# ---- application


def test_base_class_annotations_and_included_modules(site, kind):
    assert site.send(f"{kind}.tagged").get(**GET) == ["annotated", 30, True]
    result = site.send(f"{kind}.fails")
    result.get(propagate=False, **GET)
    wait_for(lambda: any(result.id in line for line in lines(site.folder / "failed")), "the annotated handler")
    (told,) = [line.split() for line in lines(site.folder / "failed") if result.id in line]
    assert told[:2] == [result.id, "ValueError"]
    gpu = site.ask("stats")["pool"]["gpu"]
    pids = {"gpu": {gpu["actors"][0]["executor_pid"]}, "cpu": set(site.ask("stats")["pool"]["processes"])}
    assert site.send(f"{kind}.included").get(**GET)[1] in pids[kind]
    assert (int(told[2]) == gpu["driver"]) is (kind == "gpu")


# ---- routing


def test_routes_exchanges_and_queues(site, kind):
    """The worker's routers hold for what follows in a chain: the driver publishes it, or the child."""
    through = chain(site.client.signature(f"{kind}.same", ("x",)), site.client.signature(f"{kind}.routed"))
    info = through.apply_async().get(**GET)
    assert (info["exchange"], info["routing_key"]) == ("compat.pictures", "image.large"), "by the router class"
    direct = site.send(f"{kind}.came_by").get(**GET)
    assert direct["routing_key"] == MAIN, "to the default queue"
    keyed = {"exchange": Exchange("compat.direct"), "routing_key": "compat.key"}
    assert site.send(f"{kind}.came_by", **keyed).get(**GET)["exchange"] == "compat.direct", "by its binding"
    pictures = Exchange("compat.pictures", "topic")
    topic = {"exchange": pictures, "routing_key": "image.tiny.png", "declare": [pictures]}
    assert site.send(f"{kind}.came_by", **topic).get(**GET)["routing_key"] == "image.tiny.png"
    own = worker_direct(name_of("compat"))
    assert site.send(f"{kind}.came_by", queue=own).get(**GET)["routing_key"] == own.name, "worker_direct"
    assert {queue["name"] for queue in site.ask("active_queues")} >= {MAIN, IMAGES, own.name}


def test_a_body_publishes_where_its_node_reaches_the_broker(site, kind):
    other = {"gpu": "cpu", "cpu": "gpu"}[kind]
    own, child, value = site.send(f"{kind}.publishes", f"{other}.parents").get(**GET)
    assert value == [own, own] and child != own, "parent and root; result.get() needs allow_join_result, as ever"
    assert [each.id for each in site.client.AsyncResult(own).children] == [child]


def test_a_task_called_as_a_function_runs_where_it_is_called(site, kind):
    for name in KINDS:
        here, there = site.send(f"{kind}.calls", f"{name}.pid").get(**GET)
        assert here == there


def test_a_new_style_errback_is_called_where_the_failed_task_is_traced(site, kind):
    errback = site.client.signature(f"{kind}.errback", ("errbacks",))
    result = site.send(f"{kind}.fails", link_error=errback)
    result.get(propagate=False, **GET)
    wait_for(lambda: any(result.id in line for line in lines(site.folder / "errbacks")), "the errback")
    pid = int(next(line.split()[1] for line in lines(site.folder / "errbacks") if result.id in line))
    pool = site.ask("stats")["pool"]
    assert pid == pool["gpu"]["driver"] if kind == "gpu" else pid in pool["processes"]


def test_an_eager_task_is_replaced_as_celery_does_it(kind):
    assert compat.app.tasks[f"{kind}.replaced"].apply(("x",)).get() == "x"


# ---- messages


def test_what_becomes_of_the_message(site, kind):
    def told(result, count=1):
        def said():
            return [line.split()[1:] for line in lines(site.folder / "messages") if line.startswith(result.id)]

        return wait_for(lambda: len(said()) >= count and said(), f"what becomes of {result.id}")

    late = {how: site.send(f"{kind}.noted_as", "noted", how) for how in ("works", "fails")}
    early = {how: site.send(f"{kind}.early", "noted", how) for how in ("works", "fails")}
    kept = {how: site.send(f"{kind}.kept", "noted", how) for how in ("works", "fails")}
    assert [told(late[how]) for how in late] == [[["acknowledged"]]] * 2
    assert [told(early[how]) for how in early] == [[["acknowledged"]]] * 2
    assert told(kept["works"]) == [["acknowledged"]]
    assert told(kept["fails"])[0] == ["rejected", "False"], "task_acks_on_failure=False"
    slow = site.send(f"{kind}.kept", "noted", "too long", time_limit=0.5)
    assert told(slow)[0] == ["rejected", "True"], "task_acks_on_timeout=False"
    site.client.control.revoke(slow.id, terminate=True, destination=[name_of("compat")])


# ---- results


def test_results_are_compressed_prefixed_and_expire(site, kind, redis_server):
    done, failed = site.send(f"{kind}.same", "x"), site.send(f"{kind}.fails")
    assert done.get(**GET) == "x"
    error = failed.get(propagate=False, **GET)
    assert type(error).__name__ == "ValueError"
    keys = [f"compat-results-celery-task-meta-{result.id}" for result in (done, failed)]
    assert all(b"gzip" in redis_server.client.get(key)[:60] for key in keys)
    ttl = [redis_server.client.ttl(key) for key in keys]
    assert 200 < ttl[0] <= 333 < ttl[1] <= 555, "result_expires, result_failure_expires"


def test_a_remote_traceback_is_raised_in_the_producer(site, kind):
    result = site.send(f"{kind}.fails")
    with pytest.raises(ValueError, match="on purpose") as caught:
        result.get(**GET)
    assert caught.traceback[-1].path.name == "compat.py" and caught.traceback[-1].name == "fails"


# ---- logs


def test_log_formats_levels_and_handlers(site, kind):
    result = site.send(f"{kind}.speaks", f"of {kind}")
    result.get(**GET)
    process = {"gpu": "GpuDriver-1", "cpu": r"ForkPoolWorker-\d+"}[kind]
    task = f"{process} {kind}.speaks <{result.id}>"
    for wanted in (
        f"task another day INFO {task} speaks red: task of {kind}",
        f"worker one day INFO {process} plainly: plain of {kind}",
        f"worker one day ERROR {process} celery.redirected: printed of {kind}",
    ):
        wait_for(lambda wanted=wanted: re.search(rf"^{wanted}$", site.worker.output, re.M), wanted)
    assert lines(site.folder / "own.log").count(f"task of {kind}") == 1, "a handler of after_setup_task_logger"
    assert lines(site.folder / "plain.log").count(f"plain of {kind}") == 1, "a handler of the app's own logger"


def test_the_length_of_a_result_in_the_log(site, kind):
    result = site.send(f"{kind}.long_value")
    assert result.get(**GET) == "long" * 30
    said = wait_for(lambda: re.search(rf"{result.id}\] succeeded in \S+: (.*)", site.worker.output), "its success")
    assert len(said[1]) <= 35 and said[1].startswith("'long"), "resultrepr_maxsize"


def test_what_a_body_leaves_on_its_request_reaches_its_handlers(site, kind):
    result = site.send(f"{kind}.leaves", kind)
    result.get(**GET)
    wait_for(lambda: f"{result.id} {kind}" in lines(site.folder / "left"), "on_success to see it")


# ---- extensions


def test_bootsteps_options_commands_and_classes_of_ones_own(site, environment):
    assert "worker blue" in lines(site.folder / "steps")
    with site.client.connection_for_write() as connection:
        Producer(connection).publish({"text": "hello"}, exchange="compat.messages", routing_key="compat.messages")
    wait_for(lambda: "message {'text': 'hello'}" in lines(site.folder / "steps"), "the message of one's own")
    found = site.ask("parts")
    assert {"OwnConsumer", "HybridConsumer"} <= set(found["consumer"])
    assert {"OwnAutoscaler", "HybridAutoscaler"} <= set(found["autoscaler"])
    command = [sys.executable, "-m", "celery", "-A", APP, "control", "-d", name_of("compat"), "say", "aloud"]
    env = {**os.environ, **environment, **settings(site.folder, **CONF)}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(site.folder / "said") == ["aloud"]


def test_the_call_and_result_commands(site, environment):
    def celery(*words):
        command = [sys.executable, "-m", "celery", "-A", APP, *words]
        env = {**os.environ, **environment, **settings(site.folder, **CONF)}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.split()[-1]

    task_id = celery("call", "gpu.same", "--args=[42]")
    assert site.client.AsyncResult(task_id).get(**GET) == 42
    assert celery("result", task_id) == "42"


def test_commands_about_the_worker_itself(site):
    assert site.ask("enable_events") == {"ok": "task events enabled"}
    assert site.ask("disable_events") == {"ok": "task events disabled"}
    assert site.ask("clock")["clock"] >= 1 and site.ask("memsample")
    assert site.ask("heartbeat") is None
    task_id = str(uuid.uuid4())
    site.ask("revoke", task_id=task_id)
    assert task_id in site.ask("revoked")


# ---- prefetch


def test_an_eta_limit_is_about_eta_tasks(site, tmp_path):
    """`worker_eta_task_limit`: the window of GPU tasks is another matter, and as before afterwards."""
    before, gate = site.ask("stats")["prefetch_count"], tmp_path / "gate"
    held = site.send("gpu.holds", str(gate), str(tmp_path / "runs"))
    waiting = [site.send("gpu.same", number) for number in range(10)]
    wait_for(lambda: site.ask("stats")["pool"]["gpu"]["in_flight"] == 11, "all GPU tasks to be in the worker")
    gate.touch()
    assert [result.get(**GET) for result in [held, *waiting]] == ["held", *range(10)]
    wait_for(lambda: site.ask("stats")["prefetch_count"] == before, "the window to be as before")


# ---- debugging


def test_rdb_opens_where_the_body_runs(site, kind):
    before = len(site.worker.output)
    result = site.send(f"{kind}.debugged")
    ready = r"Remote Debugger:(\d+): Ready to connect"
    found = wait_for(lambda: re.search(ready, site.worker.output[before:]), "the debugger to say its port")
    said = ""
    with socket.create_connection(("127.0.0.1", int(found[1])), timeout=60) as session:
        for command in ("p ['seen', value]", "!value = 41", "c"):
            while not said.endswith("(Pdb) "):  # it forgets what comes before its prompt
                said += session.recv(4096).decode()
            session.sendall(f"{command}\n".encode())
            said += "> "
    assert "['seen', 20]" in said
    assert result.get(**GET) == 42


# ---- connection loss


def test_a_running_task_is_cancelled_when_the_connection_is_lost(site, kind, redis_server, tmp_path):
    gate, runs = tmp_path / "gate", tmp_path / "runs"
    result = site.send(f"{kind}.holds", str(gate), str(runs))
    wait_for(lambda: lines(runs), "the body to run")
    said = site.worker.output.count("Connected to redis")
    ports = {each.laddr.port for each in psutil.Process(site.worker.pid).net_connections("tcp")}
    for each in redis_server.client.client_list():
        if "t" in each["flags"] and int(each["addr"].rpartition(":")[2]) in ports:  # waits for messages
            redis_server.client.client_kill_filter(_id=each["id"])
    wait_for(lambda: site.worker.output.count("Connected to redis") > said, "the worker to connect again")
    wait_for(lambda: len(lines(runs)) == 2, "its second run: the first was cancelled, not left to run on")
    gate.touch()
    assert result.get(**GET) == "held"
    if kind == "gpu":
        assert len(set(lines(runs))) == 1, "the executor stays"


def test_pool_restart_reloads_children_and_not_executors(site):
    """The last test of this worker: its code is changed on the disk."""
    before = {kind: site.send(f"{kind}.included").get(**GET) for kind in KINDS}
    site.included.write_text(INCLUDED.replace("before", "after"))
    driver = site.ask("stats")["pool"]["gpu"]["driver"]
    assert site.ask("pool_restart", modules=["compat_included"], reload=True) == {"ok": "reload started"}
    wait_for(lambda: site.ask("stats")["pool"]["gpu"]["driver"] != driver, "another driver")
    assert site.send("cpu.included").get(**GET)[0] == "after"
    assert site.send("gpu.included").get(**GET) == before["gpu"]


# ---- one worker after the other


def test_statedb_purge_excluded_queues_and_settings_of_a_quiet_worker(environment, redis_server, tmp_path):
    """Revoked ids outlive a worker; `--purge` empties its queues, `-X` leaves one alone."""
    statedb = f"--statedb={tmp_path / 'state'}"
    purged = client(environment)
    for kind in KINDS:
        purged.send_task(f"{kind}.runs", ("runs", "purged"))
    first = Site(environment, tmp_path, "first", statedb, "--purge", "-Q", f"{MAIN},{EXCLUDED}")
    revoked = {kind: str(uuid.uuid4()) for kind in KINDS}
    try:
        for task_id in revoked.values():
            first.ask("revoke", task_id=task_id)
        first.send("gpu.runs", "runs", "first").get(**GET)
        first.stop()
    finally:
        first.close()
    assert lines(tmp_path / "runs") == ["first"], "what was there before was purged"
    for kind, task_id in revoked.items():
        purged.send_task(f"{kind}.runs", ("runs", "revoked"), task_id=task_id)
        purged.send_task(f"{kind}.excluded", ("x",), queue=EXCLUDED)
    quiet = {
        "worker_enable_remote_control": False, "worker_hijack_root_logger": False, "worker_redirect_stdouts": False,
        "task_ignore_result": True, "task_store_errors_even_if_ignored": True,
    }  # fmt: skip
    alone = ("--without-gossip", "--without-mingle", "--without-heartbeat")
    second = Site(environment, tmp_path, "second", statedb, "-X", EXCLUDED, *alone, **quiet)
    try:
        sent = {kind: [second.send(f"{kind}.{name}", "x") for name in ("same", "fails", "speaks")] for kind in KINDS}
        for _, error, _ in sent.values():
            assert type(error.get(propagate=False, **GET)).__name__ == "ValueError", "errors are stored"
        for task_id in revoked.values():
            wait_for(lambda task_id=task_id: purged.AsyncResult(task_id).state == "REVOKED", "the revoked one's end")
        root = tmp_path / "root.log"
        for process in ("GpuDriver-1", "ForkPoolWorker-1"):
            wait_for(lambda process=process: f"root {process}: plain x" in lines(root), "the app's own root handler")
        assert second.worker.output.count("printed x") == 1, "of the child; the executor's is in Ray's log"
        assert [value.state for value, _, _ in sent.values()] == ["PENDING"] * 2, "task_ignore_result"
        assert purged.control.ping(timeout=1, destination=[name_of("second")]) == [], "no remote control"
        assert redis_server.client.llen(EXCLUDED) == 2 and not lines(tmp_path / "excluded")
        assert lines(tmp_path / "runs") == ["first"]
        second.stop()
    finally:
        redis_server.client.delete(EXCLUDED)
        close(purged)
        second.close()


def test_multi(environment, tmp_path):
    """`celery multi` with the pool as a setting; a log file for each process by %I."""
    env = {**os.environ, **environment, **settings(tmp_path, worker_pool="bridge.pool:HybridPool")}
    own = [f"--pidfile={tmp_path}/%n.pid", f"--logfile={tmp_path}/%n%I.log"]

    def multi(what, *more):
        command = [sys.executable, "-m", "celery", "multi", what, "one", *own, *more]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr

    app = client(environment)
    try:
        multi("start", "-A", APP, "-c", "1", "-l", "INFO", "-Q:1", MAIN)
        wait_for(lambda: app.control.ping(destination=[name_of("one")], timeout=1, limit=1), "the worker to be there")
        sent = {kind: app.send_task(f"{kind}.speaks", (kind,)) for kind in KINDS}
        for kind, result in sent.items():
            result.get(**GET)
            files = tmp_path.glob("one-*.log")
            assert any(f"task {kind}" in line for file in files for line in lines(file)), "in the process's own file"
        multi("stopwait")
        assert not list(tmp_path.glob("*.pid"))
    finally:
        for file in tmp_path.glob("*.pid"):
            for each in [psutil.Process(int(file.read_text()))]:
                [child.kill() for child in each.children(recursive=True)]
                each.kill()
        close(app)
