"""The child process that owns the CUDA context and runs bodies on its main thread. Never imports ray.

It loads one release of the user's app, warms the device, says Ready, then takes one call after the other from its pipe.
Each body is noted in the journal before it starts; each outcome is in the journal, or in the pipe when it is large, as
soon as its body has ended.
"""

import ctypes
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from celery import _state as celery_state
from celery.app.task import Context

from actors import device as devices
from actors import outcomes
from actors.contract import (
    EXIT_DEVICE_BROKEN,
    EXIT_NOT_STARTED,
    Asked,
    Bell,
    Call,
    Config,
    DeviceState,
    Done,
    Failed,
    FailureKind,
    LogLine,
    NotStarted,
    Outcome,
    Ready,
    Step,
    Succeeded,
    TaskCall,
)
from actors.interrupt import Interrupter
from actors.journal import Journal
from actors.logs import LogCapture, Output
from actors.release import LoadedTask, connection_closer, load_app, load_tasks
from actors.residents import load_all
from actors.signals import executor_init
from actors.wishes import Wishes

#: The actor is told of finished tasks at most this often while a call goes on; it can always read the journal itself.
BELL_EVERY_S = 0.001
_PR_SET_PDEATHSIG = 1


class Executor:
    """Runs calls; one instance per process, on the main thread."""

    def __init__(self, pipe: Connection, journal: Journal, config: Config) -> None:
        self._pipe = pipe
        self._speaking = threading.Lock()  # a body may report progress from threads of its own
        self._journal = journal
        self._config = config
        self._wishes = Wishes(lambda wishes: self._say(Asked(self._token, wishes)))
        self._token = ""
        self._logs = LogCapture(config.log_level, config.log_limit_bytes, self._tell_lines)
        self._interrupter = Interrupter(journal, Executor._enter_body.__code__)
        self._tasks: dict[str, LoadedTask] = {}
        self._device: devices.Device
        self._pid = os.getpid()
        os.register_at_fork(after_in_child=pipe.close)  # or the actor would not see this process end

    def start(self) -> None:
        """Load the release and warm everything a first task would otherwise wait for."""
        started = time.monotonic()
        self._say(Step("importing the app"))
        sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
        app = load_app(self._config.release)
        celery_state._set_task_join_will_block(True)  # as in a prefork child: a body must not wait for other tasks
        self._logs.install(app)
        self._close_connections = connection_closer(app)
        self._tasks = load_tasks(app, self._config.release, self._wishes)
        self._say(Step("warming the device"))
        self._device = devices.open_device(self._config.device, self._config.memory_limit)
        self._device.warm_up()
        executor_init.send(sender=app, device=self._device.describe()._asdict())
        self._say(Step("loading residents"))
        load_all()
        self._say(Step("running examples"))
        self._run_examples()
        self._device.synchronize()
        self._close_connections()  # of residents and examples
        self._say(Ready(self._device.describe()._asdict(), time.monotonic() - started))

    def serve(self) -> None:
        """Take calls until the actor closes the pipe."""
        while True:
            try:
                call: Call = pickle.loads(self._pipe.recv_bytes())
            except EOFError:
                return
            self._run_call(call)
            used, total = self._device.memory()
            self._say(Done(call.id, DeviceState(used, total, max(0, total - used), {}), {}))

    def _run_examples(self) -> None:
        for task in self._tasks.values():
            example = getattr(getattr(task.task, "gpu", None), "example", None)
            if example is not None:
                try:
                    task.call(*example)
                except Exception as error:
                    raise RuntimeError(f"the warm-up example of {task.name} failed: {error!r}") from error

    def _run_call(self, call: Call) -> None:
        index, bell = 0, time.monotonic()
        while index < len(call.tasks):
            if self._journal.is_cancelled(index):
                token = call.tasks[index].token
                self._deliver(Failed(token, FailureKind.CANCELLED, "Cancelled", "withdrawn before it started"))
                index += 1
                continue
            count = self._batch_size(call.tasks, index)
            for outcome in self._run(call.tasks[index : index + count], index):
                self._deliver(outcome)
            self._journal.end()  # not before: who dies while its value is made plain and pickled has run
            index += count
            if time.monotonic() - bell > BELL_EVERY_S and index < len(call.tasks):
                self._say(Bell())
                bell = time.monotonic()

    def _batch_size(self, tasks: Sequence[TaskCall], index: int) -> int:
        """How many tasks from `index` on share one run of a vectorised body; 1 for any other."""
        loaded = self._tasks.get(tasks[index].name)
        if loaded is None or loaded.batch is None:
            return 1
        end = index + 1
        while end < len(tasks) and end - index < loaded.batch.max_size and tasks[end].name == loaded.name:
            if self._journal.is_cancelled(end):
                break  # a batch is one range of the journal, or the wrong task would be blamed for a crash
            end += 1
        return end - index

    def _run(self, tasks: Sequence[TaskCall], first: int) -> Iterator[Outcome]:
        """Outcomes of tasks that share a run, each as soon as it is there."""
        loaded = self._tasks.get(tasks[0].name)
        if loaded is None:
            message = f"{tasks[0].name} is not a GPU task of the app imported on this node"
            yield from (Failed(task.token, FailureKind.UNKNOWN_TASK, "LookupError", message) for task in tasks)
            return
        left = {task.token: task for task in tasks}
        try:
            for outcome in (
                self._run_one(loaded, tasks[0], first)
                if loaded.batch is None
                else self._run_vectorised(loaded, tasks, first)
            ):
                del left[outcome.token]
                yield outcome
        except Exception as error:  # around the bodies, not in them: a payload of classes this node does not have
            message = f"{type(error).__name__}: {error}"
            text = traceback.format_exc()
            yield from (Failed(token, FailureKind.RAISED, type(error).__name__, message, text) for token in left)

    def _run_one(self, loaded: LoadedTask, task: TaskCall, first: int) -> Iterator[Outcome]:
        args, kwargs, context = pickle.loads(task.payload)
        result = self._guarded(loaded, loaded.call, args, kwargs, context, first, 1, task.token)
        if result.out_of_memory:
            self._device.free()
        may_run_twice = loaded.task.acks_late and loaded.task.reject_on_worker_lost is not False
        if result.out_of_memory and may_run_twice:  # its references are gone by now
            result = self._guarded(loaded, loaded.call, args, kwargs, context, first, 1, task.token)
        yield self._outcome(task, loaded, result, 1)

    def _run_vectorised(self, loaded: LoadedTask, tasks: Sequence[TaskCall], first: int) -> Iterator[Outcome]:
        """Run a batch once; when it raises, run its halves, so that only the item at fault fails."""
        items = [pickle.loads(task.payload) for task in tasks]
        pairs = [(args, kwargs) for args, kwargs, _ in items]
        context, token = items[0][2], tasks[0].token
        result = self._guarded(loaded, loaded.run_items, (pairs,), {}, context, first, len(tasks), token)
        if result.error is None:
            shares = result._replace(run_s=result.run_s / len(tasks))
            for task, value in zip(tasks, result.value, strict=True):
                yield self._outcome(task, loaded, _share(shares, value), len(tasks))
            return
        if result.out_of_memory:
            self._device.free()
        if len(tasks) == 1 or not isinstance(result.error, Exception):
            yield from (self._outcome(task, loaded, result, len(tasks)) for task in tasks)
            return
        middle = len(tasks) // 2
        yield from self._run_vectorised(loaded, tasks[:middle], first)
        yield from self._run_vectorised(loaded, tasks[middle:], first + middle)

    def _guarded(
        self,
        loaded: LoadedTask,
        call: Any,
        args: Any,
        kwargs: Any,
        context: dict[str, Any],
        first: int,
        count: int,
        token: str,
    ) -> "_Result":
        """Run a body with its request in place, interruptible, on a device that is idle again afterwards."""
        request = Context(context, args=type(context.get("args", []))(args), kwargs=kwargs, called_directly=False)
        before = dict(vars(request))
        loaded.task.request_stack.push(request)
        self._token = token
        celery_state._task_stack.push(loaded.task)
        self._close_connections()
        self._logs.start()
        started = time.monotonic_ns()
        value, error = None, None
        try:
            value = self._enter_body(call, args, kwargs, first, count, started)
        except BaseException as raised:  # SystemExit and KeyboardInterrupt are the task's problem only
            error = raised
        finally:
            if os.getpid() != self._pid:
                os._exit(_exit_code(error))  # a child that the body forked has come out here: it is no second executor
            self._interrupter.serial = 0
            sys.settrace(None)
            celery_state._task_stack.pop()
            loaded.task.request_stack.pop()
        run_s = (time.monotonic_ns() - started) / 1e9
        self._wishes.add_traces(request, before)
        self._close_connections()
        if error is not None and not self._device.is_healthy(error):
            self._end_broken(error)
        return _Result(value, error, error is not None and self._device.is_out_of_memory(error), run_s)

    def _enter_body(self, call: Any, args: Any, kwargs: Any, first: int, count: int, started: int) -> Any:
        """The frame below which everything is the user's: interrupts and tracebacks look no further up."""
        self._interrupter.serial = self._journal.begin(first, count, started)
        value = call(*args, **kwargs)
        self._device.synchronize()  # or CUDA's error would be charged to the next task
        return value

    def _outcome(self, task: TaskCall, loaded: LoadedTask, result: "_Result", batch: int) -> Outcome:
        logs, wishes = self._logs.take(), self._wishes.take()
        if result.error is not None:
            entry = Executor._enter_body.__code__
            failed = outcomes.failure(task.token, result.error, entry, result.out_of_memory, result.run_s)
            return failed._replace(logs=logs, wishes=wishes)
        try:
            value = pickle.dumps(outcomes.plain(result.value, loaded.keeps_models), 5)
        except Exception as error:
            message = f"{type(result.value).__name__}: {error}"[: outcomes.TEXT_LIMIT]
            return Failed(
                task.token, FailureKind.NOT_SENDABLE, type(error).__name__, message, run_s=result.run_s, logs=logs,
                wishes=wishes,
            )  # fmt: skip
        return Succeeded(task.token, value, result.run_s, batch, logs, wishes)

    def _deliver(self, outcome: Outcome) -> None:
        data = pickle.dumps(outcome, 5)
        if not self._journal.append(data):
            self._pipe.send_bytes(data)

    def _end_broken(self, error: BaseException) -> None:
        """End this process: a broken CUDA context stays broken. The journal still names the task that ran."""
        os.write(2, f"CUDA context is broken, executor ends: {error!r}\n".encode())
        os._exit(EXIT_DEVICE_BROKEN)

    def _tell_lines(self, lines: list[LogLine]) -> None:
        self._say(Asked(self._token, pickle.dumps(lines, 5)))

    def _say(self, message: Any) -> None:
        with self._speaking:
            self._pipe.send_bytes(pickle.dumps(message, 5))


class _Result(NamedTuple):
    value: Any
    error: BaseException | None
    out_of_memory: bool
    run_s: float


def _exit_code(error: BaseException | None) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return int(error is not None)


def _share(run: _Result, value: Any) -> _Result:
    """One item's part of a shared run; an exception that the body put in its place fails that item."""
    return run._replace(value=None, error=value) if isinstance(value, Exception) else run._replace(value=value)


def main(pipe_fd: int, journal_fd: int) -> None:
    """Entry of the child process; the actor has passed both descriptors."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is for the worker to decide on
    pipe = Connection(pipe_fd)
    config: Config = pickle.loads(pipe.recv_bytes())
    executor = Executor(pipe, Journal(journal_fd), config)
    try:
        executor.start()
    except BaseException as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        pipe.send_bytes(pickle.dumps(NotStarted(reason, isinstance(error, devices.DeviceUnusable)), 5))
        os._exit(EXIT_NOT_STARTED)
    executor.serve()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
