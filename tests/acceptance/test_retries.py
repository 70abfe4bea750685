"""Retries and replacements: `self.retry`, `autoretry_for` and `self.replace` do the same for both kinds of task."""

import datetime
import json

import pytest
from celery import chain, chord, group

from tests.apps.promise import KINDS, OTHER_QUEUE, QUEUE
from tests.support import promise
from tests.support.promise import GET, failure
from tests.support.services import wait_for


@pytest.fixture(scope="module")
def worker(environment, redis_server, tmp_path_factory):
    with promise.serving(environment, tmp_path_factory.mktemp("retries"), {"result_extended": True}) as worker:
        yield worker
    assert promise.left(redis_server) == (0, 0)


@pytest.fixture(scope="module")
def app(redis_server, worker):
    with promise.producer(redis_server) as app:
        yield app


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def s(app, kind):
    """``s("add", 1, b=2)``: a signature of the kind in hand."""

    def make(name, *args, **kwargs):
        return app.signature(f"{kind}.{name}", args, kwargs)

    return make


@pytest.fixture
def parked(redis_server):
    """Wait for so many messages in the queue nobody consumes, and take them."""
    found = []

    def read(count=1):
        found[:] = []
        wait_for(lambda: found.extend(promise.parked(redis_server)) or len(found) >= count, "a message to be parked")
        return found

    yield read
    assert promise.parked(redis_server) == [], "sent once"


@pytest.fixture
def settled(redis_server):
    return lambda: wait_for(lambda: promise.left(redis_server) == (0, 0), "all messages to be acknowledged")


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


# ---- self.retry


def test_retry_runs_the_task_again_as_it_says(s, tmp_path):
    """(runs, second call: retries, value, queue, has an eta); the value is given as keyword and by position."""
    expected = {
        "plain": (1, QUEUE, False), "countdown": (1, QUEUE, True), "eta": (1, QUEUE, True),
        "queue": (1, OTHER_QUEUE, False), "args": (5, QUEUE, False), "kwargs": (6, QUEUE, False),
        "both": (9, QUEUE, False), "unpicklable": (1, QUEUE, False),
    }  # fmt: skip
    sent = {}
    for how in expected:
        for form in ("keyword", "position"):
            path = tmp_path / f"{how}-{form}"
            signature = s("again", str(path), how, value=1) if form == "keyword" else s("again", str(path), how, 1)
            sent[how, form] = path, signature.apply_async()
    for (how, form), (path, result) in sent.items():
        value, queue, has_eta = expected[how]
        assert result.get(**GET) == [1, value, queue, has_eta], (how, form)
        assert lines(path) == ["0 1", f"1 {value}"], (how, form)


def test_the_retry_state_and_what_is_stored_with_it(s, kind, redis_server, parked, settled, tmp_path):
    result = s("again", str(tmp_path / "runs"), "parked with error").apply_async()
    wait_for(lambda: result.state == "RETRY", "RETRY")
    settled()
    stored = promise.meta(redis_server, result.id)
    assert stored["result"] == {
        "exc_type": "PromiseError",
        "exc_message": [8, "because"],
        "exc_module": "tests.apps.promise",
    }
    assert (stored["name"], stored["retries"], stored["date_done"]) == (f"{kind}.again", 0, None)
    assert "promise.py" in stored["traceback"] and "self.retry(**options[how])" in stored["traceback"]
    assert not result.ready()
    (message,) = parked()
    assert (message["id"], message["retries"], message["task"]) == (result.id, 1, f"{kind}.again")


def test_retry_without_throwing_goes_on(s, redis_server, parked, tmp_path):
    result = s("again", str(tmp_path / "runs"), "not thrown").apply_async()
    assert result.get(**GET) == ["went on", True] and result.state == "SUCCESS"
    assert [(each["id"], each["retries"]) for each in parked()] == [(result.id, 1)]
    swallowed = s("again", str(tmp_path / "runs"), "swallowed").apply_async()
    assert swallowed.get(**GET) == "swallowed"
    assert [(each["id"], each["retries"]) for each in parked()] == [(swallowed.id, 1)]


def test_a_retry_raised_by_hand_is_a_state_and_nothing_more(s, redis_server, settled, tmp_path):
    result = s("again", str(tmp_path / "runs"), "by hand").apply_async()
    wait_for(lambda: result.state == "RETRY", "RETRY")
    settled()
    assert promise.meta(redis_server, result.id)["result"]["exc_message"] == [7, "because"]
    assert lines(tmp_path / "runs") == ["0 0"]


