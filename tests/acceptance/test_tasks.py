"""Bodies run on the actor exactly as written; a plain producer gets what Celery would give it."""

import pytest
from celery.exceptions import Retry

from tests.support.services import wait_for

GET = {"timeout": 60}


def failure(result):
    """(class name, arguments, traceback) of a failed task, as a producer without the app's code sees it."""
    with pytest.raises(Exception) as caught:
        result.get(**GET)
    assert result.state == "FAILURE"
    return type(caught.value).__name__, caught.value.args, result.traceback or ""


@pytest.fixture
def tally(send, gpu_stats):
    """``tally(name)``: (tasks, runs) of a task name on the actor, from a report newer than the call."""

    def counts(name):
        row = gpu_stats()["actors"][0]["by_task"].get(name, {"tasks": 0, "runs": 0})
        return row["tasks"], row["runs"]

    def read(name):
        before = counts("shop.pid")[0]
        send("pid").get(**GET)
        wait_for(lambda: counts("shop.pid")[0] > before, "a fresh report")
        return counts(name)

    return read


def test_a_marked_task_runs_in_the_executor_and_an_unmarked_one_in_a_child(worker, send, gpu_stats):
    gpu_pid, cpu_pid = send("pid").get(**GET), send("where").get(**GET)
    stats = gpu_stats()
    assert gpu_pid == stats["actors"][0]["executor_pid"]
    assert cpu_pid not in (gpu_pid, worker.pid, stats["driver"])


def test_defaults_and_keywords(worker, send):
    assert send("add", 1).get(**GET) == 11
    assert send("add", 1, kwargs={"b": 2}).get(**GET) == 3
    assert send("echo", 1, "two", kwargs={"three": [3]}).get(**GET) == [[1, "two"], {"three": [3]}]


def test_request_is_truthful(worker, send):
    result = send("who", 1, 2, headers={"colour": "red"})
    seen = result.get(**GET)
    assert seen["id"] == result.id == seen["root_id"]
    assert seen["task"] == seen["name"] == "shop.who"
    assert seen["args"] == [1, 2]
    assert seen["retries"] == 0 and seen["called_directly"] is False and seen["is_eager"] is False
    assert seen["hostname"].startswith("shop@")
    assert seen["delivery_info"]["routing_key"] == "celery"


def test_a_custom_call_surrounds_the_body_where_the_body_runs(worker, send):
    result = send("in_context")
    context, here, task_id = result.get(**GET)
    assert context == here
    assert task_id == result.id


def test_celerys_own_pydantic_tasks(worker, send):
    assert send("mirror", {"x": 1.0, "y": 2.0}).get(**GET) == {"x": -1.0, "y": -2.0}
    _, arguments, _ = failure(send("mirror", {"x": "no"}))
    assert "ValidationError" in str(arguments), "as under prefork: Celery's JSON cannot rebuild pydantic's error"


def test_models_in_signatures_are_built_and_dumped(worker, send):
    assert send("length", {"x": 3, "y": 4}, 2).get(**GET) == 10.0
    assert send("model").get(**GET) == {"x": 1.0, "y": 2.0}


def test_arrays_and_scalars_become_plain_json(worker, send):
    assert send("arrays").get(**GET) == {
        "scalar": 0.5, "int": 7, "array": [[0.0, 1.0], [2.0, 3.0]], "nested": [6.0, [3.0]],
    }  # fmt: skip


def test_an_exception_arrives_with_its_class_and_the_remote_traceback(worker, send):
    name, arguments, traceback = failure(send("fails", 42))
    assert (name, list(arguments)) == ("ShopError", [42, "because"])
    assert 'raise ShopError(code, "because")' in traceback
    assert "tests/apps/shop.py" in traceback


def test_an_exception_that_cannot_be_unpickled_arrives_as_from_a_prefork_child(worker, send):
    name, arguments, traceback = failure(send("fails_unpicklable"))
    assert name == "UnpickleableExceptionWrapper", "Celery's own, which names class and arguments"
    assert (arguments[1], list(arguments[2])) == ("Unpicklable", ["odd"])
    assert 'raise Unpicklable("odd", two=2)' in traceback


def test_an_exception_of_a_class_nobody_else_can_find_keeps_its_text(worker, send):
    name, arguments, traceback = failure(send("fails_locally"))
    assert name == "RemoteTaskError"
    assert arguments[0].endswith("Local") and arguments[1] == "here only"
    assert "raise local_error()" in traceback


def test_a_value_that_cannot_be_sent_is_an_error_that_says_so(worker, send):
    name, arguments, _ = failure(send("returns_lock"))
    assert name == "ResultInvalid" and "lock" in arguments[0]


@pytest.mark.parametrize(
    ("task", "args", "kwargs", "field", "received"),
    [
        ("add", ["one"], {}, "a", "str"),
        ("add", [], {}, "a", "nothing"),
        ("add", [1, 2, 3], {}, "argument 3", "int"),
        ("add", [1], {"c": 3}, "c", "int"),
        ("length", [{"x": 1.0}], {}, "point.y", "nothing"),
        ("length", [{"x": 1.0, "y": [1]}], {}, "point.y", "list"),
        ("squares", ["x"], {}, "numbers", "str"),
    ],
)
def test_a_wrong_payload_names_the_field(worker, send, tally, task, args, kwargs, field, received):
    before = tally(f"shop.{task}")
    name, (task_name, problems), _ = failure(send(task, *args, kwargs=kwargs))
    assert name == "PayloadInvalid" and task_name == f"shop.{task}"
    assert [(problem["field"], problem["received"]) for problem in problems] == [(field, received)]
    assert tally(f"shop.{task}") == before, "an invalid payload must not reach an actor"


