"""Ports that servers of `--standalone` and of the tests get."""

import socket

import pytest

from bridge.errors import StandaloneFailed
from bridge.worker import standalone
from bridge.worker.standalone import free_port


def test_they_are_above_those_of_rays_workers_and_below_those_of_connections():
    """Ray's begin at 10002, Linux' at 32768, unless somebody has set others."""
    assert {free_port() for _ in range(50)} <= set(range(20_000, 32_768))


def test_one_that_somebody_has_is_passed_over(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        monkeypatch.setattr(standalone.random, "sample", lambda *_: [taken, taken])
        with pytest.raises(StandaloneFailed, match="no TCP port is free"):
            free_port()
