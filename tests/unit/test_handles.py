"""Where tasks run that take arrays which stay on a device, and whose results may stay."""

import json
import pickle

import pytest
from celery import Celery, chain, chord, group
from kombu.serialization import dumps as encode
from kombu.serialization import prepare_accept_content

from actors.contract import Failed, FailureKind, Succeeded
from actors.data.arrays import ArrayRef, ArraySpec
from actors.data.handles import DeviceArray
from actors.unopened import Unopened
from bridge import Gpu, errors
from bridge.driver import holders
from bridge.driver.errands import Errands
from bridge.driver.holders import Plan, handles_in, handles_of, may_stay, plan
from bridge.driver.orders import TaskWaiting
from bridge.driver.verdicts import MAX_LOSSES
from bridge.link import Run
from bridge.marks import find_marks

ACCEPT = prepare_accept_content(["json", "pickle"])
REF = ArrayRef(url="redis:" + "0" * 32, dtype="<f8", shape=(1,), size_bytes=8)


def handle(name="ab", actor=0, executor="e0", elements=1, kept=None):
    return DeviceArray(
        id=name, actor=actor, executor=executor, dtype="<f8", shape=(elements,), size_bytes=8 * elements, kept=kept
    )


def form(handle):
    return json.loads(handle.model_dump_json())


# ---- where


def test_without_handles_anywhere():
    assert plan([]) == Plan(None, ())


def test_where_its_arrays_are():
    assert plan([handle("a", 3), handle("b", 3)]) == Plan(3, (), "e0")


def test_where_most_bytes_are_and_the_others_are_fetched():
    small, large = handle("a", 0, "e0", 10), handle("b", 1, "e1", 11)
    assert plan([small, large]) == Plan(1, (small,), "e1")
    more = handle("c", 0, "e0", 5)
    assert plan([small, large, more]) == Plan(0, (large,), "e0")


def test_each_array_counts_once():
    small, large = handle("a", 0, "e0", 10), handle("b", 1, "e1", 15)
    assert plan([small, large, small, small]) == Plan(1, (small,), "e1")


def test_one_with_a_copy_need_not_be_fetched():
    assert plan([handle("a", 0, "e0", 10, REF), handle("b", 1, "e1", 11)]) == Plan(1, (), "e1")


def test_where_none_suits_all_are_fetched():
    a, b, copied = handle("a", 0, "e0", 10), handle("b", 1, "e1", 11), handle("c", 1, "e1", 11, REF)
    assert plan([a, b], lambda actor: actor == 0) == Plan(0, (b,), "e0")
    assert plan([a, b, copied], lambda _: False) == Plan(None, (a, b))


def test_another_executor_of_the_same_actor_is_another_place():
    old, new = handle("a", 0, "e0", 10), handle("b", 0, "e1", 11)
    assert plan([old, new]) == Plan(0, (old,), "e1")


# ---- which


def run(body, kind="application/json", encoding="utf-8"):
    return Run(1, "t", "1", {}, body, kind, encoding, None, None, 0)


@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_handles_are_found_in_a_message(serializer):
    import bridge.data  # noqa: F401 - teaches JSON

    given = handle("ab")
    for args, kwargs in [
        ([given], {}),
        ([], {"x": {"y": [1, given]}}),
        ([form(given)], {}),
        ([[{"z": form(given)}]], {}),
    ]:
        kind, encoding, body = encode((args, kwargs, {"callbacks": None}), serializer)
        assert handles_of(run(body, kind, encoding), ACCEPT) == [given]
        assert handles_of(run((args, kwargs, {})), ACCEPT) == [given]


def test_a_message_without_the_words_is_not_decoded(monkeypatch):
    monkeypatch.setattr(holders, "loads", lambda *_, **__: pytest.fail("decoded"))
    assert handles_of(run('[["no handle", {"kind": "ref"}], {}, {}]'), ACCEPT) == []
    assert handles_of(run(b'[["a device"], {}, {}]'), ACCEPT) == []


def test_what_is_not_accepted_or_broken_is_left_to_the_tracer():
    kind, encoding, body = encode(([handle()], {}, {}), "pickle")
    assert handles_of(run(body, kind, encoding), prepare_accept_content(["json"])) == []
    assert handles_of(run('[{"device": "executor"'), ACCEPT) == []


def test_a_form_that_is_broken_is_left_to_validation():
    assert handles_in([{**form(handle()), "id": "../x"}, {"kind": "device"}]) == []


# ---- results


@pytest.fixture(scope="module")
def app():
    app = Celery("lab", broker="memory://", set_as_current=False)

    def body(x): ...

    app.task(name="gpu", gpu=Gpu(result="device"), shared=False)(body)
    app.task(name="cpu", shared=False)(body)
    app.finalize()
    return app


@pytest.fixture
def marks(app):
    return find_marks(app.tasks.values(), [])


def staying(app, marks):
    gpu, cpu = app.tasks["gpu"].s, app.tasks["cpu"].s

    def take(*takers):
        return may_stay({"chain": [json.loads(json.dumps(each, default=dict)) for each in reversed(takers)]}, marks)

    return gpu, cpu, take


def test_a_result_stays_when_only_gpu_tasks_take_it(app, marks):
    gpu, cpu, take = staying(app, marks)
    assert take() and take(gpu()) and take(gpu(), cpu())
    assert not take(cpu()) and not take(cpu(), gpu())
    assert take(cpu().set(immutable=True)), "it takes no result"
    assert take(group(gpu(), gpu())) and not take(group(gpu(), cpu()))
    assert take(chain(gpu(), cpu())) and not take(chain(cpu(), gpu()))
    assert take(chord([gpu(), gpu()], cpu())) and not take(chord([gpu(), cpu()], gpu()))
    assert take(app.tasks["celery.map"].s(gpu(), [1])) and not take(app.tasks["celery.map"].s(cpu(), [1]))


