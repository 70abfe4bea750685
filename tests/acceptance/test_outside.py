"""Somebody without the secrets tries to get in: at Ray, at Redis and Ray of --standalone, at the bridge itself."""

import ipaddress
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import redis

from bridge.worker.standalone import free_port
from tests.support.services import ROOT, RayCluster, Worker, wait_for

JOIN = "import ray; ray.init({address!r}, log_to_driver=False, logging_level=50); print('in with', len(ray.nodes()))"
SECRET = "a-word-for-redis"


def family(server):
    process = psutil.Process(server.pid)
    return [process, *process.children(recursive=True)]


def doors(processes):
    """Where these processes listen: (process, host, port)."""
    found = []
    for each in processes:
        try:
            found += [
                (each, ipaddress.ip_address(connection.laddr.ip), connection.laddr.port)
                for connection in each.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            ]
        except psutil.NoSuchProcess:
            continue
    return found


def on_loopback(address):
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


@pytest.fixture(scope="module")
def cluster(clean_environment, tmp_path_factory):
    """As the docs show it: the token lies at home, nothing else is set."""
    ray = RayCluster(tmp_path_factory.mktemp("ray"), options=[f"--ray-client-server-port={free_port()}"])
    yield ray
    ray.stop()


def join(address, tmp_path, **env):
    """Start a Python that joins the cluster there, from a home without a token."""
    words = [sys.executable, "-c", JOIN.format(address=address)]
    env = {**os.environ, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", **env}
    return subprocess.Popen(words, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ray_lets_nobody_in_without_its_token(cluster, tmp_path):
    client = f"ray://127.0.0.1:{cluster.command[-1].partition('=')[2]}"
    token = (Path.home() / ".ray" / "auth_token").read_text()
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
    strangers = {
        (address, who): join(address, tmp_path, **env)
        for address in (cluster.address, client)
        for who, env in (("nobody", {"RAY_AUTH_MODE": "disabled"}), ("a liar", wrong))
    }
    friend = join(cluster.address, tmp_path, **right)
    said = friend.communicate(timeout=120)
    assert friend.returncode == 0 and "in with 1" in said[0], said
    for (address, who), each in strangers.items():
        out, error = each.communicate(timeout=120)
        assert each.returncode != 0 and "in with" not in out, f"{who} got in at {address}"
        assert token not in out + error


def test_rays_other_ports_tell_strangers_no_more_than_numbers(cluster, tmp_path):
    """HTTP without a token: refused, or the node's metrics. Calls of Ray's own protocol are tried at each port, too."""
    import grpc

    answered = {}
    for process, address, port in doors(family(cluster)):
        host = "127.0.0.1" if address.is_unspecified or on_loopback(address) else str(address)
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            for method in ("NodeInfoGcsService/GetAllNodeInfo", "NodeManagerService/GetNodeStats"):
                call = channel.unary_unary(f"/ray.rpc.{method}")
                with pytest.raises(grpc.RpcError) as refused:
                    call(b"", timeout=5)
                assert refused.value.code() in (
                    grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE,
                ), (process.name(), port, method, refused.value)  # fmt: skip
                answered.setdefault(refused.value.code().name, []).append((process.name(), method))
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/", timeout=5) as answer:
                body = answer.read().decode(errors="replace")
                assert body.startswith("# HELP"), (process.name(), port, body[:200])
        except urllib.error.HTTPError as error:
            assert error.code in (401, 403), (process.name(), port)
        except OSError:
            continue  # no HTTP there
        except Exception as error:  # an answer that is no HTTP
            assert "BadStatusLine" in type(error).__name__, error
    assert "UNAUTHENTICATED" in answered, f"no port has been asked the right question: {answered}"


def test_no_secret_is_in_a_process_list_or_in_a_file_of_others(cluster, tmp_path):
    token = (Path.home() / ".ray" / "auth_token").read_text()
    assert not [each.pid for each in family(cluster) if token in " ".join(each.cmdline())]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """`--standalone` with a password in the app's URL: (worker, its port of Redis)."""
    port = free_port()
    url = f"redis://:{SECRET}@127.0.0.1:{port}/0"
    env = {"CELERY_BROKER_URL": url, "CELERY_RESULT_BACKEND": url}
    worker = Worker(tmp_path_factory.mktemp("alone"), "--standalone", "-c", "1", app="tests.apps.twins:app", env=env)
    yield worker, port
    assert worker.stop() == 0


def test_nothing_of_standalone_listens_beyond_loopback(alone):
    worker, port = alone
    found = doors(family(worker))
    assert {p for _, _, p in found} >= {port} and len(found) > 4, "Redis and Ray listen somewhere"
    assert not [(process.name(), str(host), p) for process, host, p in found if not on_loopback(host)]
    outer = next((str(a.address) for each in psutil.net_if_addrs().values() for a in each if is_outer(a)), None)
    if outer is None:
        pytest.skip("this machine has no address but loopback's")
    assert not [(process.name(), p) for process, _, p in found if opens(outer, p)]


def opens(host, port):
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def is_outer(interface):
    return interface.family == socket.AF_INET and not ipaddress.ip_address(interface.address).is_loopback


def test_the_standalone_redis_wants_its_password_and_writes_no_files(alone, tmp_path):
    _, port = alone
    for url in (f"redis://127.0.0.1:{port}/0", f"redis://:wrong@127.0.0.1:{port}/0"):
        with redis.Redis.from_url(url) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
    with redis.Redis.from_url(f"redis://:{SECRET}@127.0.0.1:{port}/0") as client:
        assert client.ping()
        for command in (("CONFIG", "SET", "dir", str(tmp_path)), ("SAVE",), ("REPLICAOF", "127.0.0.1", "1")):
            with pytest.raises(redis.ResponseError, match="unknown command"):
                client.execute_command(*command)


def test_secrets_of_standalone_are_in_no_process_list_and_in_a_folder_of_its_own(alone):
    worker, _ = alone
    words = [" ".join(each.cmdline()) for each in family(worker)]
    folder = next(
        Path("/tmp") / part.split("/")[2] for line in words for part in line.split("=") if "/tmp/bridge-" in part
    )
    token = (folder / "token").read_text()
    assert token and not [line for line in words if token in line or SECRET in line]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    assert token not in worker.output and SECRET not in worker.output


def test_a_worker_has_no_open_door(worker, gpu_stats):
    """It and its children listen nowhere but on loopback; its driver has Ray's own port, which asks for the token."""
    drivers = set(gpu_stats()["drivers"])
    found = wait_for(lambda: family(worker), "the worker's processes")
    assert not [(p.pid, host) for p, host, _ in doors(found) if p.pid not in drivers and not on_loopback(host)]
    named = {c.laddr for each in found if each.pid not in drivers for c in each.net_connections("unix") if c.laddr}
    (health,) = named  # the link to the driver is a pair of sockets without a name
    assert Path(health).stat().st_mode & 0o077 == Path(health).parent.stat().st_mode & 0o077 == 0
