"""Calling tasks: every way and every option that Celery documents, for GPU tasks as for CPU tasks. One CPU child."""

import datetime
import json
import time
import zoneinfo

import pytest

from tests.apps import promise as apps
from tests.apps.promise import KINDS, OTHER_QUEUE, QUEUE
from tests.support import promise
from tests.support.promise import GET, failure
from tests.support.services import wait_for

CONF = {"accept_content": ["json", "yaml"], "task_inherit_parent_priority": True}


@pytest.fixture(scope="module")
def worker(environment, redis_server, tmp_path_factory):
    with promise.serving(environment, tmp_path_factory.mktemp("calling"), CONF, children=1) as worker:
        yield worker
    assert promise.left(redis_server) == (0, 0)


@pytest.fixture(scope="module")
def app(redis_server, worker):
    with promise.producer(redis_server) as app:
        yield app


@pytest.fixture(scope="module")
def tasks(redis_server, worker):
    """The task objects themselves, as a producer with the app's code has them."""
    app = apps.app
    app.conf.update(broker_url=redis_server.url, result_backend=redis_server.url)
    yield app.tasks
    promise.forget_results(app)
    app.close()


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
def held(send, tmp_path):
    """``release = held()``: the GPU, or the only child, is busy until `release()`."""
    gate = tmp_path / "held gate"

    def hold():
        started = tmp_path / "held"
        result = send("holds", str(gate), str(started))
        wait_for(started.exists, "the body to run")

        def release():
            gate.touch()
            assert result.get(**GET) == "held"

        return release

    yield hold
    gate.touch()


@pytest.fixture
def settled(redis_server):
    return lambda: wait_for(lambda: promise.left(redis_server) == (0, 0), "all messages to be acknowledged")


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def now():
    return datetime.datetime.now(datetime.UTC)


# ---- ways to call


def test_every_way_to_call(app, tasks, kind, tmp_path):
    task, add = tasks[f"{kind}.add"], app.signature(f"{kind}.add", args=(1,))
    ways = {
        "delay": (task.delay(1, 2), 3),
        "delay with keywords": (task.delay(1, b=4), 5),
        "default": (task.delay(1), 11),
        "apply_async": (task.apply_async((1, 2)), 3),
        "apply_async with keywords": (task.apply_async((1,), {"b": 6}), 7),
        "task id": (task.apply_async((1, 2), task_id=f"chosen-{kind}"), 3),
        "by name": (app.send_task(f"{kind}.add", (1, 2), {}), 3),
        "signature": (task.s(1, 2).delay(), 3),
        "signature from its JSON": (app.signature(json.loads(json.dumps(task.s(1, 2)))).apply_async(), 3),
        "partial": (task.s(3).delay(4), 7),
        "partial with keywords": (task.s(b=3).delay(4), 7),
        "keywords later": (task.s(4, b=1).delay(b=3), 7),
        "immutable": (task.si(3, 4).delay(100), 7),
        "by name, partial": (add.clone((2,), {}).delay(), 3),
        "set": (add.clone().set(queue=OTHER_QUEUE).delay(2), 3),
        "without retry": (task.apply_async((1, 2), retry=False), 3),
        "with a retry policy": (task.apply_async((1, 2), retry=True, retry_policy={"max_retries": 1}), 3),
        "with a producer": (task.apply_async((1, 2), producer=app.amqp.Producer(app.connection())), 3),
        "starting from a signature": (task.subtask((1, 2)).apply_async(), 3),
    }
    for way, (result, value) in ways.items():
        assert result.get(**GET) == value, way
    assert ways["task id"][0].id == f"chosen-{kind}"
    assert (task(1, 2), task.apply((1, 2)).get(), task.run(1, 2)) == (3, 3, 3), "here, without a worker"


def test_arguments_are_checked_where_the_task_is_called(tasks, kind):
    add, untyped = tasks[f"{kind}.add"], tasks[f"{kind}.untyped"]
    for wrong in ((), (1, 2, 3)):
        with pytest.raises(TypeError):
            add.delay(*wrong)
    with pytest.raises(TypeError):
        add.apply_async((1,), {"c": 3})
    assert failure(untyped.delay(1))[0] == {"gpu": "PayloadInvalid", "cpu": "TypeError"}[kind], "typing=False: later"


