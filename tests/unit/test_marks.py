"""Which tasks are GPU tasks: by mark, by setting, and what is refused."""

import pytest
from celery import Celery
from pydantic import ValidationError

from bridge import Gpu, batched
from bridge.errors import ConfigurationInvalid
from bridge.marks import find_marks, is_gpu, marks_of


@pytest.fixture
def app():
    app = Celery("marks", set_as_current=False)

    @app.task(shared=False, name="mshop.plain")
    def plain():
        pass

    @app.task(shared=False, name="mshop.marked", gpu=True)
    def marked():
        pass

    @app.task(shared=False, name="mshop.options", gpu=Gpu(memory="2GiB", max_crashes=3))
    def options():
        pass

    @app.task(shared=False, name="mshop.no", gpu=False)
    def no():
        pass

    @app.task(shared=False, name="mshop.many", gpu=True)
    @batched(max_size=16, max_wait_s=0.01)
    def many(numbers: list[int]) -> list[int]:
        return numbers

    app.finalize()
    return app


def marks(app, *patterns):
    """Of this app's own tasks: those other tests have declared for every app are left out."""
    own = [task for name, task in app.tasks.items() if name.startswith(("mshop.", "celery."))]
    return find_marks(own, patterns)


def test_marked_tasks_and_no_others(app):
    found = marks(app)
    assert set(found) == {"mshop.marked", "mshop.options", "mshop.many"}
    assert not any(mark.configured for mark in found.values())


def test_options_are_read(app):
    found = marks(app)["mshop.options"].gpu
    assert (found.memory, found.max_crashes) == (2 << 30, 3)
    assert marks(app)["mshop.marked"].gpu == Gpu()


def test_a_vectorised_body_is_found(app):
    batch = marks(app)["mshop.many"].batch
    assert (batch.max_size, batch.max_wait_s) == (16, 0.01)
    assert marks(app)["mshop.marked"].batch is None


def test_patterns_mark_by_name(app):
    found = marks(app, "mshop.p*")
    assert found["mshop.plain"].configured
    assert not found["mshop.marked"].configured
    assert set(marks(app, "other.*")) == set(marks(app))


def test_a_task_marked_in_code_keeps_its_options_when_a_pattern_names_it_too(app):
    found = marks(app, "mshop.*")["mshop.options"]
    assert found.gpu.max_crashes == 3
    assert not found.configured


def test_patterns_are_case_sensitive(app):
    assert "mshop.plain" not in marks(app, "MSHOP.plain")


def test_celerys_own_tasks_never_match(app):
    assert not any(name.startswith("celery.") for name in marks(app, "*"))


@pytest.mark.parametrize("value", ["yes", 1, {"memory": 3}, 2.5, "", 0, {}, []])
def test_a_mark_that_means_nothing_is_refused_with_the_tasks_name(value):
    app = Celery("wrong", set_as_current=False)

    @app.task(shared=False, name="mshop.wrong", gpu=value)
    def wrong():
        pass

    app.finalize()
    with pytest.raises(ConfigurationInvalid, match=r"task mshop\.wrong: gpu="):
        marks(app)


@pytest.mark.parametrize(
    "options",
    [{"memmory": 1}, {"memory": "many"}, {"max_crashes": 0}, {"example": 3}, {"keep_copy": True}, {"result": "gpu"}],
)
def test_unknown_options_fail_where_they_are_written(options):
    with pytest.raises(ValidationError):
        Gpu(**options)


def test_an_app_whose_results_stay_gets_the_tasks_that_fetch_them_and_no_other_app_does(app):
    assert "bridge.data.export" not in marks_of(app, [])
    staying = Celery("staying", set_as_current=False)
    staying.task(shared=False, name="staying.made", gpu=Gpu(result="device"))(body_of_one)
    names = {name for name in marks_of(staying, []) if name.startswith(("staying", "bridge"))}  # Celery shares others
    assert names == {"staying.made", "bridge.data.export", "bridge.data.delete"}
    assert "bridge.data.export" in marks_of(staying, ["*"]), "asked once more"
    assert "bridge.data.export" not in app.tasks


def body_of_one(x): ...


def test_options_do_not_change():
    with pytest.raises(ValidationError):
        Gpu().memory = 3


GPU, CPU = {"task": "shop.gpu", "args": []}, {"task": "shop.cpu"}


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "wanted"),
    [
        ("shop.gpu", [], {}, True),
        ("shop.cpu", [], {}, False),
        ("celery.map", [], {"task": GPU, "it": [1]}, True),
        ("celery.starmap", [GPU, [[1]]], {}, True),
        ("celery.map", [GPU], {"it": [1]}, True),
        ("celery.map", [], {"task": CPU, "it": [1]}, False),
        ("celery.chunks", [], {"task": GPU, "it": [1], "n": 1}, False),
        # what no Celery sends, and a producer of any language may
        ("celery.map", [], ["x"], False),
        ("celery.map", {"a": 1}, {}, False),
        ("celery.map", 5, {}, False),
        ("celery.map", None, None, False),
        ("celery.map", [], {"task": []}, False),
        ("celery.map", [], {"task": {"task": []}}, False),
        ("celery.map", [], {"task": "shop.gpu"}, False),
    ],
)
def test_maps_over_gpu_tasks_are_gpu_tasks(name, args, kwargs, wanted):
    assert is_gpu({"shop.gpu": None}, name, args, kwargs) is wanted
