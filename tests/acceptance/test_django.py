"""The Django project of examples/, run as its README says, and what becomes of database connections in each process."""

import json
import re
import shutil
import sys

import psutil
import pytest

from tests.support.services import ROOT, Process, wait_for


class Project:
    """A copy of the example in a folder of its own, with its own database."""

    def __init__(self, folder, env):
        self.folder = folder / "project"
        self.env = {**env, "PYTHONPATH": str(ROOT), "BRIDGE_GPU_TASKS": '["products.tasks.histogram"]'}
        shutil.copytree(ROOT / "examples" / "django_shop", self.folder, ignore=shutil.ignore_patterns("db.sqlite3*"))

    def manage(self, *words):
        """Run a management command; what it has printed."""
        log = self.folder.parent / "manage.log"
        log.unlink(missing_ok=True)
        process = Process([sys.executable, "manage.py", *words], log, env=self.env, cwd=self.folder)
        assert process.ends() == 0, process.output
        return process.output

    def asks(self, code):
        """Run code as a producer, in Django's shell; what its last line has printed as JSON."""
        return json.loads(self.manage("shell", "-v", "0", "-c", code).splitlines()[-1])

    def worker(self, log="worker.log", env=None):
        command = [sys.executable, "-m", "bridge.worker", "-A", "django_shop", "-c", "2", "-l", "INFO"]
        process = Process(command, self.folder.parent / log, env={**self.env, **(env or {})}, cwd=self.folder)
        process.says(" ready.")
        return process

    def users_of_the_database(self, pids):
        """Those of `pids` that have the database open."""
        opened = {pid: [file.path for file in psutil.Process(pid).open_files()] for pid in pids}
        return {pid for pid, paths in opened.items() if str(self.folder / "db.sqlite3") in paths}


@pytest.fixture(scope="module")
def project(environment, tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("django"), environment)
    project.manage("migrate")
    return project


@pytest.fixture(scope="module")
def worker(project):
    process = project.worker()
    yield process
    assert process.stop() == 0, process.output[-5000:]
    for text in ("database is locked", "closed connection", "closed database"):
        assert text not in process.output


@pytest.fixture(scope="module")
def probe(environment, tmp_path_factory):
    """The project with the probe app, and its log; `start(**env)` ends its worker and starts another."""
    folder = tmp_path_factory.mktemp("probe")
    probe = Project(folder, environment)
    probe.log = folder / "log"
    probe.env |= {"DJANGO_SETTINGS_MODULE": "tests.apps.django_probe.settings", "PROBE_LOG": str(probe.log)}
    probe.manage("migrate")
    probe.log.write_text("")
    started = []

    def start(**env):
        assert not started or started[-1].stop() == 0
        started.append(probe.worker(f"{len(started)}.log", env))
        return started[-1]

    probe.start = start
    yield probe
    for process in started:
        process.kill_group()


def executor_of(worker):
    return int(re.search(r"executor pid (\d+)", worker.output)[1])


def test_the_readmes_commands_print_what_it_says(project, worker):
    assert project.manage("add_product", "cup", "1", "1").splitlines() == [
        "norm: 1.41421", "similar: nothing yet", "histogram: [0, 0, 2, 0]",
    ]  # fmt: skip
    assert project.manage("add_product", "teapot", "3", "4").splitlines() == [
        "norm: 5", "similar: cup", "histogram: [1, 0, 0, 1]",
    ]  # fmt: skip
    for task, process in {
        "norm": "GpuDriver", "similar": "GpuDriver", "histogram": "GpuDriver", "store_norm": "ForkPoolWorker",
    }.items():  # fmt: skip
        assert re.search(rf"/{process}-\d\] Task products.tasks.{task}\[\S+\] succeeded", worker.output)
    assert "products.tasks.histogram (BRIDGE_GPU_TASKS)" in worker.output
    assert "products.tasks.norm\n" in worker.output


