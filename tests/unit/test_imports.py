"""What importing costs and exports: producers and the worker load neither ray nor cupy."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bridge

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("ray", "cupy", "cupyx", "torch")


def loaded_by(statement):
    code = (
        f"import sys, json\n{statement}\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "module",
    [
        "bridge, bridge.pool, bridge.worker.command, bridge.driver.loop",
        "celery_app, celery_app.tasks.arrays",
        "actors.actor.shell",
    ],
)
def test_importing_loads_nothing_heavy(module):
    assert not set(HEAVY) & set(loaded_by(f"import {module}"))


def test_importing_the_task_api_loads_no_scientific_library():
    assert not {"scipy", "PIL", "skimage", *HEAVY} & set(loaded_by("import celery_app"))


def test_the_health_command_is_quick():
    assert not {"celery", "kombu", "pydantic", "numpy", *HEAVY} & set(loaded_by("import bridge.health"))


def test_the_doctor_loads_ray_last():
    assert not set(HEAVY) & set(loaded_by("import bridge.doctor.command"))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Gpus'"):
        bridge.Gpus  # noqa: B018


def test_the_executor_loads_no_ray_before_the_app_does():
    assert "ray" not in loaded_by("import actors.executor.loop")


def test_the_contract_of_the_four_doors_is_about_all_that_a_worker_may_load():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (sources,) = (set(each["source_modules"]) for each in contracts if "four doors" in each["name"])
    shared = {f"bridge.{file.stem}" for file in (ROOT / "bridge").glob("*.py") if file.stem != "__init__"}
    assert sources == shared | {"bridge.worker"}


def test_the_public_names_are_these():
    names = ["Gpu", "array_module", "batched", "errors", "executor_init", "resident", "scipy_module"]
    names += ["to_device", "to_host"]
    assert sorted(bridge.__all__) == names
    assert all(getattr(bridge, name) is not None for name in bridge.__all__)


def test_nothing_imports_against_the_layers():
    """celery_app > bridge > actors: what the executor loads knows nothing of the bridge."""
    assert not {"bridge", "celery_app"} & set(loaded_by("import actors.executor.loop, actors.actor.shell"))
    assert "celery_app" not in loaded_by("import bridge.pool, bridge.driver.loop")
