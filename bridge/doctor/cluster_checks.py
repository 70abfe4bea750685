"""What the doctor asks the Ray cluster: whether it lets us in, what GPUs it has, and whether the app runs there.

Loads Ray, through `bridge/driver/cluster.py`; one executor is started on a free GPU as a worker's start would. Where
warm actors hold all GPUs they are asked for their health instead, so nothing that runs is disturbed.
"""

import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from actors.actor.trial import Trial
from actors.contract import ActorState, Config
from bridge.auth import TOKEN_FILE, use_token
from bridge.doctor.findings import Finding, fail, ok, warn
from bridge.errors import ClusterNotFound, StartupError
from bridge.marks import MAPS, Mark
from bridge.places import needs, places
from bridge.settings import Settings
from bridge.worker.readiness import clean
from bridge.worker.release import make_config

#: A warm actor that is asked for its health answers within this, in seconds.
HEALTH_S = 5.0
#: The cluster's head is tried again after this, in seconds.
AGAIN_S = 0.5


def cluster(app: Any, marks: dict[str, Mark], settings: Settings) -> Iterator[Finding]:
    """Token, head, versions, GPUs, and the app on a GPU node."""
    yield from token()
    from bridge.driver import cluster as ray_cluster  # loads Ray, which reads the token's variables then

    namespace = settings.namespace or f"bridge-{app.main or 'app'}"
    try:
        address = _find(settings)
        joined = ray_cluster.connect(address, namespace, settings.connect_wait_s)
    except StartupError as error:
        yield fail("cluster", str(error), _do(error))
        return
    try:
        yield ok("cluster", f"{address}: Ray {joined.ray_version} and Python as here, nodes: {joined.nodes}")
        yield from _gpus(marks, settings)
        if marks:
            yield from _app_there(app, marks, settings, namespace)
    finally:
        ray_cluster.leave()


def token() -> Iterator[Finding]:
    """Whether there is one, and who may read it."""
    source = use_token()
    if not source:
        yield warn(
            "token", "there is none: whoever reaches the cluster's ports can run code there",
            f"`ray get-auth-token --generate` on the head, copied to {TOKEN_FILE}; docs/bring-up.md",
        )  # fmt: skip
        return
    if os.environ.get("RAY_AUTH_MODE") != "token":
        mode = os.environ.get("RAY_AUTH_MODE")
        yield warn("token", f"RAY_AUTH_MODE={mode} turns the token off", "set RAY_AUTH_MODE=token, or leave it out")
    path = Path(source).expanduser()
    with suppress(OSError):
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            yield warn("token", f"others on this machine can read {source}", f"chmod 600 {source}")
            return
    yield ok("token", f"from {source}")


def _find(settings: Settings) -> str:
    """The head's address, once something listens there, as at a worker's start.

    Raises:
        ClusterNotFound: nothing does within BRIDGE_CONNECT_WAIT_S.
    """
    from bridge.driver.cluster import answers, find_cluster

    address, deadline = find_cluster(settings.ray_address), time.monotonic() + settings.connect_wait_s
    while not answers(address):
        if time.monotonic() > deadline:
            raise ClusterNotFound(f"no Ray cluster: nothing answers at {address}")
        time.sleep(AGAIN_S)
    return address


def _do(error: StartupError) -> str:
    if isinstance(error, ClusterNotFound):
        return "start it with `ray start --head --port=6380`, or set BRIDGE_RAY_ADDRESS=host:port"
    return "docs/bring-up.md tells under 'When it does not start'"