def test_all_that_was_asked_of_a_task_holds_for_its_retry(app, parked, tmp_path):
    """The message of the retry is that of the first run, for both kinds alike."""

    def masked(kind, message):
        text = json.dumps(message, sort_keys=True)
        for own in (message["id"], f"{kind}.", message["expires"]):
            text = text.replace(own, "masked")
        return json.loads(text)

    def sent(kind):
        def s(name, **kwargs):
            return app.signature(f"{kind}.{name}", kwargs=kwargs)

        result = app.send_task(
            f"{kind}.again", (str(tmp_path / "runs"), "parked"), {"value": 3}, link=s("same"), priority=6,
            link_error=s("old_errback", path="errors"), chain=[s("same", value=9)], expires=3000, time_limit=50,
            soft_time_limit=40, shadow="a name for people", headers={"colour": "red"}, reply_to="somebody",
            argsrepr="(secret)", kwargsrepr="{hidden}", group_id="a group", group_index=2, stamped_headers=["team"],
            team="vision", root_id="a root", parent_id="a parent", replaced_task_nesting=1, ignore_result=False,
            serializer="json", compression=None,
        )  # fmt: skip
        wait_for(lambda: result.state == "RETRY", "RETRY")
        (message,) = parked()
        return message, masked(kind, message)

    (message, gpu), (_, cpu) = sent("gpu"), sent("cpu")
    assert gpu == cpu
    assert (message["retries"], message["priority"], message["timelimit"]) == (1, 6, [50, 40])
    assert (message["root_id"], message["parent_id"], message["group"], message["group_index"]) == (
        "a root", "a parent", "a group", 2,
    )  # fmt: skip
    assert message["stamps"] == {"team": "vision"} or message["stamps"] == {"team": ["vision"]}
    assert message["embed"]["callbacks"][0]["task"] == "gpu.same"
    assert message["embed"]["errbacks"][0]["task"] == "gpu.old_errback"
    assert message["embed"]["chain"][0]["kwargs"] == {"value": 9}
    assert (message["args"], message["kwargs"]) == ([str(tmp_path / "runs"), "parked"], {"value": 3})


def test_the_end_of_retries(s, kind, tmp_path):
    """Without `exc` MaxRetriesExceededError, else that; the body may catch it; the cause stays in the traceback."""
    expected = {
        "plain": ("MaxRetriesExceededError", None, 3),
        "exc": ("PromiseError", [2, "because"], 3),
        "same exc": ("KeyError", ["missing"], 3),
        "fewer": ("MaxRetriesExceededError", None, 2),
    }
    sent = {how: s("never", str(tmp_path / how), how).apply_async() for how in expected}
    caught = s("never", str(tmp_path / "caught"), how="caught").apply_async()
    for how, (name, arguments, runs) in expected.items():
        found, found_arguments, traceback = failure(sent[how])
        assert found == name and lines(tmp_path / how) == [str(number) for number in range(runs)]
        assert found_arguments == arguments or f"Can't retry {kind}.never[{sent[how].id}]" in found_arguments[0]
        assert "KeyError: 'missing'" in traceback and '{}["missing"]' in traceback, how
    assert caught.get(**GET) == ["gave up", f"Can't retry {kind}.never", [str(tmp_path / "caught")], {"how": "caught"}]
    assert s("endless", 6).apply_async().get(**GET) == 6


def test_an_early_acknowledged_task_retries_as_well(s, tmp_path):
    assert s("early", str(tmp_path / "runs")).apply_async().get(**GET) == 2
    assert lines(tmp_path / "runs") == ["0", "1", "2"]


def test_retries_within_workflows(app, s, tmp_path):
    """What waits for a task waits for its last run; callbacks run once."""
    linked, errors = tmp_path / "linked", tmp_path / "errors"
    first = s("retries", 2)
    first.link(s("notes", str(linked)))
    in_chain = (first | s("add", 10)).apply_async()
    in_chord = chord([s("retries", 1), s("same", 5), s("retries", 2)], app=app)(s("total"))
    failing = s("never", str(tmp_path / "runs")).apply_async(link_error=s("old_errback", str(errors)))
    failing_chord = chord([s("never", str(tmp_path / "others")), s("same", 1)], app=app)(s("total"))
    assert in_chain.get(**GET) == 12
    assert in_chord.get(**GET) == 8
    wait_for(failing_chord.ready, "the chord's end")
    assert type(failing_chord.result).__name__ == "ChordError"
    wait_for(lambda: lines(errors) and lines(linked), "callback and errback")
    assert failing.state == "FAILURE"
    assert lines(linked) == ["2"]
    assert s("same", 1).apply_async().get(**GET) == 1


# ---- autoretry_for


UNPICKLABLE = ["tests.apps.promise", "Unpicklable", ("odd",), "Unpicklable('odd')"]


def test_autoretry(s, tmp_path):
    """Listed errors are retried up to the limit, others and excepted ones are not; the last error is the outcome."""
    expected = {
        ("Temporary", 2): (3, 2), ("KeyError", 1): (2, 1), ("Unpicklable", 2): (3, 2),
        ("Temporary", 9): (3, ("Temporary", [2, "because"])), ("Permanent", 9): (1, ("Permanent", [0, "because"])),
        ("ValueError", 9): (1, ("ValueError", [0])),
        ("Unpicklable", 9): (3, ("UnpickleableExceptionWrapper", UNPICKLABLE)),
    }  # fmt: skip
    sent = {each: s("auto", str(tmp_path / f"{each}"), *each).apply_async() for each in expected}
    for each, (runs, outcome) in expected.items():
        result = sent[each]
        assert (failure(result)[:2] if isinstance(outcome, tuple) else result.get(**GET)) == outcome, each
        assert lines(tmp_path / f"{each}") == [str(number) for number in range(runs)], each