def test_callbacks_and_a_chord_count_too(app, marks):
    gpu, cpu = dict(app.tasks["gpu"].s()), dict(app.tasks["cpu"].s())
    assert may_stay({"callbacks": [gpu, gpu], "chord": gpu, "chain": None}, marks)
    assert not may_stay({"callbacks": [gpu, cpu]}, marks)
    assert not may_stay({"chord": cpu}, marks)
    assert not may_stay({"chain": [gpu], "chord": cpu}, marks)


@pytest.mark.parametrize("odd", [{}, {"task": 3}, "text", {"task": "celery.chain", "kwargs": {"tasks": []}}, None, 3])
def test_an_odd_signature_takes_values(odd, marks):
    assert not may_stay({"callbacks": [odd]}, marks)


# ---- errands


@pytest.fixture
def told():
    return []


@pytest.fixture
def errands(told):
    return Errands(told.append)


def test_an_errand_waits_for_its_actor_and_answers_once(errands, told):
    answers = []
    errands.fetch([handle("ab", 5)], lambda *answer: answers.append(answer))
    (waiting,) = told
    assert waiting == TaskWaiting(waiting.token, "bridge.data.export", -1000, actor=5)
    args, _, _ = pickle.loads(errands.call(waiting.token).payload)
    assert args[0].source == handle("ab", 5)
    errands.wait(waiting.token)
    assert told == [waiting, waiting]
    errands.take(Succeeded(waiting.token, pickle.dumps(REF.model_dump(mode="json")), 0.1, 1))
    assert answers == [({"ab": REF}, None)] and waiting.token not in errands


def test_an_errand_that_fails_says_why(errands, told):
    answers = []
    for _ in range(3):
        errands.fetch([handle()], lambda _, error: answers.append(error))
    a, b, c = (each.token for each in told)
    full = pickle.dumps(errors.StoreUnavailable("full"))
    errands.take(Failed(a, FailureKind.RAISED, "StoreUnavailable", "full", exception=full))
    errands.take(Failed(b, FailureKind.CRASHED, "CRASHED", "signal 9 (SIGKILL)"))
    errands.lose(c, "its actor takes no calls")
    assert [type(each).__name__ for each in answers] == ["StoreUnavailable", "HandleLost", "HandleLost"]
    assert "signal 9" in str(answers[1]) and "takes no calls" in str(answers[2])


@pytest.mark.parametrize("kind", [FailureKind.LOST, FailureKind.NO_ROOM])
def test_an_errand_that_has_not_started_waits_again_but_not_for_ever(errands, told, kind):
    answers = []
    errands.fetch([handle()], lambda _, error: answers.append(error))
    failed = Failed(told[0].token, kind, kind.name, "restarted")
    for _ in range(MAX_LOSSES):
        errands.take(failed)
    assert answers == [] and told == [told[0]] * (MAX_LOSSES + 1)
    errands.take(failed)
    assert isinstance(answers[0], errors.HandleLost) and "restarted" in str(answers[0])
    assert failed.token not in errands


def test_an_errand_behind_a_slow_task_waits_as_long_as_it_takes(errands, told):
    errands.fetch([handle()], lambda *_: pytest.fail("answered"))
    for _ in range(3 * MAX_LOSSES):
        errands.take(Failed(told[0].token, FailureKind.HELD_UP, "HELD_UP", "slow"))
    assert len(told) == 3 * MAX_LOSSES + 1


@pytest.mark.parametrize(
    "value",
    [pickle.dumps({"kind": "npy", "data": ""}), pickle.dumps(None), b"no pickle"],
    ids=["an envelope", "nothing", "no pickle"],
)
def test_an_answer_that_is_no_reference_costs_only_its_task(errands, told, value):
    answers = []
    errands.fetch([handle()], lambda _, error: answers.append(error))
    errands.take(Succeeded(told[0].token, value, 0.1, 1))
    assert isinstance(answers[0], errors.HandleLost) and "something else than a reference" in str(answers[0])


def test_several_are_answered_together_and_one_error_is_told(errands, told):
    answers = []
    errands.fetch([handle("ab", 1), handle("cd", 2), handle("ab", 1)], lambda *answer: answers.append(answer))
    first, second = (each.token for each in told)
    errands.lose(second, "away")
    assert answers == []
    errands.take(Succeeded(first, pickle.dumps(REF.model_dump(mode="json")), 0.1, 1))
    ((refs, error),) = answers
    assert refs == {"ab": REF} and "away" in str(error)


def test_deletions_go_to_each_actor(errands, told):
    errands.delete([handle("a", 1), handle("b", 2), handle("c", 1)])
    assert [(each.name, each.actor) for each in told] == [("bridge.data.delete", 1), ("bridge.data.delete", 2)]
    (forms,), _, _ = pickle.loads(errands.call(told[0].token).payload)
    assert [each["id"] for each in forms] == ["a", "c"]
    errands.take(Succeeded(told[0].token, pickle.dumps(None), 0.0, 1))
    errands.take(Failed(told[1].token, FailureKind.LOST, "LOST", "gone"))


def test_what_was_fetched_takes_the_place_of_its_handle():
    there, here = handle("ab"), handle("cd")
    given = ([Unopened(ArraySpec(), there), there], {"x": here})
    args, kwargs = pickle.loads(holders.dumps(given, {"ab": REF}))
    assert args[0].source == REF and args[1] == REF and kwargs == {"x": here}
    args, _ = pickle.loads(holders.dumps(given, {}))
    assert args[1] == there
