"""The fleet follows the cluster and the work: bounds, idle actors, fractions, GPU models, nodes that join."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest

from tests.support.services import RayCluster, RayNode, Worker, inspected, wait_for

GET = {"timeout": 60}


@pytest.fixture
def start(environment, producer, tmp_path):
    """``start(settings, gpus=2)``: a cluster and a worker of the fleet app on it."""
    started = []

    class Fleet:
        def __init__(self, settings, **cluster):
            self.cluster = RayCluster(tmp_path, **cluster)
            started.append(self.cluster)
            self.name = f"fleet@{socket.gethostname()}"
            self.env = {
                **environment,
                "BRIDGE_RAY_ADDRESS": self.cluster.address,
                "BRIDGE_BEAT_S": "0.2",
                "BRIDGE_ENVIRONMENT": '["FLEET_*"]',
                **settings,
            }
            self.work()

        def work(self):
            options = ("-c", "1", "-Q", "fleet", "-n", "fleet@%h")
            self.worker = Worker(tmp_path, *options, app="tests.apps.fleet:app", env=self.env)

        def send(self, task, *args):
            return producer.send_task(f"fleet.{task}", args, queue="fleet")

        def gpu(self, name=None):
            name = name or self.name
            return inspected(producer, name, "gpu")

        def states(self, name=None):
            return {actor["slot"]: actor["state"] for actor in self.gpu(name)["actors"]}

        def meet(self, folder, names):
            """Bodies that end when all of them run; the processes they ran in."""
            folder.mkdir()
            results = [self.send("meet", str(folder), name, len(names)) for name in names]
            answers = [result.get(**GET) for result in results]
            assert {met for _, met in answers} == {len(names)}
            return {pid for pid, _ in answers}

        def demand(self):
            """What `ray status` says, if a GPU is waited for."""
            command = [sys.executable, "-m", "ray.scripts.scripts", "status", f"--address={self.cluster.address}"]
            env = {**os.environ, "RAY_AUTH_MODE": "token"}
            said = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env).stdout
            return "GPU" in said.partition("Demands:")[2] and said

        def join(self, *options, **node):
            started.append(RayNode(tmp_path, self.cluster, *options, **node))
            return started[-1]

        def stop(self):
            assert self.worker.stop() == 0, self.worker.output[-3000:]

    yield Fleet
    for each in reversed(started):
        each.stop()
        if getattr(each, "folder", None):
            shutil.rmtree(each.folder, ignore_errors=True)


def test_the_fleet_grows_with_the_work_within_its_bounds_and_gives_idle_actors_back(start, tmp_path):
    fleet = start({"BRIDGE_MIN_ACTORS": "1", "BRIDGE_MAX_ACTORS": "2", "BRIDGE_KEEP_IDLE_S": "1"}, gpus=3)
    assert fleet.states() == {0: "ready"}
    kept = fleet.send("where").get(**GET)
    (tmp_path / "met").mkdir()
    results = [fleet.send("meet", str(tmp_path / "met"), name, 2) for name in "abcd"]
    pids = {pid for pid, _ in (result.get(**GET) for result in results)}
    assert len(pids) == 2, "the second actor was started for them, and no third"
    wait_for(lambda: fleet.states() == {0: "ready"}, "the second actor to end")
    assert fleet.send("where").get(**GET) == kept, "the first one stays warm"
    (tmp_path / "again").mkdir()
    results = [fleet.send("meet", str(tmp_path / "again"), name, 2) for name in "ab"]
    assert [met for _, met in (result.get(**GET) for result in results)] == [2, 2], "it comes back with the work"
    assert "takes no calls" not in fleet.worker.output, "an idle actor's end is no alarm"
    fleet.stop()


def test_an_idle_worker_uses_the_actors_of_a_busy_one_and_leaves_them_alone(start, tmp_path):
    settings = {"BRIDGE_MIN_ACTORS": "1", "BRIDGE_MAX_ACTORS": "2", "BRIDGE_KEEP_IDLE_S": "60"}
    fleet = start(settings, gpus=2)
    other = f"idle@{socket.gethostname()}"
    options = ("-c", "1", "-Q", "idle", "-n", "idle@%h")
    idle = Worker(tmp_path, *options, app="tests.apps.fleet:app", env=fleet.env, log="idle.log")
    pids = fleet.meet(tmp_path / "met", "ab")
    assert len(pids) == 2
    wait_for(lambda: fleet.states(other) == {0: "ready", 1: "ready"}, "the idle worker to find both")
    late = Worker(
        tmp_path, "-c", "1", "-Q", "late", "-n", "late@%h", app="tests.apps.fleet:app", env=fleet.env, log="l"
    )
    wait_for(lambda: fleet.states(f"late@{socket.gethostname()}") == {0: "ready", 1: "ready"}, "a third to find both")
    assert fleet.meet(tmp_path / "again", "ab") == pids, "nobody has ended the second actor"
    assert idle.stop() == 0 and late.stop() == 0
    fleet.stop()


def test_a_fleet_without_a_minimum_starts_with_the_first_task(start):
    fleet = start({"BRIDGE_MIN_ACTORS": "0", "BRIDGE_KEEP_IDLE_S": "0.5"}, gpus=1)
    assert fleet.states() == {}
    assert isinstance(fleet.send("where").get(**GET), int)
    wait_for(lambda: fleet.states() == {}, "the idle actor to end")
    assert isinstance(fleet.send("where").get(**GET), int)
    fleet.stop()


def test_two_halves_of_a_gpu_are_two_actors(start, tmp_path):
    fleet = start({"FLEET_SHARE": "0.5"}, gpus=1)
    wait_for(lambda: fleet.states() == {0: "ready", 1: "ready"}, "two actors")
    (tmp_path / "met").mkdir()
    results = [fleet.send("meet", str(tmp_path / "met"), name, 2) for name in "ab"]
    answers = [result.get(**GET) for result in results]
    assert len({pid for pid, _ in answers}) == 2 and [met for _, met in answers] == [2, 2]
    assert {actor["share"] for actor in fleet.gpu()["actors"]} == {0.5}
    fleet.stop()


def test_a_task_waits_for_its_gpu_model_fails_clearly_without_one_and_runs_when_a_node_with_it_joins(start):
    settings = {"FLEET_ACCELERATOR": "H100", "BRIDGE_CLUSTER_WAIT_S": "4"}
    a100 = json.dumps({"accelerator_type:A100": 1})
    fleet = start(settings, gpus=1, options=(f"--resources={a100}",))
    refused = fleet.send("picky")
    assert isinstance(fleet.send("where").get(**GET), int), "others run meanwhile"
    error = refused.get(propagate=False, **GET)
    assert type(error).__name__ == "NoSuitableGpu"
    assert "fleet.picky needs a GPU of type H100" in str(error) and "A100" in str(error)
    assert "fleet.picky waits up to 4 s" in fleet.worker.output
    h100 = json.dumps({"accelerator_type:H100": 1})
    fleet.join(f"--resources={h100}", gpus=1)
    wait_for(lambda: "ready" in [s for slot, s in fleet.states().items() if slot >= 1000], "an actor on the new node")
    here, there = fleet.send("where"), fleet.send("picky")
    assert here.get(**GET) != there.get(**GET)
    assert {actor["accelerator"] for actor in fleet.gpu()["actors"]} == {"A100", "H100"}
    fleet.stop()


def test_after_a_node_has_left_no_actor_waits_for_the_gpu_of_a_surplus_one(start):
    fleet = start({"BRIDGE_KEEP_IDLE_S": "1"}, gpus=1)
    leaves = fleet.join()
    wait_for(lambda: fleet.states() == dict.fromkeys(range(2), "ready"), "the actor of the second node")
    third = fleet.join()
    wait_for(lambda: fleet.states() == dict.fromkeys(range(3), "ready"), "the actor of the third node")
    leaves.stop()
    wait_for(lambda: fleet.states() == dict.fromkeys(range(2), "ready"), "two actors for two GPUs, and none beyond")
    fleet.worker.kill_group()
    third.stop()
    wait_for(fleet.demand, "its actor to wait for a GPU")
    fleet.work()
    wait_for(lambda: not fleet.demand(), "the actor that no GPU is left for, and no creator, to be taken back")
    wait_for(lambda: fleet.states() == {0: "ready"}, "one actor for one GPU")
    fleet.stop()


def test_waiting_work_shows_in_ray_as_demand_until_it_is_done(start, tmp_path):
    fleet = start({"BRIDGE_MAX_ACTORS": "2"}, gpus=1)
    (tmp_path / "met").mkdir()
    results = [fleet.send("meet", str(tmp_path / "met"), name, 3) for name in "ab"]  # a body waits for a third one

    wait_for(fleet.demand, "the pending actor in `ray status`")
    (tmp_path / "met" / "third").touch(), (tmp_path / "met" / "b").touch()
    assert all(result.get(**GET) for result in results)
    wait_for(lambda: fleet.states() == {0: "ready"}, "the pending actor to be taken back")
    wait_for(lambda: not fleet.demand(), "the demand to be gone")
    fleet.stop()
