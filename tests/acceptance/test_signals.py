"""Celery's signals: each once per event, in the process it belongs to, with the same arguments for GPU and CPU tasks.

One worker does everything once, with GPU tasks and with CPU tasks; its processes note each signal in a file. What
happens in a prefork child for a CPU task happens in the driver for a GPU task, and never in an executor.
"""

import json
from collections import Counter

import celery.signals
import pytest
from kombu import Producer

from tests.apps.promise import KINDS, QUEUE
from tests.support import promise
from tests.support.promise import GET
from tests.support.services import wait_for

CHILDREN = 2


class Story:
    """What was sent, and every signal that was noted."""

    def __init__(self, worker, file):
        self.worker, self.file = worker, file
        self.ids = {}  # (kind, event) -> task id
        self.published = []  # signals in this process, the producer
        self.gpu = {}
        self.exit_code = None

    @property
    def rows(self):
        return [json.loads(line) for line in self.file.read_text().splitlines()]

    def of(self, kind, event):
        """The signals of one task, in the worker's processes."""
        return [row for row in self.rows if row["id"] == self.ids[kind, event]]

    def role(self, row):
        if row["pid"] in (self.worker.pid, self.gpu["driver"]):
            return "main" if row["pid"] == self.worker.pid else "driver"
        children = {each["pid"] for each in self.rows if each["signal"] == "worker_process_init"}
        return "child" if row["pid"] in children else "executor"


def tell(story, app, tmp_path):
    """Let each event happen once for each kind of task, and wait for its last signal."""

    def send(kind, event, name, *args, **options):
        task_id = story.ids[kind, event] = options.pop("task_id", None) or promise.new_id()
        return app.send_task(f"{kind}.{name}", args, task_id=task_id, **options)

    def seen(kind, event, *names):
        def all_there():
            return not set(names) - {row["signal"] for row in story.of(kind, event)}

        wait_for(all_there, f"{names} of {kind} {event}, seen: {[row['signal'] for row in story.of(kind, event)]}")

    def active(task_id):
        (tasks,) = app.control.inspect(destination=[promise.NAME], timeout=20).active().values()
        return any(each["id"] == task_id for each in tasks) and (tmp_path / f"{kind}-started").exists()

    story.gpu = promise.gpu_stats(app)
    for kind in KINDS:
        send(kind, "success", "add", 1, kwargs={"b": 2})
        send(kind, "failure", "fails", kwargs={"code": 3})
        send(kind, "ignore", "ignores")
        send(kind, "reject", "rejects")
        send(kind, "typed", "typed", "x")
        send(kind, "broken hook", "broken_hook")
        send(kind, "too long", "too_long")
        send(kind, "expired", "add", 1, expires=-5)
        send(kind, "unknown", "nowhere")
        again = send(kind, "retry", "retries", 1)
        send(kind, "later", "add", 1, countdown=0.2)
        gate, started = tmp_path / f"{kind}-gate", tmp_path / f"{kind}-started"
        send(kind, "terminated", "holds", str(gate), str(started))
        wait_for(lambda kind=kind: active(story.ids[kind, "terminated"]), "the body to run, and the worker to know it")
        app.control.revoke(story.ids[kind, "terminated"], terminate=True)
        revoked = story.ids[kind, "revoked"] = promise.new_id()
        app.control.broadcast("revoke", arguments={"task_id": revoked}, reply=True, timeout=10, limit=1)
        send(kind, "revoked", "add", 1, task_id=revoked)
        seen(kind, "success", "task_postrun")
        seen(kind, "failure", "task_postrun")
        seen(kind, "ignore", "task_postrun")
        seen(kind, "reject", "task_postrun", "task_failure")
        seen(kind, "typed", "task_postrun")
        seen(kind, "broken hook", "task_internal_error", "task_failure")
        seen(kind, "too long", "task_postrun", "task_failure")
        for event in ("expired", "terminated", "revoked"):
            seen(kind, event, "task_revoked")
        seen(kind, "terminated", "task_postrun")
        seen(kind, "unknown", "task_unknown")
        assert again.get(**GET) == 1
        seen(kind, "retry", "task_success", "task_postrun")
        seen(kind, "later", "task_postrun")
    with app.connection_for_write() as connection:
        Producer(connection).publish({"no": "task"}, routing_key=QUEUE, exchange="")
    wait_for(lambda: any(row["signal"] == "task_rejected" for row in story.rows), "task_rejected")
    for kind in KINDS:
        send(kind, "last", "add", 1)
        seen(kind, "last", "task_postrun")