def test_autoretry_with_retry_kwargs_and_what_it_leaves_alone(s, settled, tmp_path):
    fails, ignores, retries = [tmp_path / name for name in ("fails", "ignores", "retries")]
    result = s("auto_once", str(fails)).apply_async()
    ignored = s("auto_once", str(ignores), "ignores").apply_async()
    retried = s("auto_once", str(retries), "retries").apply_async()
    soft = s("auto_soft").apply_async()
    assert failure(result)[:2] == ("PromiseError", [1, "because"]) and lines(fails) == ["0", "1"]
    assert soft.get(**GET) == 1
    assert failure(retried)[0] == "MaxRetriesExceededError"
    settled()
    assert lines(ignores) == ["0"] and ignored.state == "PENDING"
    assert lines(retries) == ["0", "1", "2", "3"]


def test_backoff(s, parked):
    """10 s, doubled each time, up to the maximum; with jitter anything up to that."""
    expected = {
        ("backs_off", 0): (10, 10), ("backs_off", 3): (80, 80), ("backs_off_at_most", 0): (10, 10),
        ("backs_off_at_most", 3): (15, 15), ("backs_off_by_chance", 3): (0, 8),
    }  # fmt: skip
    for (name, retries), (least, most) in expected.items():
        before = datetime.datetime.now(datetime.UTC)
        result = s(name).apply_async(retries=retries)
        (message,) = parked()
        eta = datetime.datetime.fromisoformat(message["eta"]) if message["eta"] else before  # chance may say 0 s
        latest = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=most)
        assert before + datetime.timedelta(seconds=least) <= eta <= latest, (name, retries)
        assert (message["retries"], message["id"]) == (retries + 1, result.id)
        wait_for(lambda result=result: result.state == "RETRY", "RETRY")


# ---- self.replace


def test_a_task_is_replaced_by_whatever_there_is(app, s, tmp_path):
    """By a task, a chain, a group, a chord, by what is replaced again; the id stays, and so does what was to follow."""
    adds = group([s("add", 1, 1), s("add", 2, 2)], app=app)
    by = {
        "task": (s("add", 1, 1), 2), "chain": (s("add", 1, 1) | s("add", 5), 7), "group": (adds, [2, 4]),
        "chord": (adds | s("total"), 6), "again": (s("replaces", s("replaces", s("same", "x"))), "x"),
        "chain of chords": (adds | s("total") | s("add", 1), 7), "retry": (s("retries", 1), 1),
    }  # fmt: skip
    alone, in_chain, linked = {}, {}, {}
    for name, (signature, _) in by.items():
        alone[name] = s("replaces", signature).apply_async()
        in_chain[name] = (s("same", "before") | s("replaces", signature) | s("same")).apply_async()
        linked[name] = tmp_path / name
        s("replaces", signature).apply_async(link=s("notes", str(linked[name])))
    in_group = group([s("replaces", signature) for signature, _ in by.values()], app=app).apply_async()
    for name, (_, value) in by.items():
        assert alone[name].get(**GET) == value, name
        assert in_chain[name].get(**GET) == value, name
        assert in_chain[name].parent.get(**GET) == value, name
        wait_for(lambda name=name: lines(linked[name]), f"the callback of {name}")
    assert in_group.get(**GET) == [value for _, value in by.values()]
    assert {name: lines(path) for name, path in linked.items()} == {
        name: [str(value)] for name, (_, value) in by.items()
    }  # fmt: skip


def test_what_replaces_a_task_fails_for_it(s, tmp_path):
    errors = tmp_path / "errors"
    result = s("replaces", s("fails", code=4)).apply_async(link_error=s("old_errback", str(errors)))
    in_chain = (s("replaces", s("fails", code=5)) | s("same")).apply_async()
    assert failure(result)[:2] == ("PromiseError", [4, "because"])
    assert failure(in_chain)[:2] == ("PromiseError", [5, "because"])
    wait_for(lambda: lines(errors), "the errback")
    assert lines(errors) == [result.id]


def test_family_and_stamps_of_a_replacement(s):
    family = s("replaces", s("family")).apply_async()
    assert family.get(**GET)[:3] == [family.id, family.id, family.id]
    in_chain = chain(s("same", 1), s("replaces", s("family"))).apply_async()
    assert in_chain.get(**GET)[0] == in_chain.id
    assert in_chain.get(**GET)[2] == in_chain.parent.id
    stamped = s("stamps")
    stamped.stamp(team="vision")
    assert s("replaces", stamped).apply_async().get(**GET) == [["team"], {"team": "vision"}]


def test_replace_ends_the_body_and_must_make_sense(s, tmp_path):
    noted = tmp_path / "noted"
    assert s("replaces_badly", str(noted)).apply_async().get(**GET) == "replaced"
    wait_for(lambda: lines(noted), "the end of the body")
    assert lines(noted) == ["finally"]
    name, arguments, _ = failure(s("replaces_badly", "").apply_async())
    assert (name, arguments) == ("ImproperlyConfigured", ["Cannot replace with an empty chain"])
