"""When a worker lives and when it is ready: every reason there is, from facts alone."""

import pytest

from actors.contract import ActorState
from bridge import Gpu
from bridge.worker.readiness import DriverFacts, Facts, clean, condition_of

GIB = 2**30
ACTOR = {
    "slot": 0, "state": ActorState.READY, "reason": "", "accelerator": "L4", "memory_total_bytes": 24 * GIB,
    "share": 0.5,
}  # fmt: skip
WELL = Facts(
    waits_for="", stops=False, loop_s=0.5, loop_limit_s=15, consumes=True, broker_s=0.2,
    drivers=(DriverFacts(1, 2.0), DriverFacts(2, 4.0)), has_cluster=True, actors=(ACTOR,),
    tasks={"shop.any": Gpu(), "shop.small": Gpu(memory="12GiB", accelerator="L4")}, on_demand=False,
)  # fmt: skip


def test_a_worker_that_has_all_it_needs():
    assert condition_of(WELL) == ("ready", True, True, ())


@pytest.mark.parametrize(
    ("change", "state", "live", "words"),
    [
        ({"loop_s": 16}, "hung", False, "has not turned for 16 s"),
        ({"waits_for": "creating GPU actors"}, "starting", True, "creating GPU actors"),
        ({"waits_for": "x", "loop_s": 16}, "hung", False, "has not turned"),
        ({"stops": True, "loop_s": 900}, "stopping", True, "told to stop"),
        ({"consumes": False}, "not ready", True, "no connection to the broker"),
        ({"broker_s": 11}, "not ready", True, "the broker has not answered for 11 s"),
        ({"drivers": (DriverFacts(1, 2.0), DriverFacts(2, None))}, "not ready", True, "driver is not there"),
        ({"drivers": (DriverFacts(1, 2.0), DriverFacts(2, 16))}, "not ready", True, "(pid 2) has said nothing"),
        ({"has_cluster": False}, "not ready", True, "no connection to a Ray cluster"),
        ({"results": "OOM command"}, "not ready", True, "stores no results: OOM command"),
        ({"actors": ()}, "not ready", True, "no GPU actor is ready (there is none)"),
        (
            {"actors": ({**ACTOR, "state": "lost", "reason": "redis://:key@h died\n"},)},
            "not ready", True, "actor 0 is lost: redis://**@h died)",
        ),
        ({"tasks": {"shop.big": Gpu(memory="13GiB")}}, "not ready", True, "suits shop.big: a GPU with 13.0GiB of"),
        ({"tasks": {n: Gpu(accelerator="H100") for n in "abcd"}}, "not ready", True, "a, b, c and 1 more: a GPU of"),
    ],
)  # fmt: skip
def test_each_reason(change, state, live, words):
    condition = condition_of(WELL._replace(**change))
    assert (condition.state, condition.live, condition.ready) == (state, live, False)
    (reason,) = condition.reasons
    assert words in reason.what and reason.do


@pytest.mark.parametrize(
    "change",
    [
        {"actors": (), "on_demand": True},
        {"tasks": {"shop.other": Gpu(accelerator="H100")}, "on_demand": True},
        {"tasks": {}, "drivers": (DriverFacts(None, None),), "has_cluster": False, "actors": ()},
        {"actors": ({**ACTOR, "state": "failing"}, ACTOR)},
        {"actors": ({**ACTOR, "memory_total_bytes": 0},), "tasks": {"shop.big": Gpu(memory="80GiB")}},
    ],
    ids=[
        "actors come with the first task",
        "those of another kind, too",
        "no GPU tasks",
        "one of two",
        "memory unknown, as on NumPy",
    ],
)
def test_no_reason(change):
    assert condition_of(WELL._replace(**change)).ready


def test_texts_from_elsewhere_are_short_and_without_passwords():
    assert clean("a\n b  amqp://me:key@host/x") == "a b amqp://**@host/x"
    assert len(clean("x" * 1000)) == 300