def _gpus(marks: dict[str, Mark], settings: Settings) -> Iterator[Finding]:
    """Whether there are GPUs, of every kind that a mark names."""
    from bridge.driver.cluster import living_nodes

    nodes, needed = living_nodes(), needs(marks.values())
    total = sum(node.gpus for node in nodes)
    models = sorted({node.accelerator or "of unknown type" for node in nodes if node.gpus})
    if not total:
        text = "the cluster has no GPU"
        if settings.max_actors is not None:
            yield warn("GPUs", f"{text} now; BRIDGE_MAX_ACTORS lets Ray's autoscaler bring some", "nothing, if it does")
        else:
            yield fail("GPUs", text, "join a GPU node, or `--num-gpus=1` of `ray start` for a logical GPU")
        return
    yield ok("GPUs", f"{total:g} ({', '.join(models)})")
    for kind, fitting in places(nodes, needed).items():
        if not fitting:
            who = [name for name, mark in sorted(marks.items()) if (mark.gpu.accelerator or "") == kind]
            what = f"no GPU of type {kind}" if kind else "no GPU but of types that other tasks name"
            yield fail("GPUs", f"{what}, which {', '.join(who[:3])} need", "join such a node, or change the marks")


def _app_there(app: Any, marks: dict[str, Mark], settings: Settings, namespace: str) -> Iterator[Finding]:
    """Import, device and kernels on a GPU node."""
    from bridge.driver import cluster as ray_cluster

    needed = needs(marks.values())
    try:
        config = make_config(app, [*marks, *MAPS], settings, needed.share)
    except StartupError as error:
        yield fail("app on a GPU node", str(error), "assign the app at module level")
        return
    if ray_cluster.free_gpus() < needed.share:
        yield from _held(namespace, config)
        return
    accelerator = next((kind for kind in needed.kinds if kind), None) if "" not in needed.kinds else None
    trial = ray_cluster.try_gpu_node(config, needed.share, accelerator, settings.start_wait_s)
    yield from _judge(trial, marks, settings, needed.share)


def _judge(trial: Trial, marks: dict[str, Mark], settings: Settings, share: float) -> Iterator[Finding]:
    about = "app on a GPU node"
    if trial.problem:
        yield fail(about, clean(trial.problem), "correct it there; docs/bring-up.md, 'The app on GPU nodes'")
        return
    device = trial.device
    yield ok(about, f"{trial.node} imports it and ran kernels on {device['name']}, warm in {trial.warm_s:.1f} s")
    if device["kind"] == "cpu":
        do = "install CuPy there, and set BRIDGE_DEVICE=cuda, so that a worker refuses to compute on the CPU"
        yield warn("device", f"NumPy on CPU, no GPU is used: {device['note']}", do)
    memory = int(device["memory_bytes"] * share)
    for name, mark in sorted(marks.items()):
        if memory and mark.gpu.memory and mark.gpu.memory > memory:
            needed = mark.gpu.memory.human_readable()
            yield fail("marks", f"{name} needs {needed}, the GPU of {trial.node} has {memory / 2**30:.1f} GiB for it",
                       "change the mark, or join a larger GPU")  # fmt: skip


def _held(namespace: str, config: Config) -> Iterator[Finding]:
    """All GPUs are in use: who has them, and how the actors of ours are."""
    from bridge.driver.cluster import gpu_actors

    about, held = "app on a GPU node", gpu_actors(namespace, config.release.id, HEALTH_S)
    mine = [each for each in held if each.namespace == namespace]
    others = sorted({each.namespace for each in held} - {namespace})
    if not mine:
        whose = f"actors of namespace {', '.join(others)}" if others else "something that is no actor of the bridge"
        do = "`ray status` shows them; give apps one BRIDGE_NAMESPACE to share GPUs"
        yield warn(about, f"not tried: all GPUs are held by {whose}", do)
        return
    for each in mine:
        health = each.health
        if health is None:
            yield warn(about, f"actor {each.name} does not answer", "docs/howto/at-night.md")
        elif health.knows_release and health.state is ActorState.READY:
            name = health.device.get("name", "a device of another release")
            yield ok(about, f"not tried: warm actor {each.name} on {health.node} has this release ready on {name}")
        elif health.knows_release:
            yield warn(about, f"actor {each.name} is {health.state}: {clean(health.reason)}", "docs/howto/at-night.md")
        else:
            yield ok(about, f"not tried: warm actor {each.name} on {health.node} will load this release with a worker")
