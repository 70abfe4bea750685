"""Finding a Ray cluster and joining it as a driver; Ray's errors become ours, in one line that says what to do."""

import logging
import signal
import socket
import threading
import time
from typing import Any, NamedTuple

import ray
import ray.exceptions

from actors.actor.trial import Trial, try_executor
from actors.contract import Config, Health
from bridge.auth import TOKEN_FILE, exposed, is_unreadable, lacks_token, use_token
from bridge.driver.news import Connected
from bridge.errors import ClusterAuthFailed, ClusterMismatch, ClusterNotFound, StartupError, as_text
from bridge.places import Node, nodes

logger = logging.getLogger(__name__)

#: The head's port is probed with this deadline, in seconds.
PROBE_S = 1.0


def find_cluster(address: str | None) -> str:
    """host:port of the Ray head: as given, or of the cluster `ray start` brought up on this host.

    Raises:
        ClusterNotFound: there is none here, or more than one.
    """
    if address:
        return address
    from ray._private import services  # Ray has no public way to ask for the address without connecting

    services.find_gcs_addresses.cache_clear()  # or a cluster that comes up later is never seen
    try:
        return str(services.canonicalize_bootstrap_address_or_die("auto"))
    except (ConnectionError, ValueError) as error:
        text = str(error).partition(". ")[0]
        raise ClusterNotFound(text[0].lower() + text[1:]) from error


def connect(address: str, namespace: str, patience_s: float) -> Connected:
    """Make this process a driver of the cluster; tried again for `patience_s` while its head listens and is slow.

    Raises:
        ClusterNotFound, ClusterAuthFailed, ClusterMismatch: in one line that says what to do.
    """
    token = use_token()
    deadline = time.monotonic() + patience_s
    while True:
        # Ray itself asks for twenty seconds and does not say why; told to use a token, it ends a process without one.
        if is_unreadable(token) or lacks_token(token) or is_refused(address):
            raise _auth_failed(address, token)
        try:
            _init(address, namespace)
            break
        except Exception as error:
            if time.monotonic() > deadline or type(error) is not ConnectionError or not answers(address):
                raise _connect_error(error, address, token) from error
    _warn(address, token)
    return look(address)


def _init(address: str, namespace: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, namespace=namespace, log_to_driver=False, logging_level=logging.CRITICAL)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray installs a handler of its own


def _warn(address: str, token: str) -> None:
    """What lets others in; not an error, because a secret mounted by Kubernetes is readable to all of its container."""
    if exposed(token):
        logger.warning("other users of this machine can read Ray's token: chmod 600 %s", token)
    if not token:
        logger.warning(
            "the Ray cluster at %s asks for no token: whoever reaches its ports can run code on its nodes. Before "
            "`ray start`: ray get-auth-token --generate && chmod 600 %s",
            address, TOKEN_FILE,
        )  # fmt: skip


def _connect_error(error: Exception, address: str, token: str) -> StartupError:
    text = " ".join(str(error).split())
    if "Version mismatch" in text:
        cluster, _, here = text.partition("This process")
        return ClusterMismatch(
            f"Ray or Python differ: cluster {_versions(cluster)}, this worker {_versions(here)}. "
            "Use the same versions of both on every node and in the worker"
        )
    unauthenticated = any(word in text.lower() for word in ("auth", "token", "unauthenticated"))
    if isinstance(error, ray.exceptions.AuthenticationError) or unauthenticated:
        return _auth_failed(address, token)
    return ClusterNotFound(f"the Ray cluster at {address} does not answer: {text[:200]}")


def _auth_failed(address: str, token: str) -> StartupError:
    used = f"the token from {token} was refused" if token else "no token was found"
    if is_unreadable(token):
        used = f"the token file {token} is empty or cannot be read"
    return ClusterAuthFailed(
        f"the Ray cluster at {address} did not let this worker in: {used}. Copy the head's token "
        f"(`ray get-auth-token` there) to {TOKEN_FILE} with mode 0600, or set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
    )


def _versions(text: str) -> str:
    words = text.replace(":", " ").split()
    found = [f"{key} {words[words.index(key) + 1]}" for key in ("Ray", "Python") if key in words]
    return ", ".join(found) or text[:80]


def answers(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()
    except OSError:
        return False
    return True


def identity(address: str) -> str | None:
    """Which cluster the head at host:port is of, asked anew; None if it does not say.

    A head without persistence is another one each time it starts, and Ray ends a process that takes it for the old one.
    """
    try:
        return str(_gcs(address).cluster_id.hex())
    except Exception:
        return None


def is_refused(address: str) -> bool:
    """Whether the head at host:port says that this process's token, or the want of one, is wrong."""
    try:
        _gcs(address)
    except ray.exceptions.AuthenticationError:
        return True
    except Exception:
        return False
    return False


def _gcs(address: str) -> Any:
    from ray import _raylet  # Ray has no public way to ask

    client: Any = _raylet
    return client.GcsClient(address=address)


def look(address: str) -> Connected:
    """The cluster as it is now."""
    alive = nodes(ray.nodes())
    models = sorted({node.accelerator for node in alive if node.accelerator and node.gpus})
    return Connected(address, ray.__version__, len(alive), int(sum(node.gpus for node in alive)), tuple(models))


# what only `python -m bridge.doctor` asks


class Held(NamedTuple):
    """A GPU actor that is there; `health` is None when it did not answer."""

    name: str
    namespace: str
    health: Health | None


def living_nodes() -> list[Node]:
    """The cluster's nodes with their GPUs."""
    return nodes(ray.nodes())


def free_gpus() -> float:
    """GPUs nobody has reserved."""
    return float(ray.available_resources().get("GPU", 0.0))


def try_gpu_node(config: Config, share: float, accelerator: str | None, timeout_s: float) -> Trial:
    """Start an executor on a free GPU, in a Ray task that ends with it; `Trial.problem` says what went wrong.

    Args:
        config: as for an actor.
        share: of a GPU, which must be free.
        accelerator: the GPU's type, or None for any.
        timeout_s: for Ray to start the task, and again for the executor.
    """
    remote = ray.remote(num_gpus=share, num_cpus=0, max_retries=0, max_calls=1, accelerator_type=accelerator)
    ref = remote(try_executor).remote(config, timeout_s)
    done, _ = ray.wait([ref], timeout=2 * timeout_s)
    if not done:
        ray.cancel(ref, force=True)
        return Trial("", {}, 0.0, "Ray has not started it on a GPU node in time")
    try:
        trial: Trial = ray.get(ref)
    except Exception as error:
        cause = error.as_instanceof_cause() if isinstance(error, ray.exceptions.RayTaskError) else error
        return Trial("", {}, 0.0, as_text(cause))
    return trial


def gpu_actors(namespace: str, release: str, timeout_s: float) -> list[Held]:
    """The GPU actors of all namespaces; those of ours are asked for their health, which disturbs nothing they run."""
    held = []
    for row in ray.util.list_named_actors(all_namespaces=True):
        name, where = row["name"], row["namespace"]
        if name.startswith("gpu-"):
            held.append(Held(name, where, _health(name, where, release, timeout_s) if where == namespace else None))
    return held


def _health(name: str, namespace: str, release: str, timeout_s: float) -> Health | None:
    try:
        actor: Any = ray.get_actor(name, namespace)
        health: Health = ray.get(actor.health.remote("doctor", release), timeout=timeout_s)
    except Exception:
        return None
    return health


def leave() -> None:
    """Be no driver any more."""
    if ray.is_initialized():
        ray.shutdown()
