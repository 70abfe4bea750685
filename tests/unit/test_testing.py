"""`bridge.testing`: a user's tests without Ray, Redis or a GPU see what their producers would."""

import sys
import threading

import numpy
import pytest
from billiard.exceptions import WorkerLostError
from celery import Celery, Task, _state
from celery.exceptions import Ignore
from pydantic import BaseModel

from bridge import Gpu, array_module, batched
from bridge.errors import ConfigurationInvalid, GpuOutOfMemory, PayloadInvalid, RemoteTaskError, ResultInvalid
from bridge.testing import Sent, local_cluster


class Point(BaseModel):
    x: float
    y: float = 0.0


class Counts(Task):
    calls = 0

    def __call__(self, *args, **kwargs):
        Counts.calls += 1
        return super().__call__(*args, **kwargs)


@pytest.fixture
def app(monkeypatch):
    app = Celery("local", broker="memory://", backend="cache+memory://", set_as_current=False)
    monkeypatch.setattr(_state._tls, "current_app", app)  # as any project's app is its process's current one

    @app.task(shared=False, name="local.norm", gpu=True)
    def norm(values: list[float]) -> float:
        return array_module().linalg.norm(array_module().asarray(values))

    @app.task(shared=False, name="local.length", gpu=Gpu())
    def length(point: Point) -> float:
        assert isinstance(point, Point)
        return point.x

    @app.task(shared=False, name="local.mirror", gpu=True, pydantic=True)
    def mirror(point: Point) -> Point:
        return Point(x=-point.x, y=-point.y)

    @app.task(shared=False, name="local.keeps", gpu=True)
    def keeps(values: list):
        values.append(1)
        return {"array": numpy.arange(3), "model": Point(x=1)}

    @app.task(shared=False, name="local.squares", gpu=True)
    @batched(max_size=4)
    def squares(numbers: list[int]) -> list[int]:
        return [ValueError("negative") if number < 0 else number**2 for number in numbers]

    @app.task(shared=False, name="local.again", gpu=True, bind=True, max_retries=3)
    def again(self, until):
        self.tries = getattr(self, "tries", 0) + 1
        if self.request.retries < until:
            raise self.retry(countdown=0)
        return [self.request.retries, self.tries]

    @app.task(shared=False, name="local.auto", gpu=True, bind=True, autoretry_for=(KeyError,), default_retry_delay=0)
    def auto(self):
        if not self.request.retries:
            raise KeyError("once")
        return self.request.retries

    @app.task(shared=False, name="local.odd", gpu=True)
    def odd(what: str):
        if what == "lock":
            return threading.Lock()
        if what == "memory":
            raise MemoryError("7 GiB")
        if what == "exit":
            sys.exit(3)
        if what == "ignore":
            raise Ignore
        raise type("Local", (Exception,), {})("nobody else knows my class")

    @app.task(shared=False, name="local.counted", gpu=True, base=Counts, bind=True)
    def counted(self):
        return self.request.id

    @app.task(shared=False, name="local.cpu")
    def cpu(value: int):
        return value

    app.conf.task_always_eager = True
    return app


def test_results_are_what_a_producer_gets(app):
    with local_cluster(app) as cluster:
        assert app.tasks["local.norm"].delay([3, 4]).get() == 5.0
        assert type(app.tasks["local.norm"].apply(([3, 4],)).get()) is float, "an array's scalar has become plain"
        assert app.tasks["local.length"].delay({"x": 2}).get() == 2.0
        assert app.tasks["local.mirror"].delay({"x": 1, "y": 2}).get() == {"x": -1.0, "y": -2.0}
        kept = []
        assert app.tasks["local.keeps"].delay(kept).get() == {"array": [0, 1, 2], "model": {"x": 1.0, "y": 0.0}}
        assert kept == [], "a body gets a copy, as from another process"
        assert app.tasks["local.cpu"].delay("not an int").get() == "not an int", "a CPU task is left alone"
    assert cluster.calls[0] == Sent("local.norm", ([3.0, 4.0],), {})
    assert [call.task for call in cluster.calls][-1] == "local.keeps"


@pytest.mark.parametrize(
    ("task", "args", "error"),
    [
        ("norm", ["x"], PayloadInvalid),
        ("length", [{"y": 1}], PayloadInvalid),
        ("odd", ["lock"], ResultInvalid),
        ("odd", ["memory"], GpuOutOfMemory),
        ("odd", ["exit"], WorkerLostError),
        ("odd", ["?"], RemoteTaskError),
        ("squares", [-1], ValueError),
    ],
)
def test_errors_are_what_a_producer_gets(app, task, args, error):
    with local_cluster(app):
        result = app.tasks[f"local.{task}"].delay(*args)
        with pytest.raises(error):
            result.get()


def test_what_a_body_asks_of_celery_happens(app):
    with local_cluster(app) as cluster:
        assert app.tasks["local.again"].delay(2).get() == [2, 3], "what a body keeps on its task stays there"
        assert app.tasks["local.auto"].delay().get() == 1
        assert app.tasks["local.odd"].delay("ignore").state == "IGNORED"
        assert app.tasks["local.counted"].delay().get() is not None
        assert Counts.calls == 1
    assert [call.task for call in cluster.calls].count("local.again") == 3


def test_failures_to_order(app):
    with local_cluster(app) as cluster:
        cluster.fail_next("local.norm", GpuOutOfMemory("too big"))
        with pytest.raises(GpuOutOfMemory, match="too big"):
            app.tasks["local.norm"].delay([1]).get()
        assert app.tasks["local.norm"].delay([1]).get() == 1.0
        with pytest.raises(LookupError, match=r"'local\.cpu' is no GPU task; these are: .*local\.again"):
            cluster.fail_next("local.cpu", KeyError())


def test_a_batch_is_run_as_one(app):
    with local_cluster(app) as cluster:
        assert app.tasks["local.squares"].delay(3).get() == 9
        nine, error, four = cluster.run_batch("local.squares", [(3,), (-1,), (2,)])
        assert (nine, type(error), four) == (9, ValueError, 4)
        with pytest.raises(LookupError, match="no @batched GPU task"):
            cluster.run_batch("local.norm", [])


def test_calling_a_task_as_a_function_is_a_plain_call(app):
    with local_cluster(app) as cluster:
        assert isinstance(app.tasks["local.norm"]([3, 4]), numpy.floating)
        assert isinstance(app.tasks["local.keeps"]([])["array"], numpy.ndarray)
    assert cluster.calls == []


def test_tasks_marked_by_setting_alone_are_not_checked(app):
    with local_cluster(app, ["local.c*"]) as cluster:
        assert app.tasks["local.cpu"].delay("no int").get() == "no int"
    assert cluster.calls == [Sent("local.cpu", ("no int",), {})]


def test_afterwards_everything_is_as_before(app):
    def look():
        return {name: dict(vars(app.tasks[name])) for name in app.tasks if name.startswith("local.")}

    app.finalize()
    before = look()
    with local_cluster(app):
        assert look() != before
    assert look() == before
    assert app.tasks["local.mirror"].delay({"x": 1}).get() == {"x": -1.0, "y": 0.0}
    assert isinstance(app.tasks["local.keeps"].delay([]).get()["array"], numpy.ndarray)


def test_a_mark_that_means_nothing_is_said(app):
    @app.task(shared=False, name="local.bad", gpu="yes")
    def bad():
        pass

    with pytest.raises(ConfigurationInvalid, match="gpu='yes'"), local_cluster(app):
        pass
