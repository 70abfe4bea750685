"""Directory and environment are put back, whatever a body has done to them."""

import os
from pathlib import Path

import pytest

from actors.executor.surroundings import Surroundings


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STAYS", "as it was")
    monkeypatch.setenv("PATH", os.environ["PATH"])  # put back after the test, should it fail


def test_variables_are_put_back():
    surroundings, before = Surroundings(), dict(os.environ)
    os.environ["NEW"], os.environ["STAYS"] = "x", "changed"
    del os.environ["PATH"]
    surroundings.restore()
    assert dict(os.environ) == before
    surroundings.restore()
    assert dict(os.environ) == before


def test_a_directory_that_the_body_has_removed_is_left(tmp_path):
    surroundings = Surroundings()
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    surroundings.restore()
    assert Path.cwd() == tmp_path
