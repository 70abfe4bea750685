"""Which of a worker's drivers gets a task."""

import pytest

from bridge import Gpu, batched
from bridge.marks import find_marks
from bridge.settings import Settings
from bridge.worker import drivers as module
from bridge.worker.drivers import Drivers
from tests.apps.base import App


class Supervisor:
    def __init__(self, _app, _hostname, _settings, label):
        self.label, self.tasks, self.process = label, [], None

    def apply(self, run, _callbacks):
        self.tasks.append(run["task"])

    @property
    def in_flight(self):
        return len(self.tasks)


@pytest.fixture
def drivers(monkeypatch):
    monkeypatch.setattr(module, "DriverSupervisor", Supervisor)
    app = App("drivers", set_as_current=False)

    @batched(max_size=4)
    def many(values: list[int]) -> list[int]:
        return values

    def plain():
        pass

    app.task(name="d.batched", gpu=True)(many)
    app.task(name="d.streams", gpu=Gpu(streams=2))(plain)
    app.task(name="d.plain", gpu=True)(plain)
    app.finalize()
    return Drivers(app, "here", Settings(drivers=3), find_marks(app.tasks.values(), []))


def test_the_driver_with_the_fewest_tasks_gets_the_next(drivers):
    for _ in range(9):
        drivers.apply({"task": "d.plain"}, {})
    assert [len(each.tasks) for each in drivers._all] == [3, 3, 3]
    assert len({each.label for each in drivers._all}) == 3


@pytest.mark.parametrize("name", ["d.batched", "d.streams"])
def test_tasks_that_share_runs_meet_in_one_driver(drivers, name):
    for _ in range(9):
        drivers.apply({"task": name}, {})
    assert sorted(len(each.tasks) for each in drivers._all) == [0, 0, 9]