def test_a_wrong_payload_is_not_retried(worker, send):
    result = send("autoretries_everything", "x")
    assert failure(result)[0] == "PayloadInvalid"


def test_retry_in_the_body(worker, send, tmp_path):
    assert send("retries", str(tmp_path / "log"), 2).get(**GET) == 2
    assert (tmp_path / "log").read_text().split() == ["0", "1", "2"]


def test_autoretry(worker, send):
    assert send("autoretries", 2).get(**GET) == 2
    name, arguments, _ = failure(send("autoretries", 5))
    assert (name, list(arguments)) == ("ShopError", [2, "again"])


def test_update_state_is_seen_while_the_body_runs(worker, send, tmp_path):
    gate = tmp_path / "go"
    result = send("progress", str(gate))
    wait_for(lambda: result.state == "PROGRESS", "the custom state, while the body waits")
    assert result.info == {"done": 1}
    gate.touch()
    assert result.get(**GET) == "done"


def test_prints_and_logs_reach_the_workers_log(worker, send):
    send("prints", "hello from a GPU node").get(**GET)
    worker.says("hello from a GPU node")


def test_soft_limit_can_be_caught_and_the_executor_stays(worker, send, tmp_path):
    before = send("pid").get(**GET)
    assert send("soft_limited", str(tmp_path / "log")).get(**GET) == before
    assert (tmp_path / "log").read_text() == "caught\n"


def test_hard_limit_ends_the_task_and_frees_the_gpu(worker, send):
    name, _, _ = failure(send("hard_limited"))
    assert name == "TimeLimitExceeded"
    assert send("add", 1, 1).get(**GET) == 2


def test_large_payload_and_large_result(worker, send):
    text = "x" * 200_000
    assert send("big", text, 1).get(**GET) == text
    assert send("big", "ab", 200_000).get(**GET) == "ab" * 200_000


def test_large_results_among_small_ones_of_the_same_call(worker, send, tmp_path):
    """A large outcome is fetched on its own while its call is still collected: neither may forget the other."""
    for result in [send("nap", 0) for _ in range(40)] + [send("big", "x", 10) for _ in range(10)]:
        result.get(**GET)  # now both are known to be short, and share calls
    for round_ in range(3):
        gate = tmp_path / str(round_)
        blocker = send("progress", str(gate))
        wait_for(lambda blocker=blocker: blocker.state == "PROGRESS", "the actor to be busy")
        big = [send("big", "x", 8_000_000) for _ in range(3)]
        naps = [send("nap", 0.03) for _ in range(5)]
        gate.touch()
        assert [len(result.get(**GET)) for result in big] == [8_000_000] * 3
        assert [result.get(**GET) for result in naps] == [0.03] * 5


def test_small_results_that_fill_large_replies(worker, send, gpu_stats):
    """Each comes inline, but replies of many are too large for Ray to do the same: they go through its object store."""
    before = gpu_stats()["driver"]
    for _ in range(8):
        results = [send("big", "x", 40_000) for _ in range(60)]
        assert all(result.get(**GET) == "x" * 40_000 for result in results)
    assert gpu_stats()["driver"] == before, "the driver died"


def test_a_resident_is_loaded_before_the_first_task(worker, send):
    assert send("looks_up", 3).get(**GET) == 3


def test_an_example_runs_at_warm_up(worker, send):
    assert send("warm", 3).get(**GET) >= 2, "the executor must have run the example before the first task"


def test_a_batch_shares_runs_of_its_body(worker, send, tally):
    tasks, runs = tally("shop.squares")
    results = [send("squares", number) for number in range(14, 64)]
    assert [result.get(**GET) for result in results] == [number**2 for number in range(14, 64)]
    after = tally("shop.squares")
    assert after[0] - tasks == 50
    assert after[1] - runs <= 25, "50 tasks must share runs"


def test_the_item_at_fault_in_a_batch_fails_alone(worker, send):
    results = {number: send("squares", number) for number in [1, 2, 13, 3, -1, 4]}
    assert failure(results[13])[0] == "ShopError"
    assert failure(results[-1])[0] == "ValueError"
    assert [results[number].get(**GET) for number in (1, 2, 3, 4)] == [1, 4, 9, 16]


def test_a_chain_goes_cpu_gpu_cpu(worker, producer):
    chain = (
        producer.signature("shop.double", (1,))
        | producer.signature("shop.add", (5,))
        | producer.signature("shop.double")
    )
    assert chain.apply_async().get(**GET) == 14


def test_many_tasks_of_both_kinds(worker, send):
    gpu = [send("add", number, 1) for number in range(200)]
    cpu = [send("double", number) for number in range(50)]
    assert [result.get(**GET) for result in gpu] == [number + 1 for number in range(200)]
    assert [result.get(**GET) for result in cpu] == [number * 2 for number in range(50)]


def test_an_unknown_task_is_rejected_and_the_worker_goes_on(worker, send):
    assert failure(send("nowhere", 1))[0] == "NotRegistered"
    assert send("add", 1, 1).get(**GET) == 2


def test_retry_class_is_celerys(worker):
    from actors.wishes import RetryWanted

    assert issubclass(RetryWanted, Retry)
