"""An event receiver sees of a GPU task what it sees of the same task on the CPU: each event once, with its fields."""

import threading

import pytest
from celery import Celery

from tests.support.services import Worker, wait_for

NAP_S = 0.3
#: What a monitor sees of each task, however it is run.
EXPECTED = {
    "nap": ["sent", "received", "started", "succeeded"],
    "fails": ["sent", "received", "started", "failed"],
    "retries": ["sent", "received", "started", "retried"] * 2 + ["sent", "received", "started", "succeeded"],
    "reports": ["sent", "received", "started", "progress", "succeeded"],
    "expires": ["sent", "revoked"],
    "never": ["sent", "revoked"],
    "revoked": ["sent", "received", "started", "revoked"],
}
#: Fields whose values differ from run to run.
OWN = {"timestamp", "local_received", "clock", "runtime", "traceback", "expires"}


class Events:
    """A receiver on a thread of its own, as in a monitor."""

    def __init__(self, app):
        self.seen = []
        self.state = app.events.State()
        self._connection = app.connection_for_read()
        self._receiver = app.events.Receiver(self._connection, handlers={"*": self._take})
        self._thread = threading.Thread(target=self._receiver.capture)
        self._thread.start()
        wait_for(lambda: self.seen, "the worker's answer to the receiver's start")

    def _take(self, event):
        self.seen.append(dict(event))
        self.state.event(event)

    def of(self, task_id):
        return [event for event in self.seen if event.get("uuid") == task_id]

    def close(self):
        self._receiver.should_stop = True
        self._thread.join()
        self._connection.release()


@pytest.fixture(scope="module")
def client(redis_server):
    app = Celery("client", broker=redis_server.url, backend=redis_server.url, set_as_current=False)
    app.conf.update(task_default_queue="twins", task_send_sent_event=True)
    yield app
    app.close()


@pytest.fixture(scope="module")
def may(redis_server):
    """``may("-publish")``: what the user may do on the broker that the worker comes as; results go by another one."""

    def change(*rules):
        redis_server.client.execute_command("ACL", "SETUSER", "twins", *rules)

    change("on", "nopass", "~*", "&*", "+@all")
    yield change
    redis_server.client.acl_deluser("twins")


@pytest.fixture(scope="module")
def events(client, environment, may, tmp_path_factory):
    options = ["-E", "-c", "2", "-n", "twins@%h"]
    env = {**environment, "CELERY_BROKER_URL": environment["CELERY_BROKER_URL"].replace("://", "://twins:x@")}
    worker = Worker(tmp_path_factory.mktemp("twins"), *options, app="tests.apps.twins:app", env=env)
    events = Events(client)
    yield events
    events.close()
    assert worker.stop() == 0, worker.output[-5000:]


@pytest.fixture(scope="module")
def histories(client, events, tmp_path_factory):
    """For each kind, the events of each task in the order they were received."""
    folder = tmp_path_factory.mktemp("gates")

    def revoked(kind):
        gate = folder / kind
        running = client.send_task(f"twins.{kind}.waits", [str(gate)])
        wait_for(lambda: "task-started" in types(events.of(running.id)), "the task to be started")
        client.control.revoke(running.id, terminate=True, signal="SIGTERM")
        return running

    def never(kind):
        client.control.revoke(f"never {kind}", reply=True, limit=1, timeout=20)
        return client.send_task(f"twins.{kind}.nap", [0], task_id=f"never {kind}")

    def sent(kind):
        yield "nap", client.send_task(f"twins.{kind}.nap", [NAP_S], {"label": "one"})
        yield "fails", client.send_task(f"twins.{kind}.fails", ["odd"])
        yield "retries", client.send_task(f"twins.{kind}.retries", [2])
        yield "reports", client.send_task(f"twins.{kind}.reports")
        yield "expires", client.send_task(f"twins.{kind}.nap", [0], expires=-1)
        yield "never", never(kind)
        yield "revoked", revoked(kind)

    found = {}
    for kind in ("cpu", "gpu"):
        results = dict(sent(kind))
        wait_for(lambda results=results: all(each.ready() for each in results.values()), "all tasks to end")
        last = client.send_task(f"twins.{kind}.nap", [0])  # once it is through, nothing of the others comes any more
        wait_for(lambda last=last: "task-succeeded" in types(events.of(last.id)), "the last task's events")
        found[kind] = {name: events.of(result.id) for name, result in results.items()}
    return found


def types(events):
    return [event["type"] for event in events]