# ---- options of a call


def test_countdown_and_eta(app, redis_server, kind):
    """Not before its time, whatever zone that is in, and not hours late."""
    tokyo = zoneinfo.ZoneInfo("Asia/Tokyo")
    soon = now() + datetime.timedelta(seconds=1)
    sent = {
        "countdown": app.send_task(f"{kind}.clock", countdown=1),
        "aware": app.send_task(f"{kind}.clock", eta=soon),
        "elsewhere": app.send_task(f"{kind}.clock", eta=soon.astimezone(tokyo)),
        "naive, UTC": app.send_task(f"{kind}.clock", eta=soon.replace(tzinfo=None)),
        "text": app.send_task(f"{kind}.clock", eta=soon.isoformat()),
    }
    past = app.send_task(f"{kind}.clock", eta=now() - datetime.timedelta(days=1))
    with promise.producer(redis_server, enable_utc=False, timezone="Asia/Tokyo") as far:
        local = datetime.datetime.now(tokyo) + datetime.timedelta(seconds=1)
        sent["another producer's zone"] = far.send_task(f"{kind}.clock", eta=local)
        sent["another producer's countdown"] = far.send_task(f"{kind}.clock", countdown=1)
        for how, result in sent.items():
            assert result.get(**GET) >= soon.timestamp() - 0.01, how
    assert past.get(**GET) > 0


def test_expires_in_the_queue(app, kind, settled, tmp_path):
    ran = tmp_path / "ran"
    tomorrow, yesterday = now() + datetime.timedelta(days=1), now() - datetime.timedelta(days=1)
    late = [
        app.send_task(f"{kind}.notes", ("late", str(ran)), expires=expires)
        for expires in (-1, yesterday, yesterday.replace(tzinfo=None), yesterday.isoformat())
    ]
    intime = [app.send_task(f"{kind}.notes", ("in time", str(ran)), expires=expires) for expires in (3600, tomorrow)]
    assert [result.get(**GET) for result in intime] == ["in time"] * 2
    for result in late:
        wait_for(lambda result=result: result.state == "REVOKED", "REVOKED")
        assert str(result.result) == "expired"
    settled()
    assert lines(ran) == ["in time"] * 2


def test_expires_behind_a_long_body(send, kind, held, settled, tmp_path):
    """What expires while it waits for the GPU, or the child, never runs; for a GPU it is told at once."""
    ran = tmp_path / "ran"
    release = held()
    late = [send("notes", "late", str(ran), expires=0.5) for _ in range(3)]
    due = time.monotonic() + 0.5
    patient = send("notes", "patient", str(ran), expires=3600)
    if kind == "gpu":
        wait_for(lambda: all(result.state == "REVOKED" for result in late), "REVOKED")
    wait_for(lambda: time.monotonic() > due, "their time to be over: a child's are looked at when the child is free")
    release()
    assert patient.get(**GET) == "patient"
    wait_for(lambda: all(result.state == "REVOKED" for result in late), "REVOKED")
    settled()
    assert lines(ran) == ["patient"]


def test_time_limits_of_a_call(worker, send, kind):
    hard = send("naps", 60, time_limit=0.5)
    soft = send("naps", 60, soft_time_limit=0.3)
    caught = send("naps", 60, True, soft_time_limit=0.3)
    both = send("naps", 60, True, soft_time_limit=0.3, time_limit=30)
    enough = send("naps", 0, time_limit=30, soft_time_limit=20)
    assert failure(hard)[:2] == ("TimeLimitExceeded", [0.5])
    name, arguments, traceback = failure(soft)
    assert (name, arguments) == ("SoftTimeLimitExceeded", []) and "time.sleep(seconds)" in traceback
    assert [each.get(**GET) for each in (caught, both, enough)] == ["caught", "caught", "slept"]
    for result, text in ((hard, "Hard time limit (0.5s)"), (soft, "Soft time limit (0.3s)")):
        worker.says(f"{text} exceeded for {kind}.naps[{result.id}]")


