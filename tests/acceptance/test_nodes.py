"""Two GPU nodes, two workers that start at the same moment, the end of Ray's dashboard, and the end of one node."""

import shutil
import signal
import socket

import psutil
import pytest

from tests.support.heads import kill_all_of
from tests.support.joined import Joined
from tests.support.services import RayCluster, RayNode, Worker, inspected, wait_for

GET = {"timeout": 120}


@pytest.fixture(scope="module")
def site(environment, redis_server, tmp_path_factory):
    """A head with a GPU, a node with another, and two workers that have been started at once: (node, names, head)."""
    folder = tmp_path_factory.mktemp("nodes")
    cluster = RayCluster(folder, options=["--include-dashboard=true", "--dashboard-port=0"])
    node = RayNode(folder, cluster)
    env = {**environment, "BRIDGE_RAY_ADDRESS": cluster.address, "BRIDGE_BEAT_S": "0.5"}
    workers = [
        Worker(folder, "-c", "1", "-Q", name, "-n", f"{name}@%h", app="tests.apps.lossy:app", env=env,
               log=f"{name}.log", ready=False)
        for name in ("left", "right")
    ]  # fmt: skip
    for each in workers:
        each.says(" ready.")
    yield node, [f"{name}@{socket.gethostname()}" for name in ("left", "right")], cluster
    wait_for(lambda: not redis_server.client.zcard("unacked_index"), "all messages to be acknowledged")
    for each in workers:
        assert each.popen.poll() is None, each.output[-3000:]
        each.kill_group()
    if node.popen.poll() is None:
        node.stop()
    cluster.stop()
    shutil.rmtree(cluster.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def inside(environment, site):
    """A producer in the cluster: on the head, with actors here and on the node that use Ray's object store."""
    process = Joined(site[2].address, "tests", "tests.apps.data:app", environment)
    process("""
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
@ray.remote(num_cpus=0)
class User:
    def put(self, is_brief):
        return RayStore('tests', StoreConfig()).write(bytes(1_000_000), 3600.0, is_brief)
    def size(self, url):
        return RayStore('tests', StoreConfig()).lend(url, 1_000_000).nbytes
def user(node):
    return User.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
near = ray.get_runtime_context().get_node_id()
far = next(node['NodeID'] for node in ray.nodes() if node['Alive'] and node['NodeID'] != near)
here, there = user(near), user(far)
""")
    yield process
    process.end()


@pytest.fixture
def gpus(site, producer):
    """``gpus()``: what `inspect gpu` of each worker says."""
    names = site[1]
    return lambda: [inspected(producer, name, "gpu") for name in names]


def executors(info):
    return {actor["slot"]: actor["executor_pid"] for actor in info["actors"] if actor["state"] == "ready"}


def test_workers_that_start_at_once_share_one_set_of_actors(gpus):
    left, right = wait_for(lambda: all(len(executors(info)) == 2 for info in gpus()) and gpus(), "both to see both")
    assert executors(left) == executors(right) and len(left["actors"]) == len(right["actors"]) == 2
    assert left["driver"] != right["driver"]


def test_a_task_takes_the_idle_gpu_and_not_the_one_behind_another_workers_long_body(site, gpus, producer, tmp_path):
    wait_for(lambda: all(len(executors(info)) == 2 for info in gpus()), "both to see both")
    held = producer.send_task("lossy.holds.late", [str(tmp_path / "held"), str(tmp_path / "held-go")], queue="left")
    wait_for((tmp_path / "held").exists, "the body to run")  # the other worker may not have heard of it yet
    (tmp_path / "go").touch()
    for number in range(8):
        args = [str(tmp_path / str(number)), str(tmp_path / "go")]
        assert producer.send_task("lossy.holds.late", args, queue="right").get(**GET) == "done"
    assert not held.ready()
    (tmp_path / "held-go").touch()
    assert held.get(**GET) == "done"


def test_data_in_rays_object_store_are_read_on_other_nodes(inside):
    """The keeper is on the node of whoever put first, which the next test takes away."""
    assert (
        inside("""
urls = [ray.get(there.put.remote(is_brief)) for is_brief in (False, True)]
answer = ray.get([who.size.remote(url) for who in (here, there) for url in urls])
mine = data.put(numpy.ones(100), store='ray')
""")
        == [1_000_000] * 4
    )


def test_a_dashboard_and_metrics_that_hang_and_end_cost_nothing(site, gpus, producer, tmp_path):
    """Agents only hang here: a raylet ends with its agent, and then the node is lost (the next test)."""
    node, _, head = site
    watchers = {
        each: " ".join(each.cmdline())
        for server in (head, node)
        for each in psutil.Process(server.pid).children(recursive=True)
        if "dashboard" in " ".join(each.cmdline()[:4]).lower() and "raylet/raylet" not in each.exe()
    }
    (dashboard,) = [each for each, text in watchers.items() if "dashboard/dashboard.py" in text]
    assert sum("DashboardAgent" in text for text in watchers.values()) == 2, watchers
    assert any("MetricsHead" in text for text in watchers.values()), watchers
    wait_for(lambda: all(len(executors(info)) == 2 for info in gpus()), "both to see both")
    before = executors(gpus()[0])

    def hold(name):
        result = producer.send_task("lossy.holds.early", [str(tmp_path / name), str(tmp_path / "go")], queue="left")
        wait_for((tmp_path / name).exists, "the body to run")
        return result

    def work(name, held):
        (tmp_path / "go").touch()
        logs = [tmp_path / f"{name}-{number}" for number in range(20)]
        sent = [
            producer.send_task(f"lossy.holds.{kind}", [str(log), str(tmp_path / "go")], queue=queue)
            for log, kind, queue in zip(logs, ["early", "late"] * 10, ["left"] * 10 + ["right"] * 10, strict=True)
        ]
        assert [result.get(**GET) for result in [held, *sent]] == ["done"] * 21
        assert [log.read_text().count("run") for log in [tmp_path / name, *logs]] == [1] * 21
        (tmp_path / "go").unlink()

    held = hold("hang")
    for each in watchers:
        each.suspend()
    try:
        work("hang", held)
    finally:
        for each in watchers:
            each.resume()
    held = hold("end")
    dashboard.send_signal(signal.SIGTERM)  # by any other signal `ray start --block` would end the whole node
    psutil.wait_procs([each for each, text in watchers.items() if "DashboardAgent" not in text], 20)
    assert not dashboard.is_running() and head.popen.poll() is None
    work("end", held)
    assert [executors(info) for info in gpus()] == [before] * 2, "no warm executor was lost"


def test_the_tasks_of_a_lost_node_run_again_on_the_gpus_that_are_left(site, gpus, producer, tmp_path):
    node = site[0]
    wait_for(lambda: all(len(executors(info)) == 2 for info in gpus()), "both to see both")
    logs = {name: tmp_path / name for name in ("one", "two")}
    results = {}
    for name, log in logs.items():
        results[name] = producer.send_task("lossy.holds.late", [str(log), str(tmp_path / f"{name}-go")], queue="left")
        wait_for(lambda log=log: log.exists() and log.read_text().endswith("\n"), "the body to run")
    there = {each.pid for each in psutil.Process(node.pid).children(recursive=True)}
    ran = {name: int(log.read_text().split()[1]) for name, log in logs.items()}
    lost = next(name for name, pid in ran.items() if pid in there)
    kept = next(name for name, pid in ran.items() if pid not in there)
    kill_all_of(node)
    (tmp_path / f"{kept}-go").touch()
    assert results[kept].get(**GET) == "done"
    (tmp_path / f"{lost}-go").touch()
    assert results[lost].get(**GET) == "done"
    pids = [int(word) for word in logs[lost].read_text().split()[1::2]]
    assert pids == [ran[lost], ran[kept]], "once more, where a GPU is left"
    assert logs[kept].read_text().count("run") == 1

    def true():
        return all(info["gpus"] == 1 and list(executors(info).values()) == [ran[kept]] for info in gpus())

    wait_for(true, f"the capacity that is left to be shown: {gpus()}")


def test_data_whose_keeper_went_with_its_node_are_lost_and_the_next_are_kept(inside):
    """Also those that were put, and lie, on a node that is well."""
    for what in ("data.get(mine)", "store.lend(urls[1], 1_000_000)"):
        with pytest.raises(RuntimeError, match=r"^DataLost: ray:.* went with its node"):
            inside(what)
    assert (
        inside("""
again = data.put(numpy.ones(100), store='ray')
answer = float(data.get(again).sum())
data.delete(again)
""")
        == 100
    )
