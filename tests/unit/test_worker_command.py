"""`python -m bridge.worker`: how its command line is read and what is handed to Celery. Nothing is started."""

import sys
from pathlib import Path

import pytest

from bridge.errors import AppNotImportable, BrokerUnreachable, ConfigurationInvalid
from bridge.worker import command
from bridge.worker.command import parse


def test_our_options_celerys_global_ones_and_the_workers_are_told_apart():
    line = parse(["-A", "shop.celery:app", "--standalone", "-l", "INFO", "-c", "4", "--broker=redis://h/1", "-q", "-B"])
    assert line.standalone
    assert line.globals == {"-A": "shop.celery:app", "--broker": "redis://h/1", "-q": None}
    assert line.worker == ["-l", "INFO", "-c", "4", "-B"]


@pytest.mark.parametrize(
    "words", [["-A", "shop"], ["-Ashop"], ["--app", "shop"], ["--app=shop"], ["-A=shop"], ["worker", "-A", "shop"]]
)
def test_an_app_may_be_named_in_each_of_clicks_ways(words):
    line = parse(words)
    assert line.value("-A", "--app") == "shop"
    assert line.worker == []


def test_values_that_look_like_options_of_ours_stay_values():
    assert parse(["-A", "shop", "-Q", "celery,gpu", "-n", "w@%h"]).worker == ["-Q", "celery,gpu", "-n", "w@%h"]


def test_an_equals_sign_in_a_value_is_kept():
    assert parse(["--broker=redis://h/0?a=b"]).value("--broker") == "redis://h/0?a=b"


def test_what_was_not_given_is_none():
    assert parse([]).value("-A", "--app") is None
    assert parse([]) == (False, {}, [])


@pytest.mark.parametrize("words", [["-P", "solo"], ["-Psolo"], ["--pool", "solo"], ["--pool=solo"]])
def test_a_pool_is_refused(words):
    with pytest.raises(ConfigurationInvalid, match="-P/--pool"):
        parse(["-A", "shop", *words])


@pytest.mark.parametrize("word", ["-D", "--detach"])
def test_standalone_cannot_be_detached(word):
    with pytest.raises(ConfigurationInvalid, match="--standalone and --detach"):
        parse(["-A", "shop", "--standalone", word])
    assert parse(["-A", "shop", word]).worker == [word]


@pytest.mark.parametrize("name", ["-A", "--app", "--workdir", "-b"])
def test_an_option_without_its_value_is_refused(name):
    with pytest.raises(ConfigurationInvalid, match=f"{name} needs a value"):
        parse(["-l", "INFO", name])


# ---- what is handed over


@pytest.fixture
def handed(monkeypatch):
    """Run `_hand_over` and see the command line Celery gets."""

    def hand_over(*words):
        monkeypatch.setattr("celery.bin.celery.celery", lambda **_: None)
        monkeypatch.setattr(sys, "argv", ["before"])
        command._hand_over(parse(list(words)))
        assert Path(sys.argv[0]).name == "celery"
        return sys.argv[1:]

    return hand_over


def test_celery_gets_a_complete_command_that_can_be_repeated(handed):
    assert handed("-A", "shop", "-q", "-l", "INFO") == [
        "-A", "shop", "-q", "worker", "--pool", "custom", "-l", "INFO",
    ]  # fmt: skip


def test_an_app_from_the_environment_is_written_into_the_command(handed, monkeypatch):
    monkeypatch.setenv("CELERY_APP", "shop.celery")
    assert handed("-l", "INFO")[:2] == ["-A", "shop.celery"]