def test_many_tasks_of_both_kinds_use_the_database_at_once(project, worker):
    """Every product is created in a transaction of its own, while children write and the executor reads."""
    norms, names = project.asks(
        """
import json
from django.db import transaction
from products.models import Product
from products.tasks import norm, similar, store_norm

sent = []
def send(product):
    sent.append([(norm.s(product.features) | store_norm.s(product.pk)).delay(), similar.delay(product.pk, 1)])

for number in range(30):
    with transaction.atomic():
        product = Product.objects.create(name=f"many {number}", features=[number, 1.0])
        transaction.on_commit(lambda: send(product))
names = []
for stored, found in sent:
    stored.get(timeout=60)
    names += found.get(timeout=60)
print(json.dumps([list(Product.objects.filter(name__startswith="many").values_list("norm", flat=True)), names]))
"""
    )
    assert norms == pytest.approx([(number**2 + 1) ** 0.5 for number in range(30)])
    assert len(names) == 30 and "many 28" in names


def test_what_is_sent_on_commit_runs_once_the_row_is_there(project, worker):
    assert project.asks(
        """
import json
from django.db import transaction
from celery.result import AsyncResult
from products.models import Product
from products.tasks import norm, similar, store_norm

with transaction.atomic():
    product = Product.objects.create(name="on commit", features=[6, 8])
    norm.apply_async_on_commit([product.features], link=store_norm.s(product.pk))
    similar.apply_async_on_commit([product.pk], task_id="on-commit")
found = AsyncResult("on-commit").get(timeout=60)
while product.norm is None:
    product.refresh_from_db()
print(json.dumps([product.norm, len(found)]))
"""
    ) == [10.0, 3]


def test_no_process_keeps_a_connection_after_a_task(project, worker):
    project.manage("add_product", "kettle", "2", "3")
    executor = executor_of(worker)
    pids = [executor, *(child.pid for child in psutil.Process(worker.pid).children())]
    assert len(pids) == 4, "the executor, two children and the driver"
    wait_for(lambda: not project.users_of_the_database(pids), "connections to be closed")


def test_hooks_bodies_and_forks_each_open_their_own(probe):
    worker = probe.start()
    forked = {child.pid for child in psutil.Process(worker.pid).children()}
    assert len(forked) == 3, "two children and the driver"
    assert probe.users_of_the_database([worker.pid]), "the probe leaves a connection open in the parent"
    wait_for(lambda: not probe.users_of_the_database(forked), "the forks to let go of it")

    def ended_pools():
        return {int(line.split()[-1]) for line in probe.log.read_text().splitlines() if line.startswith("pool closed")}

    wait_for(lambda: {worker.pid, *forked} <= ended_pools(), "pools, whose threads are the parent's, to be given up")
    looks = probe.asks(
        """
import json
from tests.apps.django_probe.tasks import cpu_look, gpu_look

print(json.dumps([look.delay().get(timeout=60) for look in [gpu_look, cpu_look] * 4]))
"""
    )
    in_executor, in_children = ({pid for pid, _, _ in looks[start::2]} for start in (0, 1))
    assert in_executor == {executor_of(worker)} and in_children < forked
    assert not any(was_open for _, was_open, _ in looks), "each body opens its own, also the second in a process"
    in_driver = [line.split()[1:] for line in probe.log.read_text().splitlines() if line.startswith("driver")]
    assert [was_open for _, was_open in in_driver] == ["False"] * 4, "and so does each hook"
    assert {int(pid) for pid, _ in in_driver} <= forked - in_children


def test_bodies_have_the_environment_of_their_worker(probe):
    """What BRIDGE_ENVIRONMENT does not name is the GPU node's own; the actor stays, warm with the last one's."""
    code = """
import json
from tests.apps.django_probe.tasks import environment

print(json.dumps(environment.delay().get(timeout=60)))
"""
    env = {"BRIDGE_ENVIRONMENT": '["SHOP_*"]', "SHOP_SIZE": "L", "SHOE_SIZE": "42"}
    probe.start(DJANGO_COLOUR="red", **env)
    assert probe.asks(code) == ["red", "L", None]
    probe.start(DJANGO_COLOUR="blue", **env)
    assert probe.asks(code) == ["blue", "L", None]