def test_time_limits_count_from_the_bodys_start(worker, send, held):
    release = held()
    waiting = [send("naps", 0, time_limit=0.5), send("naps", 0, soft_time_limit=0.5)]
    for result in waiting:
        worker.says(f"[{result.id}] received")
    due = time.monotonic() + 0.5
    wait_for(lambda: time.monotonic() > due, "their limits to be over, had they counted while they waited")
    release()
    assert [result.get(**GET) for result in waiting] == ["slept", "slept"]


def test_priorities_in_the_broker(app, send, tmp_path):
    """Redis: 0 goes first. The queue is not consumed while they are sent."""
    order = tmp_path / "order"
    assert app.control.cancel_consumer(OTHER_QUEUE, reply=True, timeout=10, limit=1)
    results = [send("notes", p, str(order), queue=OTHER_QUEUE, priority=p) for p in (9, 9, 6, 3, 3, 0)]
    assert app.control.add_consumer(OTHER_QUEUE, reply=True, timeout=10, limit=1)
    assert [result.get(**GET) for result in results] == [9, 9, 6, 3, 3, 0]
    assert lines(order) == ["0", "3", "3", "6", "9", "9"]


def test_priority_is_inherited_where_the_app_says_so(app, kind):
    chain = app.signature(f"{kind}.same", (1,), options={"priority": 4}) | app.signature(f"{kind}.request_of")
    assert chain.apply_async().get(**GET)["delivery_info"]["priority"] == 4


def test_priorities_among_those_that_wait_for_a_gpu(app, tmp_path):
    gate, started, order = tmp_path / "gate", tmp_path / "started", tmp_path / "order"
    app.send_task("gpu.holds", (str(gate), str(started)))
    wait_for(started.exists, "the body to run")
    results = [app.send_task("gpu.notes", (p, str(order)), priority=p) for p in (9, 6, 3, 0) * 2]
    last = app.send_task("cpu.same", ("taken",), priority=9)
    assert last.get(**GET) == "taken"
    wait_for(lambda: promise.gpu_stats(app)["in_flight"] == 9, "all to wait in the driver")
    gate.touch()
    for result in results:
        result.get(**GET)
    assert lines(order)[-7:] == sorted(lines(order)[-7:]) and len(lines(order)) == 8, "one may be at the actor already"


def test_queues_and_routing(send, kind):
    routed = {
        "default": (send("request_of"), QUEUE),
        "queue": (send("request_of", queue=OTHER_QUEUE), OTHER_QUEUE),
        "queue and routing key": (send("request_of", queue=OTHER_QUEUE, routing_key=OTHER_QUEUE), OTHER_QUEUE),
    }
    for how, (result, queue) in routed.items():
        info = result.get(**GET)["delivery_info"]
        assert (info["exchange"], info["routing_key"], info["redelivered"]) == ("", queue, False), how


def test_a_shadow_is_the_name_in_logs(worker, send):
    result = send("add", 1, shadow="a name for people")
    assert result.get(**GET) == 11
    for text in ("received", "succeeded in"):
        worker.says(f"Task a name for people[{result.id}] {text}")


