"""An app that uses what Celery lets an app change of itself; every body as GPU task ``gpu.NAME`` and as ``cpu.NAME``.

Settings come from the environment as JSON, effects go to files in the folder CELERY_COMPAT_FOLDER.
"""

import json
import logging
import os
import time
from pathlib import Path

from celery import Task, bootsteps, signals
from celery.contrib import rdb
from celery.result import allow_join_result
from celery.utils.log import get_task_logger
from celery.worker.autoscale import Autoscaler
from celery.worker.consumer import Consumer
from celery.worker.control import control_command, inspect_command
from celery.worker.request import Request
from click import Option
from kombu import Exchange, Queue

from tests.apps.base import App

KINDS = ("gpu", "cpu")
MAIN, IMAGES, EXCLUDED = "compat", "compat.images", "compat.excluded"
FOLDER = Path(os.environ.get("CELERY_COMPAT_FOLDER", "."))


def note(name, *words):
    with open(FOLDER / name, "a") as file:
        print(*words, file=file)


class Base(Task):
    """The app's own base class of all tasks."""

    tag = "base"
    Request = "tests.apps.compat:NotingRequest"

    def on_success(self, retval, task_id, args, kwargs):
        if self.request.get("left"):
            note("left", task_id, self.request.left)


def failed(self, exc, task_id, args, kwargs, einfo):
    """An annotation: a handler for every task of the app."""
    note("failed", task_id, type(exc).__name__, os.getpid())


class Route:
    """A router, as a class."""

    def route_for_task(self, task, args=None, kwargs=None):
        return {"queue": IMAGES, "routing_key": "image.large"} if task.endswith(".routed") else None


app = App("compat", task_cls=Base)
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_queues=(
        Queue(MAIN, Exchange("compat.direct"), routing_key="compat.key"),
        Queue(IMAGES, Exchange("compat.pictures", "topic"), routing_key="image.#"),
        Queue(EXCLUDED, Exchange("compat.direct"), routing_key="compat.excluded"),
    ),
    task_default_queue=MAIN,
    task_default_exchange="compat.direct",
    task_default_routing_key="compat.key",
    task_routes=(Route(), {"*.excluded": {"queue": EXCLUDED}}),
    task_annotations=(
        {f"{kind}.tagged": {"tag": "annotated", "soft_time_limit": 30} for kind in KINDS},
        {"*": {"on_failure": failed}},
    ),
    **json.loads(os.environ.get("CELERY_COMPAT", "{}")),
)
logger, plain = get_task_logger("compat"), logging.getLogger("plainly")
if "CELERY_COMPAT_FOLDER" in os.environ:
    plain.addHandler(logging.FileHandler(FOLDER / "plain.log"))


def both(**options):
    """Register the function as GPU task and as CPU task, otherwise alike."""

    def register(function):
        for kind, mark in zip(KINDS, ({"gpu": True}, {}), strict=True):
            app.task(name=f"{kind}.{function.__name__}", shared=False, **mark, **options)(function)
        return function

    return register


# ---- what an app changes of its worker


class NotingRequest(Request):
    """What becomes of the message of a task whose first argument is "noted"."""

    def _note(self, *words):
        if self.args and self.args[0] == "noted":
            note("messages", self.id, *words)

    def acknowledge(self):
        self._note("acknowledged")
        super().acknowledge()

    def reject(self, requeue=False):
        self._note("rejected", requeue)
        super().reject(requeue)


class OwnConsumer(Consumer):
    """For `worker_consumer`."""


class OwnAutoscaler(Autoscaler):
    """For `worker_autoscaler`."""


app.user_options["worker"].add(Option(["--tag"], default="none"))
app.user_options["preload"].add(Option(["--preloaded"], default="none"))


