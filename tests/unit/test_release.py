"""Releases: a name for the code, and where an executor finds the app.

`bridge/worker/release.py` makes them, `actors/executor/release.py` loads them.
"""

import importlib
import os
import sys
import types
from pathlib import Path

import pytest
from celery import Celery

from actors.contract import Release
from actors.executor.release import load_app, load_tasks
from actors.wishes import Wishes
from bridge.errors import AppNotImportable
from bridge.settings import Settings
from bridge.worker.release import make_config


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package `relshop` with an app and a task module, imported."""
    package = tmp_path / "relshop"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "main.py").write_text(
        "from celery import Celery\n"
        "app = Celery('relshop', broker='memory://', set_as_current=False, include=['relshop.images'])\n"
    )
    (package / "images.py").write_text(
        "from relshop.main import app\n@app.task(shared=False, gpu=True)\ndef blur(x):\n    return x\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("CELERY_APP", "")
    monkeypatch.delenv("CELERY_APP")
    directory = Path.cwd()
    yield package
    os.chdir(directory)
    for name in [name for name in sys.modules if name.split(".")[0] == "relshop"]:
        del sys.modules[name]


def make_app():
    app = importlib.import_module("relshop.main").app
    app.loader.import_default_modules()
    return app


def release(app, **settings):
    return make_config(app, ["relshop.images.blur"], Settings(**settings)).release


def test_a_release_says_how_to_load_the_app(project, monkeypatch):
    monkeypatch.setenv("CELERY_APP", "relshop.main")
    found = release(make_app())
    assert found.app == "relshop.main:app"
    assert found.script == ""
    assert found.includes == ("relshop.images",)
    assert found.tasks == ("relshop.images.blur",)
    assert str(project.parent) in found.sys_path
    assert found.workdir == str(Path.cwd())


def test_the_same_code_has_the_same_name(project):
    app = make_app()
    assert release(app).id == release(app).id


@pytest.mark.parametrize("file", ["images.py", "main.py", "helpers.py"])
def test_other_code_has_another_name(project, file):
    """Whichever module of the project it is in that the app has imported."""
    (project / "helpers.py").write_text("")
    app = make_app()
    importlib.import_module("relshop.helpers")
    before = release(app).id
    path = project / file
    path.write_text((path.read_text() if path.exists() else "") + "\nX = 1\n")
    assert release(app).id != before


@pytest.mark.parametrize(
    "setting",
    [{"device": "cpu"}, {"gpu_memory_limit": "1GiB"}, {"resident_limit": "1GiB"}, {"left_limit": "1%"},
     {"data_url": "redis://elsewhere"}, {"data_url": "ray"}, {"data_ray_bytes": 1}, {"data_timeout_s": 1},
     {"device_results_limit": "1GiB"}, {"host_results_limit": "1GiB"}, {"device_result_s": 1}],
    ids=lambda setting: next(iter(setting)),
)  # fmt: skip
def test_what_an_executor_has_for_life_is_of_its_release(project, setting):
    app = make_app()
    assert release(app).id == release(app, log_limit_bytes=7).id != release(app, **setting).id


def test_a_name_given_by_setting_is_taken(project):
    assert release(make_app(), release="2024-05-01").id == "2024-05-01"


def test_celery_and_django_variables_travel_and_no_others(project, monkeypatch):
    app = make_app()
    monkeypatch.setenv("CELERY_BROKER_URL", "memory://")
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "shop.settings")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    found = dict(release(app).environment)
    assert {"CELERY_BROKER_URL", "DJANGO_SETTINGS_MODULE"} <= set(found)
    assert "AWS_SECRET_ACCESS_KEY" not in found


def test_the_module_the_worker_was_told_is_preferred(project, monkeypatch):
    app = make_app()
    other = types.ModuleType("aaa_other")
    other.the_app = app
    monkeypatch.setitem(sys.modules, "aaa_other", other)
    monkeypatch.setenv("CELERY_APP", "relshop.main")
    assert release(app).app == "relshop.main:app"
    monkeypatch.delenv("CELERY_APP")
    assert release(app).app == "aaa_other:the_app", "the shortest way else"


def test_an_app_nobody_can_import_is_refused():
    def hidden():
        return Celery("hidden", set_as_current=False)

    with pytest.raises(AppNotImportable, match="'hidden' is not an attribute of any module"):
        make_config(hidden(), [], Settings())


def test_settings_reach_the_executor(project):
    config = make_config(make_app(), [], Settings(device="cpu", gpu_memory_limit="50%", log_limit_bytes=7))
    assert (config.device, config.memory_limit, config.log_limit_bytes) == ("cpu", "50%", 7)


# ---- on the other side


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("actors.executor.release.setup_worker_optimizations", lambda app: None)
    directory, before = Path.cwd(), set(sys.modules)
    yield tmp_path
    os.chdir(directory)
    for name in set(sys.modules) - before:
        if name.startswith("elsewhere"):
            del sys.modules[name]


def other_side(folder, **options):
    values = {
        "id": "r", "app": "elsewhere_main:app", "script": "", "sys_path": (str(folder),), "workdir": str(folder),
        "includes": (), "tasks": (), "environment": (),
    }  # fmt: skip
    return Release(**{**values, **options})


def test_an_app_and_its_task_modules_are_loaded(elsewhere):
    (elsewhere / "elsewhere_main.py").write_text(
        "from celery import Celery\napp = Celery('elsewhere', set_as_current=False)\n"
    )
    (elsewhere / "elsewhere_tasks.py").write_text(
        "from elsewhere_main import app\n@app.task(shared=False)\ndef add(a, b): return a + b\n"
    )
    release = other_side(elsewhere, includes=("elsewhere_tasks",), tasks=("elsewhere_tasks.add",))
    app = load_app(release)
    assert Path.cwd() == elsewhere
    tasks = load_tasks(app, release, Wishes(print))
    assert tasks["elsewhere_tasks.add"].call(1, 2) == 3
    with pytest.raises(LookupError, match="has no task gone, missing"):
        load_tasks(app, release._replace(tasks=("gone", "missing")), Wishes(print))


def test_an_app_that_was_run_as_a_script_is_imported_from_its_file(elsewhere):
    script = elsewhere / "elsewhere_script.py"
    script.write_text("from celery import Celery\napp = Celery('script', set_as_current=False)\n")
    app = load_app(other_side(elsewhere, app="elsewhere_script:app", script=str(script)))
    assert app.main == "script"
    assert load_app(other_side(elsewhere, app="elsewhere_script:app", script=str(script))) is app
