"""The app of the chaos run: every body takes its task's id and notes its start and its end in the ledger of effects."""

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

from celery import Task, signals

from bridge import Gpu, batched
from tests.apps.base import App
from tests.chaos.ledger import note

FOLDER = Path(os.environ.get("CHAOS_FOLDER", "/nonexistent"))
EFFECTS = FOLDER / "effects"
#: Unacknowledged messages are delivered again after this, in seconds; no body runs nearly as long.
VISIBILITY_S = 12
#: Most tasks that share one run of the vectorised body.
BATCH = 8

app = App("chaos")
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options={
        "visibility_timeout": VISIBILITY_S,
        "unacked_mutex_expire": 10,
    },
    # A chain's next task and a retry are published from the driver. Celery's default gives up after 0.6 s without a
    # broker, and the task whose body has succeeded fails as OperationalError.
    task_publish_retry_policy={"max_retries": 40, "interval_start": 0, "interval_step": 0.1, "interval_max": 0.5},
    result_expires=86400,
    task_send_sent_event=False,
)
LATE = {"acks_late": True, "reject_on_worker_lost": True}
KINDS = {"late": LATE, "early": {"acks_late": False}}


@signals.task_received.connect(weak=False)
def _received(request=None, **_):
    again = bool((request.delivery_info or {}).get("redelivered"))
    note(EFFECTS, id=request.id, what="received", again=again, where=request.hostname)


@contextmanager
def effect(*ids, **more):
    """Notes start and end of a body for each of its tasks."""
    for each in ids:
        note(EFFECTS, id=each, what="start", parent=os.getppid(), **more)
    yield
    for each in ids:
        note(EFFECTS, id=each, what="end", parent=os.getppid())


def noop(id: str) -> str:
    with effect(id):
        return id


def nap(id: str, seconds: float) -> str:
    with effect(id):
        time.sleep(seconds)
        return id


def many(ids: list[str]) -> list[str]:
    with effect(*ids):
        return list(ids)


def retry(self, id: str, times: int) -> int:
    with effect(id, retries=self.request.retries):
        pass
    if self.request.retries < times:
        raise self.retry(countdown=0.2, exc=LookupError(self.request.retries))  # which try ended so
    return self.request.retries


for _kind, _options in KINDS.items():
    app.task(noop, name=f"chaos.noop_{_kind}", gpu=True, **_options)
    app.task(nap, name=f"chaos.nap_{_kind}", gpu=True, **_options)
    app.task(nap, name=f"chaos.long_{_kind}", gpu=True, **_options)
    app.task(batched(max_size=BATCH, max_wait_s=0.02)(many), name=f"chaos.batch_{_kind}", gpu=True, **_options)
    app.task(retry, name=f"chaos.retry_{_kind}", bind=True, max_retries=None, gpu=True, **_options)


@app.task(name="chaos.poison", gpu=Gpu(max_crashes=2), **LATE)
def poison(id: str) -> None:
    """Ends its executor each time."""
    with effect(id):
        os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="chaos.once", gpu=True, **LATE)
def once(id: str) -> str:
    """Ends its executor the first time."""
    with effect(id):
        try:
            (FOLDER / "once" / id).touch(exist_ok=False)
        except FileExistsError:
            return id
        os.kill(os.getpid(), signal.SIGKILL)
    return id


@app.task(name="chaos.large", gpu=True, **LATE)
def large(id: str) -> str:
    with effect(id):
        return id + "x" * 150_000


@app.task(name="chaos.add", gpu=True, **LATE)
def add(value: int, id: str, more: int) -> int:
    with effect(id):
        return value + more


@app.task(name="chaos.total", gpu=True, **LATE)
def total(values: list[int], id: str) -> int:
    with effect(id):
        return sum(values)


class InChild(Task):
    """In a prefork child, Celery alone stores results; without this it gives one up when Redis is away."""

    def before_start(self, *_):
        self.backend.always_retry = True  # what `result_backend_always_retry` sets, which the driver can do without


@app.task(name="chaos.cpu", base=InChild, **LATE)
def cpu(id):
    with effect(id):
        return id


@app.task(name="chaos.cpu_add", base=InChild, **LATE)
def cpu_add(value, id, more):
    with effect(id):
        return value + more
