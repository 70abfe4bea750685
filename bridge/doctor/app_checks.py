"""What the doctor sees without asking anybody: versions, marks, limits, acknowledgement, environment."""

import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from packaging.requirements import Requirement

from actors.batching import batch_of
from actors.bodies import innermost
from bridge.doctor.findings import Finding, fail, ok, warn
from bridge.errors import ConfigurationInvalid
from bridge.marks import Mark, find_marks
from bridge.settings import Settings
from bridge.worker.visibility import cautions

#: Redis gives a message that is not acknowledged to another worker after this, unless the app says otherwise; seconds.
VISIBILITY_S = 3600.0
_PACKAGE = "celery-gpu-bridge"
_MOST_NAMES = 3


def versions() -> Iterator[Finding]:
    """Python and packages of this environment."""
    found, python = [f"Python {platform.python_version()}"], importlib.metadata.metadata(_PACKAGE)["Requires-Python"]
    wanted = [Requirement(each) for each in importlib.metadata.requires(_PACKAGE) or ()]
    for each in wanted:
        if each.marker is not None and not each.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(each.name)
        except importlib.metadata.PackageNotFoundError:
            yield fail("versions", f"{each.name} is not installed", f"pip install '{each.name}{each.specifier}'")
            continue
        found.append(f"{each.name} {version}")
        if not each.specifier.contains(version, prereleases=True):
            yield fail("versions", f"{each.name} {version} is installed", f"pip install '{each.name}{each.specifier}'")
    yield ok("versions", f"{', '.join(found[:4])} (Python {python} is asked for)")


def environment() -> Iterator[Finding]:
    """Variables that break GPU tasks."""
    if os.environ.get("USE_FAST_LOCALS"):
        yield fail("environment", "USE_FAST_LOCALS is set: Celery's stacks are keyed by thread then", "unset it")
    else:
        yield ok("environment", "USE_FAST_LOCALS is not set")
    if sys.platform != "linux":
        yield fail("environment", f"the bridge does not run on {sys.platform}", "use Linux")


def marks(app: Any, settings: Settings) -> tuple[dict[str, Mark], list[Finding]]:
    """The GPU tasks, and what is odd about their marks."""
    tasks = [task for task in app.tasks.values() if not task.name.startswith("celery.")]
    try:
        found = find_marks(tasks, settings.gpu_tasks)
    except ConfigurationInvalid as error:
        return {}, [fail("marks", str(error), "correct the mark")]
    odd = list(_odd_marks(tasks, found, settings))
    if not found:
        return {}, [*odd, warn("marks", "no task is marked", "write @app.task(gpu=True), or set BRIDGE_GPU_TASKS")]
    return found, [*odd, ok("marks", f"{len(found)} of {len(tasks)} tasks are GPU tasks: {_names(found)}")]


def _odd_marks(tasks: list[Any], found: dict[str, Mark], settings: Settings) -> Iterator[Finding]:
    for pattern in settings.gpu_tasks:
        matched = [task for task in tasks if fnmatchcase(task.name, pattern)]
        kept = [task.name for task in matched if getattr(task, "gpu", None) is False]
        if not matched:
            yield warn(
                "marks", f"BRIDGE_GPU_TASKS: {pattern!r} matches no task", "correct it; names are in the log at start"
            )
        if kept:
            yield warn(
                "marks", f"{_names(kept)}: gpu=False in the code, {pattern!r} in BRIDGE_GPU_TASKS; it stays on the CPU",
                "take one of both away",
            )  # fmt: skip
    unmarked = [task.name for task in tasks if task.name not in found and batch_of(innermost(task))]
    if unmarked:
        yield warn("marks", f"{_names(unmarked)}: @batched, but no GPU task: it runs one by one", "add gpu=True")
    for name, mark in found.items():
        if mark.batch and settings.gpu_slots and mark.batch.max_size > settings.gpu_slots:
            yield warn(
                "marks", f"{name}: BRIDGE_GPU_SLOTS={settings.gpu_slots}: batches of {mark.batch.max_size} never fill",
                "raise BRIDGE_GPU_SLOTS to thrice the batch, or leave it out",
            )  # fmt: skip
    shares = {mark.gpu.share for mark in found.values()}
    if len(shares) > 1:
        yield warn(
            "marks", f"shares of a GPU from {min(shares):g} to {max(shares):g}: actors reserve the largest",
            "give all tasks the same share, or put them into two apps",
        )  # fmt: skip


def limits(app: Any, found: dict[str, Mark]) -> Iterator[Finding]:
    """Time limits, and where a task may run a second time while the first run goes on."""
    driver_type = app.connection_for_read().transport.driver_type
    visible_s = float((app.conf.broker_transport_options or {}).get("visibility_timeout", VISIBILITY_S))
    hard = {name: app.tasks[name].time_limit or app.conf.task_time_limit for name in found}
    late = [limit for name, limit in hard.items() if limit and app.tasks[name].acks_late]
    for text in cautions(app, driver_type, visible_s if driver_type == "redis" else math.inf, late):
        what, _, to_do = text.rpartition("; ")
        yield warn("limits", what, to_do)
    unlimited = [name for name, limit in hard.items() if not limit]
    if unlimited:
        text = f"{_names(unlimited)}: no time limit: a body that hangs keeps its GPU for ever"
        yield warn("limits", text, "set task_time_limit, or time_limit of the task")
    else:
        yield ok("limits", "every GPU task has a time limit")


def acknowledgement(app: Any, found: dict[str, Mark]) -> Iterator[Finding]:
    """What a killed worker loses, and what it keeps from others."""
    early = [name for name in found if not app.tasks[name].acks_late]
    late = [name for name in found if name not in early]
    if early:
        yield warn(
            "acks", f"{_names(early)}: acknowledged when it starts: a killed worker or GPU process loses it",
            "set task_acks_late = True, or acks_late=True of the task, if it may run twice",
        )  # fmt: skip
    if late:
        kept = all(app.tasks[name].reject_on_worker_lost for name in late)
        what = "goes back to the broker" if kept else "fails (task_reject_on_worker_lost is off)"
        yield ok("acks", f"late for {len(late)} of {len(found)} GPU tasks; one that runs when its driver dies {what}")
    prefetch = app.conf.worker_prefetch_multiplier
    if prefetch == 0:
        yield warn("prefetch", "worker_prefetch_multiplier = 0: a worker takes all there is", "set it to 1")
    elif prefetch > 1:
        yield warn(
            "prefetch", f"worker_prefetch_multiplier = {prefetch}: an idle worker cannot take what others hold for "
            "their CPU children", "set worker_prefetch_multiplier = 1",
        )  # fmt: skip
    else:
        yield ok("prefetch", "one CPU task per child is held; GPU tasks are bounded by BRIDGE_GPU_SLOTS")


def _names(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
    return ", ".join(found[:_MOST_NAMES]) + more