def test_a_workdir_becomes_absolute(handed, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # as `load_app` has done by then
    assert handed("-A", "shop", "--workdir", "somewhere")[:4] == ["-A", "shop", "--workdir", str(tmp_path)]


def test_our_own_option_is_not_handed_on(handed):
    assert "--standalone" not in handed("-A", "shop", "--standalone")


# ---- loading the app


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder to be started in, without traces afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("CELERY_APP", "CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "CELERY_LOADER", "CELERY_CONFIG_MODULE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("myshop"):
            del sys.modules[name]


APP = "from celery import Celery\napp = Celery('myshop', broker='memory://', set_as_current=False)\n"


def load(*words):
    return command.load_app(parse(list(words)))


@pytest.mark.parametrize("name", ["myshop", "myshop:app"])
def test_an_app_in_this_folder_is_found(project, name):
    (project / "myshop.py").write_text(APP)
    assert load("-A", name).main == "myshop"


def test_an_app_in_another_folder_is_found_with_workdir(project):
    (project / "inner").mkdir()
    (project / "inner" / "myshop.py").write_text(APP)
    assert load("-A", "myshop", "--workdir", "inner").main == "myshop"
    assert Path.cwd() == project / "inner"


def test_broker_and_backend_options_reach_the_app(project):
    (project / "myshop.py").write_text("from celery import Celery\napp = Celery('myshop', set_as_current=False)\n")
    app = load("-A", "myshop", "-b", "memory://here", "--result-backend", "cache+memory://")
    assert app.conf.broker_url == "memory://here"
    assert app.conf.result_backend == "cache+memory://"


def test_no_app_is_said():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CELERY_APP", raising=False)
        with pytest.raises(AppNotImportable, match="-A"):
            load("-l", "INFO")


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        (None, "myshop.celery", "run this in the folder that holds it"),
        ("import myshop_needs_this\n", "myshop", "no module named 'myshop_needs_this'; install it"),
        ("x = 1\n", "myshop:other", "module 'myshop' has no Celery app named 'other'"),
        ("raise ValueError('bad\\nconfiguration')\n", "myshop", "bad configuration (myshop.py:1)"),
        ("def broken(:\n", "myshop", "SyntaxError"),
    ],
)
def test_an_app_that_cannot_be_imported_is_said_in_one_line(project, text, name, says):
    if text is not None:
        (project / "myshop.py").write_text(text)
    with pytest.raises(AppNotImportable) as caught:
        load("-A", name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_app_that_exits_while_it_is_imported_ends_the_command_as_it_asked(project):
    (project / "myshop.py").write_text("raise SystemExit(5)\n")
    with pytest.raises(SystemExit):
        load("-A", "myshop")


def test_a_broker_that_does_not_answer_is_named_without_its_password(monkeypatch):
    from celery import Celery

    from bridge.settings import settings

    settings.cache_clear()
    monkeypatch.setenv("BRIDGE_CONNECT_WAIT_S", "0.01")
    try:
        app = Celery("nobody", broker="redis://:secret@127.0.0.1:1/0", set_as_current=False)
        with pytest.raises(BrokerUnreachable) as caught:
            command._check_broker(app)
    finally:
        settings.cache_clear()
    assert "the broker redis://:**@127.0.0.1:1/0" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_broker_that_answers_passes():
    from celery import Celery

    command._check_broker(Celery("memory", broker="memory://", backend="cache+memory://", set_as_current=False))


def test_refusals_are_one_line_and_an_exit_code(capfd):
    with pytest.raises(SystemExit) as caught:
        command.main(["--pool", "solo"])
    assert caught.value.code == ConfigurationInvalid.exit_code
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("bridge: leave -P/--pool out")


def test_help_names_every_setting(monkeypatch, capsys):
    from bridge.settings import Settings

    monkeypatch.setattr("celery.bin.celery.celery", lambda **_: sys.exit())
    monkeypatch.setattr(sys, "argv", ["before"])
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert "--standalone" in text
    assert all(f"BRIDGE_{name.upper()} " in text for name in Settings.model_fields)


@pytest.mark.parametrize(
    ("url", "is_said"),
    [("redis://:hidden@host/0", True), ("redis://user@host/0", False), ("redis://host/0", False), ("redis://[", False)],
)
def test_a_password_on_the_command_line_is_said_and_not_repeated(monkeypatch, capsys, url, is_said):
    monkeypatch.setenv("CELERY_BROKER_URL", "")  # as before afterwards
    monkeypatch.setenv("CELERY_APP", "")
    with pytest.raises(AppNotImportable):
        command.load_app(parse(["-A", "no.such.app", "-b", url]))
    said = capsys.readouterr().err
    assert ("can read the password after -b: set CELERY_BROKER_URL" in said) is is_said
    assert "hidden" not in said
