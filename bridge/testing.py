"""For the tests of projects that use the bridge: a cluster of one process, without Ray, Redis or a GPU.

    with local_cluster(app) as cluster:
        assert norm.apply(([3, 4],)).get() == 5.0
        assert cluster.calls == [Sent("shop.norm", ([3, 4],), {})]

Within the block a GPU task behaves as under a real worker, wherever Celery runs it (`apply`, ``task_always_eager``, the
`celery_worker` fixture of `celery.contrib.pytest`): arguments are checked and pickled, the body runs as in an executor,
its value becomes plain data, errors come back as from a GPU node. Calling a task as a function stays a plain call.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from billiard.exceptions import WorkerLostError

from actors.batching import run_batch
from actors.bodies import innermost, is_pydantic, replace_innermost
from actors.contract import Failed, FailureKind, Outcome, Succeeded
from actors.executor import outcomes
from actors.validation import checker
from actors.wishes import Wishes
from bridge.driver.outcomes import grant, resolve
from bridge.marks import Mark, find_marks

_TOKEN = "local"


class Sent(NamedTuple):
    """What a GPU body was called with, after the arguments were checked."""

    task: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LocalCluster:
    """What `local_cluster` yields."""

    def __init__(self, app: Any, marks: dict[str, Mark]) -> None:
        self.calls: list[Sent] = []
        self._app = app
        self._marks = marks
        self._bodies = {name: innermost(app.tasks[name]) for name in marks}
        self._failures: dict[str, list[BaseException]] = {}

    def fail_next(self, task: str, error: BaseException) -> None:
        """Let the next run of a task fail, as with ``GpuOutOfMemory("...")`` or billiard's ``WorkerLostError("...")``.

        Args:
            task: its name.
            error: raised in place of the body.

        Raises:
            LookupError: no GPU task has this name.
        """
        if task not in self._marks:
            raise LookupError(f"{task!r} is no GPU task; these are: {', '.join(sorted(self._marks))}")
        self._failures.setdefault(task, []).append(error)

    def run_batch(self, task: str, items: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Run a `@batched` body once for several tasks, each given by its positional arguments.

        Returns: per item what its producer would get, or the exception.

        Raises:
            LookupError: no `@batched` GPU task has this name.
        """
        mark = self._marks.get(task)
        if mark is None or mark.batch is None:
            raise LookupError(f"{task!r} is no @batched GPU task")
        values = run_batch(mark.batch, [(_copy(item), {}) for item in items])
        return [value if isinstance(value, Exception) else outcomes.plain(value, False) for value in values]

    def _install(self, name: str) -> Callable[[], None]:
        """Put the stand-in in the body's place; returns what takes it out again."""
        task = self._app.tasks[name]
        is_checked = not is_pydantic(task) and not self._marks[name].configured

        def install() -> None:
            replace_innermost(task, self._stand_in(task))
            if is_checked:
                task.run = self._checked(task, task.run)

        restore = _changes(task, install)

        def take_out() -> None:
            if is_pydantic(task):
                replace_innermost(task, self._bodies[name])  # it sits in a closure, which no attribute shows
            restore()

        return take_out

    def _stand_in(self, task: Any) -> Any:
        body = self._bodies[task.name]

        def run_locally(*args: Any, **kwargs: Any) -> Any:
            if task.request.called_directly:
                return body(*args, **kwargs)
            args, kwargs = _copy((args, kwargs))
            self.calls.append(Sent(task.name, args, kwargs))
            outcome, told = self._run(task, args, kwargs)
            for wishes in told:
                grant(task, wishes)
            if isinstance(outcome, Failed) and outcome.kind is FailureKind.EXITED:
                raise WorkerLostError(f"Worker exited prematurely: {outcome.message}.")
            return resolve(task, outcome)

        return run_locally

    def _checked(self, task: Any, run: Any) -> Any:
        check = checker(task.name, self._bodies[task.name])

        def checked(*args: Any, **kwargs: Any) -> Any:
            if not task.request.called_directly:
                args, kwargs = check(args, kwargs)
            return run(*args, **kwargs)

        return checked

    def _run(self, task: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Outcome, list[bytes]]:
        """The body as an executor runs it, and what it asked of Celery meanwhile."""
        told: list[bytes] = []
        wishes = Wishes(told.append)
        restore = _changes(task, lambda: wishes.install(task))
        try:
            value = self._call(task.name, args, kwargs)
        except BaseException as error:
            entry, short_of_memory = LocalCluster._run.__code__, isinstance(error, MemoryError)
            failed = outcomes.failure(_TOKEN, error, entry, short_of_memory, 0.0)
            return failed._replace(wishes=wishes.take()), told
        finally:
            restore()
        try:
            data = pickle.dumps(outcomes.plain(value, is_pydantic(task)), 5)
        except Exception as error:
            message = f"{type(value).__name__}: {error}"
            return Failed(_TOKEN, FailureKind.NOT_SENDABLE, type(error).__name__, message), told
        return Succeeded(_TOKEN, data, 0.0, 1, wishes=wishes.take()), told

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        failures, batch = self._failures.get(name), self._marks[name].batch
        if failures:
            raise failures.pop(0)
        if batch is None:
            return self._bodies[name](*args, **kwargs)
        (value,) = run_batch(batch, [(args, kwargs)])
        if isinstance(value, Exception):
            raise value
        return value


@contextmanager
def local_cluster(app: Any, gpu_tasks: Iterable[str] = ()) -> Iterator[LocalCluster]:
    """Run an app's GPU tasks in this process as a worker of the bridge would, until the block ends.

    Args:
        app: the Celery app; its tasks must be imported. Enter the block before a `celery_worker` starts.
        gpu_tasks: glob patterns on task names, as in `BRIDGE_GPU_TASKS`.

    Raises:
        ConfigurationInvalid: a task's mark means nothing.
    """
    app.loader.import_default_modules()
    app.finalize()
    marks = find_marks(app.tasks.values(), gpu_tasks)
    cluster = LocalCluster(app, marks)
    restores = [cluster._install(name) for name in marks]
    try:
        yield cluster
    finally:
        for restore in restores:
            restore()


def _changes(task: Any, change: Callable[[], None]) -> Callable[[], None]:
    """Change attributes of a task; returns what takes just these changes back."""
    before = dict(vars(task))
    change()
    changed = [name for name, value in vars(task).items() if name not in before or before[name] is not value]

    def restore() -> None:
        for name in changed:
            if name in before:
                setattr(task, name, before[name])
            else:
                delattr(task, name)

    return restore


def _copy(value: Any) -> Any:
    """What arrives in another process."""
    return pickle.loads(pickle.dumps(value, 5))
