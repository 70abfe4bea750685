"""The app producers import: light to import, routed, marked, and with payload types the driver can check."""

import inspect
import json
import subprocess
import sys
import typing

import pytest
from pydantic import TypeAdapter

from actors.bodies import innermost
from actors.data import arrays
from actors.unopened import Unopened
from actors.validation import checker
from bridge.errors import PayloadInvalid
from bridge.marks import find_marks
from celery_app import app

app.loader.import_default_modules()

GPU_TASKS = {
    "arrays": {"gpu_intensive_task", "total", "statistics", "power_spectrum"},
    "linalg": {"matmul", "solve", "pca"},
    "images": {"denoise", "edges", "equalise", "resize", "enhance"},
    "vectors": {"normalise", "top_k"},
}
CPU_TASKS = {"reports": {"make_signal", "summarise", "contact_sheet"}}


def names(tasks):
    return {f"celery_app.tasks.{module}.{task}" for module, found in tasks.items() for task in found}


MARKS = find_marks(app.tasks.values(), [])


def test_importing_every_task_module_loads_no_heavy_library():
    code = (
        "import sys, celery_app\n"
        "for module in celery_app.app.conf.include: __import__(module)\n"
        "heavy = ('ray', 'cupy', 'cupyx', 'scipy', 'PIL', 'skimage')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_app_has_these_tasks_and_no_others():
    assert {name for name in app.tasks if not name.startswith("celery.")} == names(GPU_TASKS | CPU_TASKS)


def test_gpu_tasks_are_marked_and_cpu_tasks_are_not():
    assert set(MARKS) == names(GPU_TASKS)


@pytest.mark.parametrize(("tasks", "queue"), [(GPU_TASKS, "gpu"), (CPU_TASKS, "celery")])
def test_each_task_is_routed_to_the_queue_of_its_kind(tasks, queue):
    for name in names(tasks):
        assert app.amqp.router.route({}, name)["queue"].name == queue, name


def test_only_normalise_is_vectorised():
    assert {name: (mark.batch.max_size, mark.batch.max_wait_s) for name, mark in MARKS.items() if mark.batch} == {
        "celery_app.tasks.vectors.normalise": (256, 0.002)
    }


@pytest.mark.parametrize("name", sorted(name for name in MARKS if not MARKS[name].batch))
def test_every_warm_up_example_fits_the_signature_and_runs(name):
    example = MARKS[name].gpu.example
    assert example is not None, "a task without an example compiles its kernels in a user's time"
    positional, _ = checked(name, *example)
    for before, after in zip(example, positional, strict=True):  # a payload stays what JSON made of it
        assert after == before or isinstance(after, Unopened)
    json.dumps(app.tasks[name](*example))


@pytest.mark.parametrize("name", sorted(names(GPU_TASKS)))
def test_every_annotation_can_be_checked(name):
    hints = typing.get_type_hints(innermost(app.tasks[name]), include_extras=True)
    for parameter in inspect.signature(innermost(app.tasks[name])).parameters:
        TypeAdapter(hints[parameter])


@pytest.mark.parametrize(
    ("name", "arguments", "field"),
    [
        ("arrays.total", [[]], "data"),
        ("arrays.total", [["one"]], "data"),
        ("arrays.total", [[float("nan")]], "data"),
        ("arrays.power_spectrum", [[1.0], 10.0], "data"),
        ("arrays.power_spectrum", [[1.0, 2.0], 0], "sample_rate_hz"),
        ("linalg.matmul", [[[]], [[1.0]]], "a"),
        ("linalg.pca", [[[1.0], [2.0]], 0], "components"),
        ("images.denoise", ["%%%"], "image"),
        ("images.denoise", ["iVBORw0KGgo=", 5], "radius"),
        ("images.resize", ["iVBORw0KGgo=", 0, 10], "width"),
        ("images.enhance", ["iVBORw0KGgo=", 1, 0.5], "clip"),
        ("vectors.normalise", [[]], "vector"),
        ("vectors.top_k", [[1.0], 0], "k"),
    ],
)
def test_annotations_refuse_what_makes_no_sense(name, arguments, field):
    with pytest.raises(PayloadInvalid, match=rf"invalid payload: {field}"):
        checked(f"celery_app.tasks.{name}", *arguments)


def checked(name, *arguments):
    """Check positional arguments as the driver does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "passes_on", True)
        return checker(name, innermost(app.tasks[name]))(arguments, {})


def test_broker_and_backend_come_from_the_environment(monkeypatch):
    environment = {"CELERY_BROKER_URL": "redis://broker:1/2", "CELERY_RESULT_BACKEND": "redis://results:3/4"}
    code = "from celery_app import app; print(app.conf.broker_url, app.conf.result_backend)"

    def settings(**changed):
        for name in environment:
            monkeypatch.delenv(name, raising=False)
        for name, value in changed.items():
            monkeypatch.setenv(name, value)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert settings() == ["redis://localhost:6379/0"] * 2
    assert settings(CELERY_BROKER_URL="redis://broker:1/2") == ["redis://broker:1/2"] * 2
    assert settings(**environment) == list(environment.values())


def test_the_settings_the_bridge_relies_on():
    assert app.conf.worker_pool == "bridge.pool:HybridPool"
    assert app.conf.task_acks_late is True
    assert app.conf.accept_content == ["json"]
    assert app.conf.task_time_limit < app.conf.broker_transport_options["visibility_timeout"]
