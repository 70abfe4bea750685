"""Long lists from producers that know nothing of the bridge: read on the GPU node only, and right for all who look."""

import decimal
import json
import math
import random

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import TaskRevokedError

from tests.support.services import Worker, inspected, wait_for

GET = {"timeout": 60}
QUEUE = "large"
LIMIT = 4 << 20
NUMBERS = [number / 2 for number in range(20_000)]
SUM = sum(NUMBERS)
NAME = "large@tests"


@pytest.fixture(scope="module")
def worker(environment, tmp_path_factory):
    env = {**environment, "BRIDGE_MAX_BODY_BYTES": str(LIMIT)}
    folder = tmp_path_factory.mktemp("large")
    process = Worker(folder, "-c", "1", "-Q", QUEUE, "-n", NAME, app="tests.apps.large:app", env=env)
    yield process
    assert process.popen.poll() is None, process.output[-5000:]
    assert process.stop() == 0, process.output[-5000:]


@pytest.fixture(scope="module")
def app(redis_server, worker):
    with Celery("producer", broker=redis_server.url, backend=redis_server.url, set_as_current=False) as made:
        made.conf.task_default_queue = QUEUE
        yield made


@pytest.fixture
def send(app):
    """``send("total", ...)``: the AsyncResult."""
    return lambda name, *args, **options: app.send_task(f"tests.apps.large.{name}", args, **options)


@pytest.fixture
def s(app):
    return lambda name, *args: app.signature(f"tests.apps.large.{name}", args)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def problems(result):
    error = result.get(**GET, propagate=False)
    assert type(error).__name__ == "PayloadInvalid", repr(error)
    return [(each["field"], each["received"]) for each in error.args[1]]


def test_a_mebibyte_of_numbers_is_summed(send):
    drawn = random.Random(1)
    numbers = [drawn.random() for _ in range(131_072)]
    assert send("total", numbers).get(**GET) == pytest.approx(sum(numbers))
    assert send("kind", numbers).get(**GET) == "ndarray float64 (131072,)"


def test_rows_of_integers_become_the_array_that_was_asked_for(send):
    rows = [[number, -number] for number in range(10_000)]
    assert send("matrix", rows).get(**GET) == "ndarray int32 (10000, 2) 0"


def test_other_parameters_get_what_json_holds(send):
    assert send("listed", NUMBERS, kwargs={"factor": 2.0, "more": {"a": [1] * 5000}}).get(**GET) == 2 * SUM
    sent = [NUMBERS, "x" * 70_000, {"a": [1] * 5000}, 1, None]
    assert send("anything", *sent, kwargs={"k": NUMBERS}).get(**GET) == [
        "list",
        "str",
        "dict",
        "int",
        "NoneType",
        "list",
    ]


@pytest.mark.parametrize("odd", [math.nan, math.inf, decimal.Decimal("1.5")])
def test_what_only_python_writes_arrives_as_ever(send, odd):
    got = send("listed", [*NUMBERS, odd]).get(**GET)
    assert math.isnan(got) if odd != odd else got == SUM + float(odd)


def test_a_compressed_one(send):
    assert send("total", NUMBERS, compression="gzip").get(**GET) == SUM


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("listed", [*NUMBERS, "seven"], [("values.20000", "str")]),
        ("listed", [*NUMBERS, [1]], [("values.20000", "list")]),
        ("listed", {"a": NUMBERS}, [("values", "dict")]),
        ("total", [*NUMBERS, "seven"], [("values", "list")]),
        ("total", [NUMBERS], [("values", "list")]),
        ("matrix", [[1, 2]] * 9000 + [[1, 2.5]], [("rows", "list")]),
        ("many", [*NUMBERS, None], [("values.20000", "NoneType")]),
    ],
)
def test_what_does_not_fit_names_the_field(send, name, values, expected):
    assert problems(send(name, values)) == expected


def test_what_does_not_fit_is_not_retried_and_has_not_run(send, tmp_path):
    path = tmp_path / "notes"
    assert problems(send("automatic", [*NUMBERS, "seven"], str(path))) == [("values.20000", "str")]
    assert problems(send("automatic", NUMBERS, kwargs={"wrong": 1})) == [("path", "nothing"), ("wrong", "int")]
    assert lines(path) == []