def test_the_whole_request(app, redis_server):
    """`self.request` in the body, all of it: the same for both kinds, and what the caller has asked for."""
    when, later = now() - datetime.timedelta(seconds=1), now() + datetime.timedelta(hours=1)

    def seen(kind, **options):
        def signature(name, **kwargs):
            return app.signature(f"{kind}.{name}", kwargs=kwargs)

        result = app.send_task(
            f"{kind}.request_of", (1, "two"), {"three": [3]}, link=signature("same"), headers={"colour": "red"},
            link_error=[signature("old_errback", path="x")], priority=4, eta=when, expires=later, time_limit=50,
            soft_time_limit=40, shadow="shadow", reply_to="somebody", argsrepr="(secret)", kwargsrepr="{hidden}",
            stamped_headers=["team"], team="vision", root_id="a root", parent_id="a parent", **options,
        )  # fmt: skip
        request = result.get(**GET)
        assert request["id"] == request["correlation_id"] == result.id
        return request

    gpu, cpu = seen("gpu"), seen("cpu")
    own = ("id", "correlation_id", "properties", "pid")
    masked = [
        json.dumps({key: value for key, value in each.items() if key not in own}, sort_keys=True)
        .replace(f"{kind}.", "KIND.").replace(each["id"], "ID")
        for kind, each in (("gpu", gpu), ("cpu", cpu))
    ]  # fmt: skip
    assert json.loads(masked[0]) == json.loads(masked[1])
    assert set(gpu) == set(cpu) and set(gpu["properties"]) == set(cpu["properties"])
    expected = {
        "task": "gpu.request_of", "args": [1, "two"], "kwargs": {"three": [3]}, "eta": when.isoformat(),
        "expires": later.isoformat(), "timelimit": [50, 40], "shadow": "shadow", "reply_to": "somebody", "retries": 0,
        "argsrepr": "(secret)", "kwargsrepr": "{hidden}", "root_id": "a root", "parent_id": "a parent",
        "called_directly": False, "is_eager": False, "stamped_headers": ["team"], "group": None, "chord": None,
    }  # fmt: skip
    assert {key: gpu[key] for key in expected} == expected
    assert gpu["headers"]["colour"] == "red" and gpu["delivery_info"]["priority"] == 4
    assert gpu["callbacks"][0]["task"] == "gpu.same" and gpu["errbacks"][0]["task"] == "gpu.old_errback"
    simple = app.send_task("gpu.request_of").get(**GET)
    assert simple["root_id"] == simple["id"] and simple["parent_id"] is None
    assert (simple["args"], simple["kwargs"], simple["timelimit"]) == ([], {}, [None, None])


# ---- options of a task


def test_a_rate_limit_spreads_tasks(send):
    """60 a minute: the third not before two seconds after the first; others are not held up."""
    results = [send("rated") for _ in range(3)]
    assert send("same", "at once").get(**GET) == "at once"
    assert not results[2].ready()
    first, second, third = sorted(result.get(**GET) for result in results)
    assert third - first >= 1.8 and second - first >= 0.8


def test_the_serializer_of_a_task(tasks, kind):
    assert tasks[f"{kind}.as_yaml"].delay({3, 1}).get(**GET) == ["set", [1, 3]]


def test_handlers_of_a_task_class_are_called_once_with_its_arguments(app, send, kind, tmp_path):
    """Not where a GPU body runs: in the driver, or in the worker for a hard limit."""
    stories = {
        "succeeds": ["before_start", "body", "on_success", "after_return"],
        "fails": ["before_start", "body", "on_failure", "after_return"],
        "retries": ["before_start", "body", "on_retry", "before_start", "body", "on_success", "after_return"],
        "before": ["before_start", "on_failure", "after_return"],
        "broken": ["before_start", "body", "on_success", "after_return"],
        "too long": ["before_start", "body", "on_failure", "after_return"],
    }
    sent = {
        how: send(
            "hooked", str(tmp_path / how), how, kwargs={"extra": 1}, time_limit=0.5 if how == "too long" else None
        )
        for how in stories
    }
    states = {}
    for how, result in sent.items():
        result.get(propagate=False, **GET)
        states[how] = result.state
        wait_for(lambda how=how: len(lines(tmp_path / how)) >= len(stories[how]), f"all handlers of {how}")
    last = send("same", "last")
    assert last.get(**GET) == "last"
    assert states == {
        "succeeds": "SUCCESS", "fails": "FAILURE", "retries": "SUCCESS", "before": "FAILURE", "broken": "SUCCESS",
        "too long": "FAILURE",
    }  # fmt: skip
    for how, hooks in stories.items():
        rows = [json.loads(line) for line in lines(tmp_path / how)]
        if (kind, how) != ("cpu", "too long"):  # prefork itself may tell it twice
            assert [row[0] for row in rows] == hooks, how
        call = [sent[how].id, [str(tmp_path / how), how], {"extra": 1}]
        assert all(row[2] == sent[how].id or how == "too long" for row in rows), "self.request in the handlers"
        for row in rows:
            pids = {row[1]} & {each[1] for each in rows if each[0] == "body"}
            match row[0], row[3:]:
                case "before_start", said:
                    assert said == call
                case "on_success", [value, *said]:
                    assert said == call and value == "red", "set by before_start"
                case "on_failure", [error, *said]:
                    assert said[:3] == call and error.startswith(
                        {"fails": "PromiseError('body'", "before": "PromiseError('before'"}.get(
                            how, "TimeLimitExceeded"
                        )
                    )
                case "on_retry", [error, *said]:
                    assert said == [*call, True] and error.startswith("PromiseError('again'")
                case "after_return", [status, _, *said]:
                    assert said == [*call, None] and status in ("SUCCESS", "FAILURE", "RETRY")
            assert row[0] == "body" or not pids or kind == "cpu", "handlers must not run on the GPU node"
    assert sent["succeeds"].get(**GET) == "red"


