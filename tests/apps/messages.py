"""Every body twice, as GPU task and as CPU task; the app's settings come from the environment as JSON.

Run as a command it is a producer of its own: it sends what its argument says and prints the answers. Signed messages
need that, for `setup_security` changes serialisers for the whole process.
"""

import json
import os
import sys
import time
from pathlib import Path

from tests.apps.base import App

app = App("messages")
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    broker_connection_retry_on_startup=True,
    **json.loads(os.environ.get("CELERY_MESSAGES", "{}")),
)
if app.conf.task_serializer == "auth":
    app.setup_security()

#: What differs between any two requests.
OWN = ("id", "root_id", "correlation_id", "task", "hostname", "origin", "properties", "_protected")


class Odd(Exception):
    def __init__(self, code):
        super().__init__(code)


class Basket:
    """What only pickle can carry."""

    def __init__(self, fruit):
        self.fruit = fruit

    def __repr__(self):
        return f"Basket({self.fruit!r})"

    def __eq__(self, other):
        return isinstance(other, Basket) and self.fruit == other.fruit

    __hash__ = None


def note(path, text):
    with open(path, "a") as file:
        file.write(f"{text}\n")


def both(**options):
    """Register the function as ``messages.gpu.NAME`` and as ``messages.cpu.NAME``."""

    def register(function):
        app.task(name=f"messages.gpu.{function.__name__}", gpu=True, **options)(function)
        app.task(name=f"messages.cpu.{function.__name__}", **options)(function)
        return function

    return register


@both(bind=True)
def seen(self, *args, **kwargs):
    """All that a body can see of its message, as text: so types show."""
    request = {key: repr(value) for key, value in sorted(vars(self.request).items()) if key not in OWN}
    true = [self.request.id == self.request.correlation_id, self.request.task == self.name]
    return {"args": [repr(arg) for arg in args], "kwargs": repr(kwargs), "request": request, "true": true}


@both()
def same(value):
    return value


@both()
def pid():
    return os.getpid()


@both()
def fails(code):
    raise Odd(code)


@both()
def notes(path, text):
    note(path, text)
    return text


@both()
def clock():
    return time.time()


@both()
def holds(gate, path, text):
    """Run until the file `gate` exists."""
    note(path, f"{text} starts")
    while not Path(gate).exists():
        time.sleep(0.02)
    note(path, f"{text} ends")
    return text


@both(bind=True, max_retries=3)
def retries(self, until, countdown):
    if self.request.retries < until:
        raise self.retry(countdown=countdown)
    return self.request.retries


@both(bind=True)
def tells(self, gate):
    self.update_state(state="HALFWAY", meta={"done": 1})
    while not Path(gate).exists():
        time.sleep(0.02)
    return "done"


def main(sends):
    """Send ``[[[name, args], ...], ...]``, each list of tasks as a chain; print the values."""
    chains = []
    for tasks in sends:
        first, *rest = [app.signature(name, args) for name, args in tasks]
        for task in rest:
            first = first | task
        chains.append(first.apply_async())
    print(json.dumps([result.get(timeout=60) for result in chains]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