def test_a_number_that_python_takes_for_too_long_fails_the_task(app, redis_server, send):
    """As producers in other languages may write it; the reader names the argument."""
    text = json.dumps([[NUMBERS], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    result = send("listed", NUMBERS, queue="large.nobody")
    import base64

    stub = json.loads(redis_server.client.rpop("large.nobody"))
    body = text.replace("[0.0,", f"[{'9' * 5000},", 1).encode()
    stub["body"] = base64.b64encode(body).decode()
    redis_server.client.lpush(QUEUE, json.dumps(stub))
    assert [field for field, _ in problems(result)] == ["values"]


def test_one_of_a_batch_that_does_not_fit_fails_alone(send):
    results = [send("many", values) for values in ([1.0], NUMBERS, [*NUMBERS, "x"], NUMBERS[:10_000])]
    problem = problems(results.pop(2))
    assert [each.get(**GET) for each in results] == [1.0, SUM, sum(NUMBERS[:10_000])]
    assert problem == [("values.20000", "str")]


@pytest.mark.parametrize("name", ["again", "automatic"])
def test_a_retry_sends_the_same_list(send, tmp_path, name):
    path = tmp_path / "notes"
    assert send(name, NUMBERS, str(path)).get(**GET) == SUM
    seen = f"list 20000 {SUM:g}"
    own = f" ClosedList 20000 {SUM:g}" if name == "again" else ""
    assert lines(path) == [seen + own, seen + own]


def test_hooks_see_true_lists(send, tmp_path):
    path = tmp_path / "notes"
    assert send("hooked", NUMBERS, str(path)).get(**GET) == SUM
    wait_for(lambda: len(lines(path)) == 2, "hooks")
    result = send("hooked", [-1.0, *NUMBERS], str(path))
    assert type(result.get(**GET, propagate=False)) is ValueError
    wait_for(lambda: len(lines(path)) == 4, "hooks")
    seen, other = f"list 20000 {SUM:g}", f"list 20001 {SUM - 1:g}"
    assert lines(path) == [f"before {seen}", f"success {seen}", f"before {other}", f"failure {other}"]


def test_a_receiver_that_names_the_arguments_sees_true_lists_and_any_other_what_opens_itself(send, tmp_path):
    path = tmp_path / "notes"
    assert send("named", NUMBERS, str(path)).get(**GET) == SUM
    wait_for(lambda: lines(path), "the receiver")
    assert send("watched", NUMBERS, str(path)).get(**GET) == SUM
    assert lines(path) == [f"list 20000 {SUM:g}", f"ClosedList 20000 {SUM:g} 0.5"]


def test_an_error_callback_sees_the_list(s, tmp_path):
    path = tmp_path / "notes"
    s("fails", NUMBERS).apply_async(link_error=s("on_error", str(path)))
    wait_for(lambda: lines(path), "the callback")
    assert lines(path) == [f"ClosedList 20000 {SUM:g} {SUM}"]


def test_chain_group_and_chord(s):
    assert chain(s("summed", NUMBERS), s("add", 1)).apply_async().get(**GET) == SUM + 1
    assert group(s("summed", NUMBERS), s("total", NUMBERS)).apply_async().get(**GET) == [SUM, SUM]
    header = [s("summed", NUMBERS), s("total", NUMBERS)]
    assert chord(header, s("summed")).apply_async().get(**GET) == 2 * SUM


def test_a_chain_that_hands_a_long_list_on(s):
    echo = s("anything", NUMBERS)
    assert chain(echo, s("anything")).apply_async().get(**GET) == ["list"]


def test_a_map_over_long_lists(app, s):
    task = app.tasks.get("celery.starmap")
    assert task.s(s("summed"), [[NUMBERS], [NUMBERS]]).apply_async().get(**GET) == [SUM, SUM]


def test_inspect_shows_the_list_and_revoke_takes_what_waits(app, send, tmp_path):
    gate, path = tmp_path / "gate", tmp_path / "notes"
    running = send("holds", NUMBERS, str(gate), str(path))
    wait_for(lambda: lines(path), "the body")
    waiting = send("again", NUMBERS, str(path))
    inspect = lambda what: {each["id"]: each for each in inspected(app, NAME, what)}  # noqa: E731
    wait_for(lambda: waiting.id in inspect("reserved"), "the second")
    assert inspect("active")[running.id]["args"][0] == NUMBERS
    waiting.revoke()
    with pytest.raises(TaskRevokedError):
        waiting.get(**GET)
    gate.touch()
    assert running.get(**GET) == SUM
    assert lines(path) == ["runs"]


def test_beyond_the_limit_it_is_refused_unread(send, worker):
    error = send("total", ["x" * 1000] * 5000).get(**GET, propagate=False)
    assert type(error).__name__ == "PayloadTooLarge"
    assert send("total", NUMBERS).get(**GET) == SUM


def test_a_bomb_of_brackets_costs_only_itself(redis_server, send):
    import base64

    send("total", NUMBERS, queue="large.nobody")
    stub = json.loads(redis_server.client.rpop("large.nobody"))
    stub["body"] = base64.b64encode(b"[[" + b"[" * 300_000 + b"]" * 300_000 + b"], {}, {}]").decode()
    redis_server.client.lpush(QUEUE, json.dumps(stub))
    assert send("total", NUMBERS).get(**GET) == SUM