def test_call_of_a_task_class_surrounds_the_body_and_its_instance_stays(send):
    first, second = [send("called", "x") for _ in range(2)]
    (around, task_id, (value, here, there, _)) = first.get(**GET)
    assert (around, task_id, value) == ("around", first.id, "x") and here == there
    (_, task_id, (_, again, _, runs)) = second.get(**GET)
    assert (again, task_id) == (here, second.id) and runs >= 2, "one instance per process"


def test_a_request_class_of_its_own(worker, send, kind, tmp_path):
    """Celery's documented hook into the worker: called there, in this order, for each event of a task."""
    stories = {
        "succeeds": ["accepted"],
        "fails": ["accepted", "failure PromiseError"],
        "retries": ["accepted", "failure Retry", "retry", "accepted"],
        "too long": ["accepted", "soft 0.3", "failure SoftTimeLimitExceeded"],
        "far too long": ["accepted", "hard 0.5"],
    }
    limits = {"too long": {"soft_time_limit": 0.3}, "far too long": {"time_limit": 0.5}}
    for how in stories:
        send("requested", str(tmp_path / how), how.removeprefix("far "), **limits.get(how, {}))
    for how, story in stories.items():
        wait_for(lambda how=how: len(lines(tmp_path / how)) >= len(stories[how]), f"all that is told of {how}")
        told = [line.rpartition(" ") for line in lines(tmp_path / how)]
        texts = [text for text, _, _ in told]
        if (kind, how) == ("cpu", "far too long"):  # prefork tells it by timer and by dead child, in either order
            wait_for(lambda how=how: "hard 0.5" in (tmp_path / how).read_text(), "the hard limit")
        else:
            assert texts == story, how
        assert {pid for _, _, pid in told} == {str(worker.pid)}, "in the worker"


def test_a_bodys_log_lines_name_their_task(worker, send, kind):
    result = send("logs", "a line of its own")
    assert result.get(**GET) == [result.id, f"{kind}.logs", result.id], "current_task is the task"
    worker.says(f"{kind}.logs[{result.id}]: a line of its own")


# ---- ways to write a task


def test_tasks_written_in_other_ways(send, kind):
    """As a class registered by hand, under a decorator of the user's own, shared, with every kind of parameter."""
    assert send("class_based", 0).get(**GET) == ["made once", 0, f"{kind}.class_based", "!"]
    assert send("class_based", 2, kwargs={"suffix": "?"}).get(**GET) == ["made once", 2, f"{kind}.class_based", "?"]
    assert failure(send("class_based", 9))[:2] == ("PromiseError", [2, "because"])
    assert send("decorated", "ab").get(**GET) == "abab!"
    assert send("decorated", "ab", kwargs={"times": 1}).get(**GET) == "ab!"
    assert send("shared", 1).get(**GET) == [f"{kind}.shared", 1, [], "keyword", {}]
    assert send("shared", 1, 2, 3, kwargs={"by": 4, "x": 5}).get(**GET) == [f"{kind}.shared", 1, [2, 3], 4, {"x": 5}]


def test_celerys_pydantic_options(send):
    assert send("orders", {"count": 1}).get(**GET) == {"count": 1}, "dumped without what is None"
    assert send("orders", {"count": 1}, kwargs={"other": {"count": 2}}).get(**GET) == {"count": 3, "note": "Order"}
    assert send("strictly", {"count": 4}).get(**GET) == 4
    for result, text in (
        (send("orders", {"count": 6}), "more than 5"), (send("strictly", {"count": "4"}), "valid integer"),
        (send("orders", {"count": "x"}), "valid integer"),
    ):  # fmt: skip
        _, _, traceback = failure(result)  # JSON cannot rebuild pydantic's own error
        assert text in traceback and "ValidationError" in traceback