class Tagged(bootsteps.StartStopStep):
    """A step of the worker, with an option of its own; after the pool, as many steps are."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker, tag="none", **options):
        super().__init__(worker, **options)
        worker.tag = tag

    def start(self, worker):
        note("steps", "worker", worker.tag)

    def stop(self, worker):
        note("steps", "worker stops")


class Listening(bootsteps.ConsumerStep):
    """A step of the consumer, with messages of its own beside the tasks'."""

    def get_consumers(self, channel):
        queue = Queue("compat.messages", Exchange("compat.messages"), "compat.messages")
        return [self.own(channel, queue)]

    def own(self, channel, queue):
        from kombu import Consumer as MessageConsumer

        return MessageConsumer(channel, queues=[queue], callbacks=[self.take], accept=["json"])

    def take(self, body, message):
        note("steps", "message", body)
        message.ack()


app.steps["worker"].add(Tagged)
app.steps["consumer"].add(Listening)


@inspect_command()
def parts(state):
    """Of what classes the worker is made."""
    worker = state.consumer.controller
    found = {"consumer": state.consumer, "autoscaler": worker.autoscaler, "pool": worker.pool}
    return {name: [each.__name__ for each in type(part).__mro__] for name, part in found.items()}


@control_command(args=[("text", str)], signature="<TEXT>")
def say(state, text):
    note("said", text)
    return {"ok": text}


@signals.after_setup_task_logger.connect
def own_handler(logger=None, **_):
    handler = logging.FileHandler(FOLDER / "own.log")
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)


if app.conf.worker_hijack_root_logger is False:
    logging.basicConfig(level="INFO", filename=FOLDER / "root.log", format="root %(processName)s: %(message)s")


# ---- bodies


@both()
def same(value=None, *_):
    return value


@both(bind=True)
def tagged(self):
    return [self.tag, self.soft_time_limit, isinstance(self, Base)]


@both()
def fails(*args):
    raise ValueError("on purpose")


@both(bind=True)
def routed(self, *args):
    return self.request.delivery_info


@both(bind=True)
def came_by(self, *args):
    return self.request.delivery_info


@both()
def excluded(text):
    note("excluded", text)


@both()
def noted_as(_, how):
    if how == "fails":
        raise ValueError("on purpose")
    if how == "too long":
        time.sleep(60)


for _kind, _mark in zip(KINDS, ({"gpu": True}, {}), strict=True):
    app.task(name=f"{_kind}.early", shared=False, acks_late=False, **_mark)(noted_as)
    app.task(name=f"{_kind}.kept", shared=False, acks_on_failure=False, acks_on_timeout=False, **_mark)(noted_as)


@both(resultrepr_maxsize=30)
def long_value():
    return "long" * 30


@both()
def speaks(text):
    logger.info("task %s", text, extra={"colour": "red"})
    plain.info("plain %s", text)
    print(f"printed {text}")


@both()
def holds(gate, path):
    """Run until the file `gate` exists."""
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    while not Path(gate).exists():
        time.sleep(0.02)
    return "held"


@both()
def runs(name, text):
    note(name, text)


@both(bind=True)
def leaves(self, value):
    self.request.left = value


@both(bind=True)
def publishes(self, name):
    """A body that calls a task itself, and waits for it although Celery warns of that."""
    result = app.tasks[name].delay("from a body")
    try:
        result.get(timeout=30)
    except RuntimeError:
        with allow_join_result():
            return [self.request.id, result.id, result.get(timeout=30)]


@both(bind=True)
def parents(self, *_):
    return [self.request.parent_id, self.request.root_id]


@both()
def debugged():
    value = 20
    rdb.set_trace()
    return value + 1


@both()
def pid():
    return os.getpid()


@both()
def calls(name):
    """A body that calls a task as a function."""
    return [os.getpid(), app.tasks[name]()]


@both()
def errback(request, exc, traceback, name):
    """The new style of errback, which Celery calls as a function."""
    note(name, request.id, os.getpid())


@both(bind=True)
def replaced(self, value):
    return self.replace(app.tasks[self.name.replace("replaced", "same")].s(value))
