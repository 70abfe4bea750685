"""The endpoint itself: bounded, private, gone with its worker, and no other way to it than the three paths."""

import contextlib
import json
import os
import socket
import stat
import threading

import pytest

from bridge import health
from bridge.errors import ConfigurationInvalid
from bridge.worker.health_server import MOST_REQUESTS, HealthServer
from bridge.worker.standalone import free_port
from tests.support.services import wait_for

ACCOUNT = {
    "worker": "w@h", "state": "ready", "live": True, "ready": True, "reasons": [], "actors": [], "running": 0,
    "waiting": 0,
}  # fmt: skip


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("BRIDGE_RUNTIME_DIR", str(tmp_path / "run"))
    server = HealthServer(lambda: ACCOUNT)
    yield server
    server.close()
    assert not any(thread.name == "health" for thread in threading.enumerate())


def path_of(tmp_path):
    (path,) = (tmp_path / "run").glob("*.sock")
    return path


def test_the_socket_is_private_and_the_command_finds_it(server, tmp_path, capsys):
    server.open_socket(health.folder(), "w@h")
    path = path_of(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert health.main([]) == 0 and "w@h: ready" in capsys.readouterr().out
    assert health.main(["--worker", "w@h", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [ACCOUNT]
    server.close()
    assert health.main([]) == 2 and not path.exists()


@pytest.mark.parametrize(("live", "options", "code"), [(True, [], 1), (True, ["--live"], 0), (False, ["--live"], 1)])
def test_exit_codes(server, monkeypatch, capsys, live, options, code):
    reasons = [{"what": "there is no broker", "do": "start it"}]
    monkeypatch.setitem(ACCOUNT, "ready", False)
    monkeypatch.setitem(ACCOUNT, "live", live)
    monkeypatch.setitem(ACCOUNT, "reasons", reasons)
    server.open_socket(health.folder(), "w@h")
    assert health.main(options) == code
    assert ("there is no broker; start it" in capsys.readouterr().out) is (code == 1)


def test_a_socket_left_by_a_killed_worker_is_nobody_and_is_cleared_away(server, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(folder / "old@h.1.sock"))
    assert health.main([]) == 2
    server.open_socket(health.folder(), "w@h")
    assert [path.name for path in folder.iterdir()] == [f"w@h.{os.getpid()}.sock"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_of_the_worker_does_not_keep_the_socket_open(server, tmp_path):
    server.open_socket(health.folder(), "w@h")
    path, (read, write) = path_of(tmp_path), os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    try:
        os.close(read)
        for each in server._servers:
            each.shutdown()
            each.socket.close()
        with pytest.raises(ConnectionRefusedError):
            health.ask(path, 5)
    finally:
        os.close(write)
        os.waitpid(child, 0)
        server._servers.clear()


def test_a_folder_of_others_is_not_used(server, tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    server.open_socket(health.folder(), "w@h")
    assert "set BRIDGE_RUNTIME_DIR" in caplog.text and not list((tmp_path / "run").iterdir())


def test_slow_clients_take_bounded_room_and_lose_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr("bridge.worker.health_server.REQUEST_S", 0.5)
    server.open_socket(health.folder(), "w@h")
    path, slow = path_of(tmp_path), []
    for _ in range(MOST_REQUESTS):
        slow.append(socket.socket(socket.AF_UNIX))
        slow[-1].connect(str(path))
        slow[-1].sendall(b"GET /liv")
    wait_for(lambda: len(server._servers[0]._open) == MOST_REQUESTS, "all places to be taken")
    with pytest.raises((OSError, ValueError)):
        health.ask(path, 5)

    def answers():
        for each in slow:
            with contextlib.suppress(OSError):
                each.sendall(b"x")
        try:
            return health.ask(path, 5)
        except (OSError, ValueError):
            return None

    assert wait_for(answers, "the slow ones to be sent away", timeout_s=20) == ACCOUNT
    for each in slow:
        each.close()


def test_a_port_that_is_taken_is_an_error_of_the_start(server):
    port = free_port()
    server.open_port("127.0.0.1", port)
    with pytest.raises(ConfigurationInvalid, match=f"BRIDGE_HEALTH_ADDRESS: nothing can listen at 127.0.0.1:{port}"):
        server.open_port("127.0.0.1", port)


@pytest.mark.parametrize(
    ("request_line", "status"),
    [("GET /livez", 200), ("HEAD /readyz", 200), ("GET /health?x", 200), ("GET /", 404), ("POST /health", 501)],
)
def test_paths(server, request_line, status):
    port = free_port()
    server.open_port("127.0.0.1", port)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
        sock.sendall(f"{request_line} HTTP/1.0\r\n\r\n".encode())
        answer = sock.makefile("rb").read().decode()
    assert f" {status} " in answer.splitlines()[0] and "Python" not in answer
    if request_line.startswith("HEAD"):
        assert answer.endswith("\r\n\r\n")