def comparable(event, kind):
    """An event without what differs from run to run; names, ids and process ids become words."""
    words = {kind: "kind", event["uuid"]: "id", str(event["pid"]): "pid"}
    found = {}
    for field, value in event.items():
        text = repr(value)
        for own, word in words.items():
            text = text.replace(own, word)
        found[field] = "" if field in OWN else text
    return found


@pytest.mark.parametrize("name", EXPECTED)
def test_each_event_comes_once_and_says_the_same_of_both_kinds(histories, name):
    cpu, gpu = histories["cpu"][name], histories["gpu"][name]
    wanted = [f"task-{word}" for word in EXPECTED[name]]
    assert sorted(types(cpu)) == sorted(wanted), "what Celery does"
    assert sorted(types(gpu)) == sorted(wanted)
    order = {"key": lambda event: event["type"]}  # sorted() keeps events of one type in their order
    for one, other in zip(sorted(cpu, **order), sorted(gpu, **order), strict=True):
        assert comparable(other, "gpu") == comparable(one, "cpu")
        assert {field for field in OWN if one.get(field)} == {field for field in OWN if other.get(field)}


@pytest.mark.parametrize("name", ["nap", "fails", "retries", "revoked"])
def test_events_come_in_the_order_of_a_tasks_life(histories, name):
    """Those of one process; `task-sent` of a retry comes from another one."""
    seen = [kind for kind in types(histories["gpu"][name]) if kind != "task-sent"]
    wanted = [f"task-{word}" for word in EXPECTED[name] if word != "sent"]
    if name == "retries":  # the next attempt is received before or after the last one is reported as retried
        seen, wanted = [[kind for kind in each if kind != "task-received"] for each in (seen, wanted)]
    assert seen == wanted


def test_run_time_and_traceback_are_the_bodys(histories):
    times = {event["type"]: event for event in histories["gpu"]["nap"]}
    ended = times["task-succeeded"]
    assert NAP_S <= ended["runtime"] <= ended["timestamp"] - times["task-received"]["timestamp"]
    (failed,) = (event for event in histories["gpu"]["fails"] if event["type"] == "task-failed")
    assert "twins.py" in failed["traceback"] and "raise ValueError(reason)" in failed["traceback"]
    retried = [event["traceback"] for event in histories["gpu"]["retries"] if event["type"] == "task-retried"]
    assert len(retried) == 2 and all("raise self.retry(" in each for each in retried)


def test_a_monitors_state_knows_each_task_with_its_worker(events, histories):
    for name, state in {
        "nap": "SUCCESS", "fails": "FAILURE", "retries": "SUCCESS", "expires": "REVOKED", "revoked": "REVOKED",
    }.items():  # fmt: skip
        task_id = histories["gpu"][name][0]["uuid"]
        task = events.state.tasks[task_id]
        assert (task.state, task.worker.hostname.split("@")[0]) == (state, "twins")


def test_a_task_revoked_at_the_moment_of_its_start_is_announced_once(client, events, tmp_path):
    """The command may come between the driver's STARTED and the worker's notice of it."""

    def revoked_when_stored():
        running = client.send_task("twins.gpu.waits", [str(tmp_path / "never")])
        wait_for(lambda: running.state == "STARTED", "the state", every_s=0)
        client.control.revoke(running.id, terminate=True, signal="SIGTERM")
        wait_for(running.ready, "its end", every_s=0.01)
        return running.id

    sent = [revoked_when_stored() for _ in range(30)]
    last = client.send_task("twins.gpu.nap", [0])
    wait_for(lambda: "task-succeeded" in types(events.of(last.id)), "the last task's events")
    assert {types(events.of(task_id)).count("task-revoked") for task_id in sent} == {1}


def test_events_that_the_broker_refuses_cost_no_task(client, events, may):
    """They wait in the worker, as Celery has it, and are sent when they are taken again."""
    may("-publish")
    sent = [client.send_task(f"twins.{kind}.nap", [0]) for kind in ("gpu", "cpu") for _ in range(5)]
    failed = client.send_task("twins.gpu.fails", ["odd"])
    assert [type(result.get(timeout=60)) for result in sent] == [list] * 10
    assert type(failed.get(timeout=60, propagate=False)) is ValueError
    assert not [event for event in events.of(failed.id) if event["type"] != "task-sent"]
    may("+publish")
    last = client.send_task("twins.gpu.nap", [0])
    assert type(last.get(timeout=60)) is list
    wait_for(lambda: "task-succeeded" in types(events.of(last.id)), "the last task's events")
    wanted = ["task-received", "task-sent", "task-started", "task-succeeded"]
    assert [sorted(types(events.of(result.id))) for result in sent] == [wanted] * 10
    assert sorted(types(events.of(failed.id))) == ["task-failed", *wanted[:3]]
