"""Load one release of the user's app in an executor, and make its tasks ready to run there.

In the executor a marked task keeps its class's ``__call__`` and its body; what Celery wraps around a body (autoretry,
pydantic) stays in the driver. Whatever a body asks of Celery (retry, replace, update_state) becomes data.
"""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from celery.app.trace import setup_worker_optimizations

from actors.batching import Batch, batch_of, run_batch
from actors.bodies import has_custom_call, innermost, is_pydantic
from actors.contract import Release
from actors.executor.errands import EXPORT, add_errands
from actors.executor.reading import Reader
from actors.wishes import Wishes

logger = logging.getLogger(__name__)


class LoadedTask:
    """One task as the executor runs it."""

    __slots__ = (
        "_body", "_has_call", "_reader", "batch", "call", "example", "keep_copy", "keeps_models", "memory_bytes",
        "name", "result", "streams", "task",
    )  # fmt: skip

    def __init__(self, task: Any, wishes: Wishes) -> None:
        body = innermost(task)
        self._body = body
        self._reader: Reader | None = None
        self.name: str = task.name
        self.task = task
        self.batch: Batch | None = batch_of(body)
        gpu = getattr(task, "gpu", None)  # True, a `Gpu`, or None for a task that a setting has marked
        self.memory_bytes = int(getattr(gpu, "memory", None) or 0)
        self.streams: int = 1 if self.batch else getattr(gpu, "streams", 1)
        self.example: tuple[Any, ...] | None = getattr(gpu, "example", None)
        self.result: str = getattr(gpu, "result", "value")
        self.keep_copy: bool = getattr(gpu, "keep_copy", False)
        self.keeps_models = is_pydantic(task)  # Celery's wrapper dumps them, in the driver
        task.run = body
        wishes.install(task)
        self._has_call = has_custom_call(task)
        self.call: Callable[..., Any] = task if self._has_call else body

    @property
    def reader(self) -> Reader:
        """Reads what came closed."""
        if self._reader is None:
            self._reader = Reader(self.name, self._body)
        return self._reader

    @property
    def may_run_twice(self) -> bool:
        """Only with late acknowledgement, and not when the task says no to redelivery."""
        return bool(self.task.acks_late) and self.task.reject_on_worker_lost is not False

    def run_items(self, items: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """One run of the vectorised body for (args, kwargs) pairs; a custom ``__call__`` surrounds it, once."""
        batch = self.batch
        assert batch is not None  # the caller has looked
        if not self._has_call:
            return run_batch(batch, items)
        body, self.task.run = self.task.run, lambda *_, **__: run_batch(batch, items)
        try:
            args, kwargs = items[0]
            values: list[Any] = self.task(*args, **kwargs)
            return values
        finally:
            self.task.run = body


def load_app(release: Release) -> Any:
    """Import the release's Celery app and its task modules; whatever the import raises passes through."""
    os.chdir(release.workdir)
    sys.path[:] = [entry for entry in release.sys_path if entry not in sys.path] + sys.path
    module, _, attribute = release.app.partition(":")
    app = getattr(
        _import_script(module, release.script) if release.script else importlib.import_module(module), attribute
    )
    app.loader.import_default_modules()
    if EXPORT in release.tasks:
        add_errands(app)
    for include in release.includes:
        importlib.import_module(include)
    setup_worker_optimizations(app)  # current app, and no second request when a custom __call__ calls super()
    return app


def connection_closer(app: Any) -> Callable[[], None]:
    """Closes Django's database and cache connections, as Celery's fixup does around tasks; nothing without Django."""
    fixups = [each.worker_fixup for each in getattr(app, "_fixups", ()) if hasattr(each, "worker_fixup")]

    def close() -> None:
        for fixup in fixups:
            try:
                fixup.close_database()
                fixup.close_cache()
            except Exception:  # as from a signal's receiver under prefork: the task has its outcome all the same
                logger.exception("closing Django's connections failed")

    return close


def load_tasks(app: Any, release: Release, wishes: Wishes) -> dict[str, LoadedTask]:
    """The release's GPU tasks, and no others: a message can name only these.

    Raises:
        LookupError: the app here lacks a task the worker's app has.
    """
    missing = [name for name in release.tasks if name not in app.tasks]
    if missing:
        raise LookupError(
            f"the app imported here has no task {', '.join(missing)}: is this node's code another version?"
        )
    return {name: LoadedTask(app.tasks[name], wishes) for name in release.tasks}


def _import_script(name: str, path: str) -> Any:
    """Import an app that the worker ran as a script, under the name of its file."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
