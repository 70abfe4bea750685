"""How many actors there should be: pure."""

import pytest

from bridge import Gpu
from bridge.marks import find_marks
from bridge.places import Bounds, Needs, Node, Place, bounds, missing, needs, nodes, places
from tests.apps.base import App

ANY = Needs(1.0, ("",))


def body():
    pass


def needs_of(*options):
    app = App("places", set_as_current=False)
    for number, gpu in enumerate(options):
        app.task(name=f"t{number}", gpu=gpu)(body)
    app.finalize()  # gives it shared tasks of other tests' apps, too
    mine = [app.tasks[f"t{number}"] for number in range(len(options))]
    return needs(find_marks(mine, []).values())


def test_actors_reserve_the_largest_share_any_task_needs():
    assert needs_of(True) == ANY
    assert needs_of(Gpu(share=0.25), Gpu(share=0.5)).share == 0.5
    assert needs_of(Gpu(share=0.25), True).share == 1.0


def test_kinds_are_the_accelerators_that_tasks_name():
    assert needs_of(Gpu(accelerator="H100")).kinds == ("H100",)
    assert needs_of(Gpu(accelerator="H100"), True, Gpu(accelerator="A100")).kinds == ("", "A100", "H100")


def test_nodes_are_read_as_ray_tells_them():
    rows = [
        {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0, "accelerator_type:H100": 1.0}},
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": False, "Resources": {"GPU": 8.0}},
    ]
    assert nodes(rows) == [Node(2.0, "H100"), Node(0, "")]


@pytest.mark.parametrize(
    ("share", "gpus", "expected"), [(1.0, 2, 2), (0.5, 2, 4), (0.33, 1, 3), (1 / 3, 1, 3), (0.6, 2, 2), (1.0, 0, 0)]
)
def test_fractions_fit_several_times_on_a_gpu(share, gpus, expected):
    assert places([Node(gpus, "")], Needs(share, ("",))) == {"": expected}


def test_a_gpu_that_a_task_names_is_kept_for_actors_bound_to_it():
    cluster = [Node(4, "A100"), Node(2, "H100"), Node(1, "")]
    assert places(cluster, Needs(1.0, ("", "H100"))) == {"": 5, "H100": 2}
    assert places(cluster, Needs(1.0, ("H100",))) == {"H100": 2}, "no task takes any other"
    assert places(cluster, Needs(1.0, ("", "L4"))) == {"": 7, "L4": 0}


@pytest.mark.parametrize(
    ("fitting", "least", "most", "expected"),
    [
        (2, None, None, (2, 2)),
        (2, 1, None, (1, 2)),
        (2, 0, 8, (0, 8)),
        (2, None, 8, (2, 8)),
        (4, None, 3, (3, 3)),
        (0, 1, 4, (1, 4)),
        (4, 6, None, (4, 4)),
    ],
)
def test_bounds(fitting, least, most, expected):
    assert bounds(fitting, least, most) == expected


def test_those_that_are_always_there_are_created_without_being_asked_for():
    assert missing(set(), False, False, Bounds(2, 8)) == [0, 1]
    assert missing({1}, True, False, Bounds(2, 8)) == [0]
    assert missing({0, 1}, False, False, Bounds(2, 8)) == []


def test_waiting_tasks_double_them_up_to_the_bound_and_only_while_none_is_pending():
    assert missing(set(), False, True, Bounds(0, 8)) == [0]
    assert missing({0}, False, True, Bounds(0, 8)) == [1]
    assert missing({0, 2}, False, True, Bounds(0, 8)) == [1, 3]
    assert missing({0, 1, 2, 3, 4}, False, True, Bounds(0, 8)) == [5, 6, 7]
    assert missing(set(range(8)), False, True, Bounds(0, 8)) == []
    assert missing({0, 1}, True, True, Bounds(0, 8)) == []


def test_names_and_numbers_of_actors():
    both = Needs(1.0, ("", "A100-80G"))
    assert Place("", 3).slot(both) == 3
    assert Place("A100-80G", 3).slot(both) == 1003
    assert Place("", 3).name != Place("A100-80G", 3).name
