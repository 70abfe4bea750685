"""Where a task's body sits under what Celery wraps around it, and that a replacement takes its place exactly there."""

import functools

import pytest
from celery import Celery, Task
from pydantic import BaseModel

from actors.bodies import has_custom_call, innermost, is_pydantic, replace_innermost, without_custom_call


class Point(BaseModel):
    x: float


class ShopError(Exception):
    pass


class InContext(Task):
    def __call__(self, *args, **kwargs):
        return ["context", super().__call__(*args, **kwargs)]


class Inherits(InContext):
    pass


class ByClass(Task):
    name = "shop.by_class"

    def run(self, x):
        return ["class", self.name, x]


@pytest.fixture(scope="module")
def app():
    app = Celery("bodies", set_as_current=False, broker="memory://")
    app.conf.task_always_eager = True

    def task(function=None, **options):
        return app.task(function, shared=False, **options) if function else functools.partial(task, **options)

    @task(name="plain")
    def plain(x):
        return ["plain", x]

    @task(name="bind", bind=True)
    def bind(self, x):
        return ["bind", self.name, x]

    @task(name="retry", autoretry_for=(ShopError,), max_retries=2, retry_backoff=False, default_retry_delay=0)
    def retry(x):
        return ["retry", x]

    @task(name="retry bind", bind=True, autoretry_for=(ShopError,), max_retries=2, default_retry_delay=0)
    def retry_bind(self, x):
        return ["retry bind", self.name, x]

    @task(name="pydantic", pydantic=True)
    def pydantic(x: Point) -> Point:
        return Point(x=x.x + 1)

    @task(name="pydantic bind", pydantic=True, bind=True)
    def pydantic_bind(self, x: Point) -> Point:
        assert self.name == "pydantic bind"
        return Point(x=x.x + 1)

    @task(name="pydantic retry", pydantic=True, autoretry_for=(ShopError,), max_retries=2, default_retry_delay=0)
    def pydantic_retry(x: Point) -> Point:
        return Point(x=x.x + 1)

    @task(name="context", base=InContext)
    def context(x):
        return ["body", x]

    app.register_task(ByClass())
    app.finalize()
    return app


PLAIN = {
    "plain": ["plain", 1],
    "bind": ["bind", "bind", 1],
    "retry": ["retry", 1],
    "retry bind": ["retry bind", "retry bind", 1],
    "context": ["body", 1],
    "shop.by_class": ["class", "shop.by_class", 1],
}
MODELS = ["pydantic", "pydantic bind", "pydantic retry"]


@pytest.fixture
def restored(app):
    """Undo what a test does to a task."""
    from actors.bodies import _pydantic_cell, _run_slot

    saved = {}
    for name, task in app.tasks.items():
        cell = _pydantic_cell(_run_slot(task))
        saved[name] = dict(vars(task)), cell, cell and cell.cell_contents, type(task)
    yield app
    for name, (attributes, cell, body, cls) in saved.items():
        task = app.tasks[name]
        vars(task).clear()
        vars(task).update(attributes)
        task.__class__ = cls
        if cell is not None:
            cell.cell_contents = body


@pytest.mark.parametrize("name", PLAIN)
def test_the_innermost_body_is_what_the_user_wrote(app, name):
    assert innermost(app.tasks[name])(1) == PLAIN[name]


@pytest.mark.parametrize("name", MODELS)
def test_the_innermost_body_of_a_pydantic_task_takes_models(app, name):
    assert innermost(app.tasks[name])(Point(x=1)) == Point(x=2)
    assert is_pydantic(app.tasks[name])


def test_other_tasks_are_not_pydantic(app):
    assert not any(is_pydantic(app.tasks[name]) for name in PLAIN)


@pytest.mark.parametrize("name", PLAIN)
def test_a_replacement_gets_the_arguments_of_the_body(restored, name):
    task = restored.tasks[name]
    replace_innermost(task, lambda *args, **kwargs: ["replaced", args, kwargs])
    wanted = ["replaced", (1,), {"y": 2}]
    found = task(1, y=2)
    assert found == (["context", wanted] if name == "context" else wanted)
    assert task.apply((1,), {"y": 2}).get() == found


@pytest.mark.parametrize("name", MODELS)
def test_celerys_pydantic_wrapper_stays_around_a_replacement(restored, name):
    task = restored.tasks[name]
    seen = []

    def replacement(x):
        seen.append(x)
        return Point(x=7)

    replace_innermost(task, replacement)
    assert task.apply(({"x": 1},)).get() == {"x": 7.0}
    assert seen == [Point(x=1)]


@pytest.mark.parametrize("name", ["retry", "retry bind", "pydantic retry"])
def test_celerys_autoretry_stays_around_a_replacement(restored, name):
    task = restored.tasks[name]
    runs = []

    def replacement(x):
        runs.append(x)
        if len(runs) < 3:
            raise ShopError("again")
        return Point(x=5)

    replace_innermost(task, replacement)
    result = task.apply(({"x": 1},))
    assert result.get() == ({"x": 5.0} if "pydantic" in name else Point(x=5))
    assert len(runs) == 3


def test_custom_calls_are_found_also_when_inherited(app):
    class Deeper(Inherits):
        pass

    assert has_custom_call(app.tasks["context"])
    assert not has_custom_call(app.tasks["plain"])
    assert not has_custom_call(app.tasks["shop.by_class"])
    assert has_custom_call(Deeper())


def test_a_custom_call_can_be_taken_off_one_task_only(restored):
    task = restored.tasks["context"]
    assert task(1) == ["context", ["body", 1]]
    without_custom_call(task)
    assert task(1) == ["body", 1]
    assert task.apply((1,)).get() == ["body", 1]
    assert isinstance(task, InContext)
    assert InContext.__call__ is not Task.__call__, "the class is untouched: other tasks keep its call"
