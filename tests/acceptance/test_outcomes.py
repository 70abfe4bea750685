"""States, results and errors: what a producer reads of a GPU task is what it reads of the same CPU task."""

import datetime
import json
import uuid

import pytest
from celery import group
from celery.result import AsyncResult, GroupResult

from tests.apps.promise import ERRORS, KINDS, QUEUE
from tests.support import promise
from tests.support.promise import GET, NAME, failure
from tests.support.services import wait_for

CONF = {
    "result_extended": True, "task_track_started": True, "result_expires": 1234,
    "worker_deduplicate_successful_tasks": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def worker(environment, redis_server, tmp_path_factory):
    with promise.serving(environment, tmp_path_factory.mktemp("outcomes"), CONF) as worker:
        yield worker
    assert promise.left(redis_server) == (0, 0)


@pytest.fixture(scope="module")
def app(redis_server, worker):
    with promise.producer(redis_server, result_extended=True) as app:
        yield app


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def send(app, kind):
    """``send("add", 1)`` sends the task of the kind in hand."""

    def send_task(name, *args, kwargs=None, **options):
        return app.send_task(f"{kind}.{name}", args, kwargs, **options)

    return send_task


@pytest.fixture
def meta(redis_server):
    return lambda result: promise.meta(redis_server, result.id)


@pytest.fixture
def settled(redis_server):
    """Wait until every message is acknowledged, which is after its outcome is stored."""
    return lambda: wait_for(lambda: promise.left(redis_server) == (0, 0), "all messages to be acknowledged")


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


# ---- states


def test_started_says_where_and_a_custom_state_is_seen_while_the_body_runs(app, send, kind, tmp_path):
    gate, started = tmp_path / "gate", tmp_path / "started"
    held = send("holds", str(gate), str(started))
    wait_for(lambda: held.state == "STARTED" and started.exists(), "STARTED")
    driver = promise.gpu_stats(app)["driver"]
    assert held.info["hostname"] == NAME
    assert (held.info["pid"] == driver) is (kind == "gpu"), "the process that traces the task"
    gate.touch()
    assert held.get(**GET) == "held"
    gates, seen = [tmp_path / str(number) for number in range(3)], tmp_path / "seen"
    result = send("progress", [str(each) for each in gates], str(seen))
    for number, each in enumerate(gates):
        wait_for(lambda number=number: result.info == {"done": number, "of": 3}, f"step {number}")
        assert result.state == "PROGRESS" and not result.ready()
        each.touch()
    assert result.get(**GET) == "done" and result.state == "SUCCESS"
    assert lines(seen) == ["0", "1", "2"]


def test_every_state_is_published(send, tmp_path):
    gates, states = [tmp_path / str(number) for number in range(2)], []

    def on_message(message):
        states.append(message["status"])
        if message["status"] == "PROGRESS":
            gates[message["result"]["done"]].touch()

    result = send("progress", [str(gate) for gate in gates], str(tmp_path / "seen"))
    assert result.get(on_message=on_message, **GET) == "done"
    assert states == ["STARTED", "PROGRESS", "PROGRESS", "SUCCESS"]


def test_a_body_may_set_another_tasks_state(app, send):
    other = AsyncResult(promise.new_id(), app=app)
    result = send("tells_of_another", other.id)
    assert result.get(**GET) is None
    assert (other.state, other.info) == ("SEEN", {"by": result.id})


def test_ignore_leaves_the_state_the_body_has_set(send, settled, meta):
    """Celery's documented way to a final state of one's own; twenty, for a state must never come after its end."""
    own = [send("ignores", "HALFWAY", {"number": number}) for number in range(20)]
    plain = send("ignores")
    settled()
    assert [(each.state, each.info) for each in own] == [("HALFWAY", {"number": number}) for number in range(20)]
    assert plain.state == "STARTED" and meta(plain)["date_done"] is None


def test_neither_worker_nor_driver_look_for_garbage_in_what_they_have_loaded(app, settled, tmp_path):
    """All of it at once takes a tenth of a second; prefork's children have it from the worker, the driver more."""
    for kind in KINDS:
        assert app.send_task(f"{kind}.settled", [str(tmp_path / kind)]).get(**GET) is None
    settled()
    driver, child = (int(*lines(tmp_path / kind)) for kind in KINDS)
    assert child > 10_000
    assert driver > child + 10_000, "it has loaded Ray, too"


def test_a_state_that_cannot_be_stored_fails_the_task(send):
    assert failure(send("bad_meta"))[0] == "EncodeError"


# ---- what is stored


def test_results_are_extended(app, send, kind, meta):
    before = datetime.datetime.now(datetime.UTC)
    done = send("add", 1, kwargs={"b": 2})
    failed = send("fails", "x", kwargs={"code": 5})
    limited = send("too_long", 1)
    assert done.get(**GET) == 3
    assert failure(failed)[0] == "PromiseError"
    assert failure(limited)[:2] == ("TimeLimitExceeded", [0.5])
    expected = {
        done: ("add", [1], {"b": 2}, "SUCCESS"), failed: ("fails", ["x"], {"code": 5}, "FAILURE"),
        limited: ("too_long", [1], {}, "FAILURE"),
    }  # fmt: skip
    for result, (name, args, kwargs, status) in expected.items():
        stored = meta(result)
        common = {"task_id": result.id, "worker": NAME, "retries": 0, "queue": QUEUE, "children": [], "status": status}
        assert stored | common | {"name": f"{kind}.{name}", "args": args, "kwargs": kwargs} == stored
        fresh = AsyncResult(result.id, app=app)
        assert (fresh.name, fresh.args, fresh.kwargs) == (f"{kind}.{name}", args, kwargs)
        assert (fresh.worker, fresh.retries, fresh.queue) == (NAME, 0, QUEUE)
        assert before <= fresh.date_done <= datetime.datetime.now(datetime.UTC)
    assert meta(done)["traceback"] is None


def test_children_are_what_a_task_has_called(app, send, kind, meta, tmp_path):
    path = tmp_path / "linked"
    link = [app.signature(f"{kind}.notes", args=(str(path),)) for _ in range(2)]
    result = send("same", "value", link=link)
    assert result.get(**GET) == "value"
    wait_for(lambda: len(lines(path)) == 2, "both callbacks")
    stored = meta(result)["children"]
    children = [child for each in result.children for child in ([each] if isinstance(each, AsyncResult) else each)]
    assert len(stored) == len(result.children) and len(children) == 2
    assert [child.get(**GET) for child in children] == ["value", "value"]


def test_results_expire(redis_server, send):
    results = [send("add", 1), send("fails")]
    for result in results:
        wait_for(result.ready, "the end")
        assert 1000 < redis_server.client.ttl(f"celery-task-meta-{result.id}") <= 1234


def test_results_nobody_wants_are_not_stored(send, settled, meta, tmp_path):
    ran = tmp_path / "ran"
    results = {
        "task option": send("ignored", str(ran)),
        "task option, error": send("ignored", str(ran), 1),
        "only errors, success": send("errors_stored", str(ran)),
        "only errors, error": send("errors_stored", str(ran), 2),
        "call option": send("notes", "x", str(ran), ignore_result=True),
        "call option, error": send("fails", ignore_result=True),
        "call option over task option": send("ignored", str(ran), ignore_result=False),
    }
    wait_for(lambda: len(lines(ran)) == 6, "the bodies")
    settled()
    stored = {name: meta(result) for name, result in results.items()}
    assert {name for name, each in stored.items() if each} == {"only errors, error", "call option over task option"}
    assert stored["only errors, error"]["result"]["exc_message"] == [2, "because"]
    assert stored["call option over task option"]["result"] == "nobody reads it"


def test_values_that_json_carries_in_part_or_not_at_all(send):
    assert send("returns", "tuple").get(**GET) == [1, [2]]
    assert send("returns", "none").get(**GET) is None
    assert send("returns", "text keys").get(**GET) == {"1": "a"}
    assert send("returns", "text").get(**GET) == "ü☃"
    name, arguments, _ = failure(send("returns", "object"))
    assert (name, arguments) == ("EncodeError", ["TypeError('Object of type type is not JSON serializable')"])


@pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")  # by Celery's backend
def test_a_result_object_in_a_producers_hands(app, send, kind):
    done, failed = send("add", 1, 1), send("fails", kwargs={"code": 6})
    assert done.get(**GET) == 2 and done.successful() and done.ready() and not done.failed()
    error = failed.get(propagate=False, **GET)
    assert isinstance(error, Exception) and list(error.args) == [6, "because"]
    assert failed.failed() and failed.ready() and not failed.successful()
    assert failed.result.args == error.args and "raise PromiseError(code)" in failed.traceback
    done.forget()
    assert AsyncResult(done.id, app=app).state == "PENDING"
    saved = group([app.signature(f"{kind}.add", (number, 1)) for number in range(3)], app=app).apply_async()
    saved.save()
    restored = GroupResult.restore(saved.id, app=app)
    assert restored.get(**GET) == [1, 2, 3] and [each.id for each in restored] == [each.id for each in saved]
    restored.forget()
    assert all(AsyncResult(each.id, app=app).state == "PENDING" for each in saved)
    saved.delete()
    assert GroupResult.restore(saved.id, app=app) is None


# ---- errors


#: name -> class, arguments, module, as JSON keeps them
STORED = {
    "key": ("KeyError", ["k"], "builtins"),
    "os": ("FileNotFoundError", [2, "no such file"], "builtins"),
    "unicode": ("UnicodeDecodeError", ["utf-8", b"ab", 0, 1, "bad"], "builtins"),
    "nothing": ("NoArguments", [], "tests.apps.promise"),
    "number": ("ValueError", [1.5], "builtins"),
    "nested": ("PromiseError", [{"deep": [1, {"er": None}]}, ["why"]], "tests.apps.promise"),
    "object": ("ValueError", ["PosixPath('relative')"], "builtins"),
    "group": ("ExceptionGroup", ["many", "[ValueError('a'), KeyError('b')]"], "builtins"),
    "no text": ("Inner", ["x"], "tests.apps.promise"),
    "unpicklable": (
        "UnpickleableExceptionWrapper", ["tests.apps.promise", "Unpicklable", ["one"], "Unpicklable('one')"],
        "celery.utils.serialization",
    ),
    "stop": ("StopIteration", ["stopped"], "builtins"),
    "assertion": ("AssertionError", [], "builtins"),
    "timeout": ("TimeoutError", ["slow"], "builtins"),
    "base": ("OwnBase", ["own"], "tests.apps.promise"),
}  # fmt: skip


def test_errors_are_stored_with_class_arguments_and_traceback(app, send):
    results = {name: send("raises", name) for name in STORED}
    assert set(STORED) == set(ERRORS) - {"exit", "interrupt"}
    found = {}
    for name, result in results.items():
        wait_for(result.ready, f"the end of {name}")
        stored = app.backend.decode(app.backend.get(f"celery-task-meta-{result.id}"))
        assert stored["status"] == "FAILURE"
        found[name] = tuple(stored["result"][key] for key in ("exc_type", "exc_message", "exc_module"))
        if name != "base":  # ends a child's work before Celery could note where
            assert "promise.py" in stored["traceback"] and "raise ERRORS[name]()" in stored["traceback"], name
    assert found == STORED


def test_the_traceback_tells_the_causes(send):
    found = {}
    for how in ("from", "from none", "plain"):
        name, arguments, traceback = failure(send("raises_from", how))
        assert (name, arguments) == ("PromiseError", [1, "because"])
        found[how] = ("KeyError: 'missing'" in traceback, "During handling of the above" in traceback)
    assert found == {"from": (True, False), "from none": (False, False), "plain": (True, True)}


def test_expected_errors_are_logged_without_a_traceback(worker, send):
    """`throws`, by the class itself and by those it lists; any other error is logged as one."""
    results = {"raised expected": send("expected_error", 1), "raised unexpected": send("fails")}
    for text, result in results.items():
        assert failure(result)[0] == "PromiseError", "and the state is FAILURE"
        worker.says(f"[{result.id}] {text}")
        before, _, after = worker.output.partition(f"[{result.id}] {text}")
        level = before.rpartition("\n[")[2].split()[2].partition("/")[0]
        has_traceback = "Traceback" in after.partition("\n[2")[0]
        assert (level, has_traceback) == {"expected": ("INFO", False)}.get(text.split()[1], ("ERROR", True))


def test_reject(send, settled, tmp_path):
    """For good it is a failure in Celery 5.7; given back, it comes again."""
    ran = tmp_path / "ran"
    name, arguments, _ = failure(send("rejects"))
    assert name == "Reject" and arguments[0] == "no"
    again = send("rejects", str(ran))
    assert again.get(**GET) == "came again"
    assert lines(ran) == ["False", "True"], "and says that it was redelivered"
    settled()


def test_a_body_that_would_end_its_process_fails(send):
    """Under prefork it does end its child; its task fails all the same, and both go on."""
    for name in ("exit", "interrupt"):
        assert failure(send("raises", name))[0] in ("WorkerLostError", "RemoteTaskError")
    assert send("add", 1, 1).get(**GET) == 2


# ---- redelivered


def test_a_successful_task_that_is_delivered_again_does_not_run_again(
    app, redis_server, worker, kind, settled, tmp_path
):
    ran, linked = tmp_path / "ran", tmp_path / "linked"
    link = app.signature(f"{kind}.notes", args=(str(linked),))
    result = app.send_task(f"{kind}.notes", ("value", str(ran)), link=link, queue="nobody's")
    message = json.loads(redis_server.client.rpop("nobody's"))
    message["properties"]["delivery_info"] = {"exchange": "", "routing_key": QUEUE}
    redis_server.client.lpush(QUEUE, json.dumps(message))
    assert result.get(**GET) == "value"
    wait_for(lambda: lines(linked), "the callback")
    for _ in range(3):
        message["properties"]["delivery_tag"] = str(uuid.uuid4())
        message["properties"]["delivery_info"]["redelivered"] = True
        redis_server.client.lpush(QUEUE, json.dumps(message))
    last = app.send_task(f"{kind}.same", ("last",))
    assert last.get(**GET) == "last"
    settled()
    worker.says(f"{result.id}] Task already completed successfully")
    assert lines(ran) == lines(linked) == ["value"]
    assert result.state == "SUCCESS"
