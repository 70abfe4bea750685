"""Worker and producer of the tests that compare a GPU task with the same CPU task (`tests.apps.promise`)."""

import base64
import contextlib
import json
import socket
import uuid

import pytest
from celery import Celery

from tests.apps.promise import OTHER_QUEUE, PARKED, QUEUE
from tests.support.services import Worker, inspected, wait_for

GET = {"timeout": 60}
NAME = f"promise@{socket.gethostname()}"


@contextlib.contextmanager
def serving(environment, folder, conf=None, children=2, **variables):
    """A worker on the promise app; it must survive every test, and leave nothing in the broker."""
    env = {**environment, "CELERY_PROMISE": json.dumps(conf or {}), **variables}
    options = ("-c", str(children), "-n", "promise@%h", "-Q", f"{QUEUE},{OTHER_QUEUE}")
    worker = Worker(folder, *options, app="tests.apps.promise:app", env=env)
    try:
        yield worker
        assert worker.popen.poll() is None, f"the worker ended ({worker.popen.returncode}):\n{worker.output[-5000:]}"
        assert worker.stop() == 0, worker.output[-5000:]
    finally:
        worker.kill_group()


@contextlib.contextmanager
def producer(redis_server, **conf):
    """A Celery client that knows task names and the queue, and nothing else."""
    with Celery("producer", broker=redis_server.url, backend=redis_server.url, set_as_current=False) as app:
        app.conf.update(task_default_queue=QUEUE, **conf)
        yield app
        forget_results(app)


def forget_results(app):
    """Results that are collected late must not look for a Redis that is gone."""
    app.backend.result_consumer.stop()
    app.backend.result_consumer.subscribed_to.clear()


def left(redis_server):
    """Messages waiting, of any priority, and messages taken but not acknowledged.

    What another module's worker held when it was killed is not counted.
    """
    client = redis_server.client
    keys = [QUEUE, *client.keys(f"{QUEUE}\x06*")]
    tags = client.zrange("unacked_index", 0, -1)
    taken = [text for text in (client.hmget("unacked", tags) if tags else []) if text is None or _is_ours(text)]
    return sum(client.llen(key) for key in keys), len(taken)


def _is_ours(text):
    _, exchange, routing_key = json.loads(text)
    return {exchange, routing_key} & {QUEUE, OTHER_QUEUE, PARKED} != set()


def parked(redis_server):
    """Messages in the queue nobody consumes, taken out: headers with `args`, `kwargs`, `embed` and `priority`."""
    found = []
    while keys := redis_server.client.keys(f"{PARKED}*"):
        message = json.loads(redis_server.client.rpop(keys[0]))
        args, kwargs, embed = json.loads(base64.b64decode(message["body"]))
        priority = message["properties"]["priority"]
        found.append({**message["headers"], "args": args, "kwargs": kwargs, "embed": embed, "priority": priority})
    return found


def meta(redis_server, task_id):
    """What Celery has stored about a task, or None."""
    found = redis_server.client.get(f"celery-task-meta-{task_id}")
    return json.loads(found) if found else None


def gpu_stats(app):
    """The [gpu] part of `inspect stats`, read now."""
    return inspected(app, NAME, "stats")["pool"]["gpu"]


def failure(result):
    """(class name, arguments, traceback) of a failed task, as a producer without the app's code sees it."""
    with pytest.raises(Exception) as caught:
        result.get(**GET)
    wait_for(lambda: result.state == "FAILURE", "the state")  # `get` raises a parent's error as soon as that has failed
    return type(caught.value).__name__, list(caught.value.args), result.traceback or ""


def new_id():
    return str(uuid.uuid4())