@pytest.fixture(scope="module")
def story(environment, redis_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    file = folder / "signals"
    serving = promise.serving(environment, folder, children=CHILDREN, CELERY_PROMISE_SIGNALS=str(file))
    with serving as worker, promise.producer(redis_server) as app:
        story = Story(worker, file)

        def published(signal=None, headers=None, **said):
            story.published.append((signal.name, headers["id"], sorted(said)))

        both = (celery.signals.before_task_publish, celery.signals.after_task_publish)
        for signal in both:
            signal.connect(published, weak=False)
        try:
            tell(story, app, folder)
        finally:
            for signal in both:
                signal.disconnect(published)
        assert promise.left(redis_server) == (0, 0)
    return story


MAIN, BODY = "main", "body's"
RUN = [("task_received", MAIN), ("task_prerun", BODY), ("task_postrun", BODY)]
PUBLISHED = [("before_task_publish", BODY), ("after_task_publish", BODY)]
EVENTS = {
    "success": [*RUN, ("task_success", BODY)],
    "later": [*RUN, ("task_success", BODY)],
    "failure": [*RUN, ("task_failure", BODY)],
    "retry": [*RUN, *RUN, *PUBLISHED, ("task_retry", BODY), ("task_success", BODY)],
    "ignore": RUN,
    "reject": [*RUN, ("task_failure", MAIN)],
    "broken hook": [*RUN, ("task_internal_error", BODY), ("task_failure", MAIN)],
    "too long": [*RUN, ("task_failure", MAIN)],
    "terminated": [*RUN, ("task_revoked", MAIN)],
    "expired": [("task_revoked", MAIN)],
    "revoked": [("task_revoked", MAIN)],
    "unknown": [("task_unknown", MAIN)],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("event", EVENTS)
def test_each_signal_fires_once_and_in_its_process(story, kind, event):
    body = {"gpu": "driver", "cpu": "child"}[kind]
    expected = Counter((name, body if where == BODY else where) for name, where in EVENTS[event])
    seen = Counter((row["signal"], story.role(row)) for row in story.of(kind, event))
    if (kind, event) == ("cpu", "too long"):  # prefork itself may tell it twice: timer and dead child
        seen["task_failure", "main"] = min(seen["task_failure", "main"], 1)
    assert seen == expected


@pytest.mark.parametrize("event", EVENTS)
def test_signals_say_the_same_of_both_kinds(story, event):
    def said(kind):
        found = set()
        for row in story.of(kind, event):
            values = {key: row["said"][key].replace(f"{kind}-", "") for key in SAME if key in row["said"]}
            sender = f"<@task: {kind}." in row["said"]["sender"] or row["said"]["sender"] == f"'{kind}.retries'"
            found.add((row["signal"], tuple(row["keys"]), tuple(sorted(values.items())), sender))
        return found

    assert said("gpu") == said("cpu")


SAME = ("args", "kwargs", "retval", "state", "result", "exception", "reason", "terminated", "signum", "expired")


@pytest.mark.parametrize("kind", KINDS)
def test_what_signals_say(story, kind):
    """The arguments that Celery documents, with the values a receiver acts on."""

    def row(event, signal):
        return next(row["said"] for row in story.of(kind, event) if row["signal"] == signal)

    prerun, postrun = row("success", "task_prerun"), row("success", "task_postrun")
    assert (prerun["args"], prerun["kwargs"]) == (postrun["args"], postrun["kwargs"]) == ("[1]", "{'b': 2}")
    assert (postrun["retval"], postrun["state"]) == ("3", "'SUCCESS'")
    assert f"<@task: {kind}.add of promise" in prerun["sender"] and prerun["task"] == prerun["sender"]
    assert row("success", "task_success")["result"] == "3"
    assert float(row("success", "task_success")["runtime"]) > 0
    assert row("failure", "task_failure")["exception"] == "PromiseError(3, 'because')"
    assert row("failure", "task_postrun")["state"] == "'FAILURE'"
    assert "PromiseError(0, 'because')" in row("retry", "task_retry")["reason"]
    assert row("too long", "task_failure")["exception"] == "TimeLimitExceeded(0.5)"
    assert row("broken hook", "task_internal_error")["exception"] == "RuntimeError('the hook itself is broken')"
    assert row("terminated", "task_revoked")["terminated"] == "True"
    assert "15" in row("terminated", "task_revoked")["signum"]
    assert row("expired", "task_revoked")["expired"] == "True"
    assert (row("revoked", "task_revoked")["terminated"], row("revoked", "task_revoked")["expired"]) == ("False",) * 2
    assert row("unknown", "task_unknown")["name"] == f"'{kind}.nowhere'"
    for signal in {each["signal"] for each in story.rows}:
        documented = getattr(celery.signals, signal).providing_args
        assert all(documented <= set(each["keys"]) for each in story.rows if each["signal"] == signal), signal


def test_a_payload_that_does_not_fit_is_a_failure_like_any_other(story):
    seen = Counter((row["signal"], story.role(row)) for row in story.of("gpu", "typed"))
    assert seen == Counter((name, "main" if where == MAIN else "driver") for name, where in EVENTS["failure"])
    failure = next(row["said"] for row in story.of("gpu", "typed") if row["signal"] == "task_failure")
    assert failure["exception"].startswith("PayloadInvalid('gpu.typed'") and failure["args"] == "['x']"


def test_a_message_that_is_no_task_is_rejected(story):
    rejected = [row for row in story.rows if row["signal"] == "task_rejected"]
    assert [(story.role(row), row["keys"]) for row in rejected] == [("main", ["exc", "message", "sender"])]


def test_publishing_signals_fire_in_the_producer(story):
    sent = Counter((name, task_id) for name, task_id, _ in story.published)
    assert sent == Counter(
        (name, task_id) for task_id in story.ids.values() for name in ("before_task_publish", "after_task_publish")
    )


def test_signals_of_the_worker_and_its_processes(story):
    """Once each in the worker; at start and end of each process of its pool, which the driver is one of."""
    rows = [(row["signal"], story.role(row)) for row in story.rows if row["id"] is None]
    started = ("celeryd_init", "worker_init", "celeryd_after_setup", "worker_ready")
    once = (*started, "worker_shutting_down", "worker_shutdown")
    assert {name: rows.count((name, "main")) for name in once} == dict.fromkeys(once, 1)
    assert rows.count(("worker_process_init", "driver")) == rows.count(("worker_process_shutdown", "driver")) == 1
    children = rows.count(("worker_process_init", "child"))
    assert children >= CHILDREN
    assert rows.count(("worker_before_create_process", "main")) == children + 1
    assert not any(role == "executor" for _, role in rows)
    assert [name for name, role in rows if role == "main" and name in once] == list(once), "in this order"


def test_an_executor_fires_no_signal(story):
    assert {story.role(row) for row in story.rows} == {"main", "driver", "child"}
