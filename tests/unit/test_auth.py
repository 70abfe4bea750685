"""Where Ray's token is found, and what is wrong with its file."""

import os

import pytest

from bridge.auth import exposed, is_unreadable, use_token


@pytest.fixture(autouse=True)
def empty_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that it is as before afterwards, whatever `use_token` sets
        monkeypatch.delenv(name)
    return tmp_path


def keep(path, mode=0o600, text="t" * 64):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_no_token():
    assert use_token() == ""
    assert "RAY_AUTH_MODE" not in os.environ
    assert not exposed("") and not is_unreadable("")


def test_the_first_that_is_there_is_used_and_turns_authentication_on(empty_home, monkeypatch):
    at_home = keep(empty_home / ".ray" / "auth_token")
    assert use_token() == str(at_home)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/elsewhere")
    assert use_token() == "/elsewhere"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    assert use_token() == "RAY_AUTH_TOKEN", "where it is from, never the token"


def test_a_mode_somebody_has_set_stays(empty_home, monkeypatch):
    keep(empty_home / ".ray" / "auth_token")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    use_token()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


@pytest.mark.parametrize(("mode", "is_exposed"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_who_may_read_it(empty_home, mode, is_exposed):
    assert exposed(str(keep(empty_home / "token", mode))) is is_exposed


def test_a_file_that_gives_no_token(empty_home):
    assert is_unreadable(str(empty_home / "missing"))
    assert is_unreadable(str(keep(empty_home / "empty", text="\n")))
    assert not is_unreadable(str(keep(empty_home / "token")))
    assert not is_unreadable("RAY_AUTH_TOKEN")
