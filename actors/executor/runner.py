"""What happens around a body: its payload opened, room for it on the device, the body itself, its outcome made.

Bodies run one after another on the executor's main thread. Tasks share a run where they may: a vectorised body takes
many, and bodies with streams are launched one after another before the first is waited for. Which tasks run is in the
journal before they do. Nothing here speaks to the actor.
"""

import os
import pickle
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from celery import _state as celery_state
from celery.app.task import Context
from celery.exceptions import SoftTimeLimitExceeded

from actors.contract import (
    EXIT_DEVICE_BROKEN,
    EXIT_DEVICE_FAULTY,
    Config,
    Failed,
    FailureKind,
    Outcome,
    Succeeded,
    TaskCall,
)
from actors.data import arrays
from actors.errors import DataError
from actors.exceptions import clear_frames
from actors.executor import device_results, outcomes, residents
from actors.executor.admission import Admission
from actors.executor.device_api import Device, Stream
from actors.executor.interrupt import Cancelled, Interrupter
from actors.executor.items import Item, Result, may_join
from actors.executor.logs import LogCapture
from actors.executor.opening import Opener, use
from actors.executor.release import LoadedTask, connection_closer, load_tasks
from actors.journal import Journal
from actors.sizes import readable
from actors.wishes import ReplaceWanted, RetryWanted, Wishes

#: What to do about a result that there is no room for.
TOO_FULL = (
    "no room for the result of the body, also after others have made room: return less at once, let it go to the store "
    'with Gpu(result="ref"), or lower BRIDGE_RESIDENT_LIMIT'
)
#: Characters of the error that broke a device which its actor keeps.
BROKEN_LIMIT = 500


class Runner:
    """Runs the bodies of one release; `ask` takes what a running body wants told at once, with its token.

    `say_broken` takes the last word before this process ends because its device is broken.
    """

    def __init__(
        self, journal: Journal, config: Config, ask: Callable[[str, bytes], None], say_broken: Callable[[str], None]
    ) -> None:
        self._say_broken = say_broken
        self._journal = journal
        self._config = config
        self._token = ""
        self._wishes = Wishes(lambda wishes: ask(self._token, wishes))
        self._logs = LogCapture(
            config.log_level, config.log_limit_bytes, lambda lines: ask(self._token, pickle.dumps(lines, 5))
        )
        self._interrupter = Interrupter(journal, Runner._enter_body.__code__)
        self._tasks: dict[str, LoadedTask] = {}
        self._used: dict[str, tuple[str, ...]] = {}  # task's name -> residents its last body has used
        self._news: dict[str, tuple[str, ...]] = {}  # what of it the actor does not know
        self._pid = os.getpid()

    # warm-up

    def load(self, app: Any) -> None:
        """Take the release's tasks and what they log."""
        self._logs.install(app)
        self._app = app
        self.close_connections = connection_closer(app)
        self._tasks = load_tasks(app, self._config.release, self._wishes)

    def use(self, device: Device) -> None:
        """Run bodies on this device."""
        self._device = device
        self._admission = Admission(device, residents.shared, device_results.shared)
        self._opener = Opener(self._app, self._config, device, self._interrupter.reach)
        self._wishes.reduce = self._opener.in_message
        use(self._opener)
        arrays.opener = self._opener.stores.get

    def run_examples(self) -> None:
        """Run the example of each task that has one."""
        for task in self._tasks.values():
            if task.example is not None:
                residents.shared.forget_touched()
                try:
                    task.call(*task.example)
                except Exception as error:
                    raise RuntimeError(f"the warm-up example of {task.name} failed: {error!r}") from error
                self._note_used(task, residents.shared.touched())

    # calls

    def start_call(self) -> None:
        """A new call."""
        self._admission.forget()

    def take_touched(self) -> dict[str, tuple[str, ...]]:
        """Task's name -> residents its last body has used, where that has changed since the last time."""
        news, self._news = self._news, {}
        return news

    def run(self, tasks: Sequence[TaskCall], index: int) -> Iterator[Outcome]:
        """Outcomes of the task at `index` and of those after it that share its run, each as soon as it is there."""
        task = tasks[index]
        loaded = self._tasks.get(task.name)
        device_results.shared.forget_touched()
        if self._journal.is_cancelled(index):
            yield Failed(task.token, FailureKind.CANCELLED, "Cancelled", "withdrawn before it started")
            return
        if loaded is None:
            message = f"{task.name} is not a GPU task of the app imported on this node"
            yield Failed(task.token, FailureKind.UNKNOWN_TASK, "LookupError", message)
            return
        left = {task.token: None}
        try:
            opened = self._open(loaded, tasks, index)
            items = self._admitted(loaded, opened) if loaded.memory_bytes else opened
            if not items:
                kind, message = FailureKind.NO_ROOM, self._admission.refusal(loaded.memory_bytes)
                yield from (Failed(item.token, kind, kind.name, message) for item in opened)
            elif loaded.batch is None and len(items) == 1:
                yield self._run_alone(loaded, items[0], index)
            else:
                run = self._run_on_streams if loaded.batch is None else self._run_vectorised
                left = dict.fromkeys(item.token for item in items)
                for outcome in run(loaded, items, index):
                    del left[outcome.token]
                    yield outcome
        except Exception as error:  # around the bodies, not in them: a payload of classes this node does not have
            text = traceback.format_exc()
            message = f"{type(error).__name__}: {error}"
            yield from (Failed(token, FailureKind.RAISED, type(error).__name__, message, text) for token in left)

    def _open(self, loaded: LoadedTask, tasks: Sequence[TaskCall], index: int) -> list[Item]:
        """Those from `index` on that may share a run, at least one; what is withdrawn or cannot be opened parts them.

        A run is one range of the journal without a gap, or the wrong task would be blamed for a crash.
        """
        most = loaded.batch.max_size if loaded.batch else loaded.streams
        if most == 1:
            return [Item.of(tasks[index])]
        items: list[Item] = []
        for number, task in enumerate(tasks[index : index + most], index):
            if number > index and (not may_join(loaded, tasks[index], task) or self._journal.is_cancelled(number)):
                break
            try:
                items.append(Item.of(task))
            except Exception:
                if not items:
                    raise
                break
        return items

    def _admitted(self, loaded: LoadedTask, items: list[Item]) -> list[Item]:
        """Those that may start now, together; what a vectorised body declares is for one run of it."""
        if loaded.batch:
            return items if self._admission.admit(loaded.memory_bytes, 1, self._used_by(loaded)) else []
        return items[: self._admission.admit(loaded.memory_bytes, len(items), self._used_by(loaded))]

    def _run_alone(self, loaded: LoadedTask, item: Item, first: int) -> Outcome:
        call = self._call_of(loaded, item)
        result = self._guarded(loaded, call, item, first)
        if result.out_of_memory and loaded.may_run_twice:
            self._make_room(result.used)
            result = self._guarded(loaded, call, item, first)
        return self._outcome(item, loaded, result, 1)

    def _run_vectorised(self, loaded: LoadedTask, items: Sequence[Item], first: int) -> Iterator[Outcome]:
        """Run a batch once; when it raises, run its halves, so that only the item at fault fails."""
        pairs = [(item.args, item.kwargs) for item in items]
        call: Any = loaded.run_items
        if any(item.has_arrays for item in items):
            call = self._opener.opening_items(loaded.task, call)
        if any(item.is_closed for item in items):
            call = loaded.reader.reading_items(call, [item.checks for item in items])
        result = self._guarded(loaded, call, items[0]._replace(args=(pairs,), kwargs={}), first, len(items))
        if result.error is None:
            shares = result._replace(run_s=result.run_s / len(items))
            for item, value in zip(items, result.value, strict=True):
                yield self._outcome(item, loaded, shares.share(value), len(items))
                if shares.logs or shares.wishes:  # of all, told once
                    shares = shares._replace(logs=(), wishes=b"")
            return
        if len(items) == 1 or not isinstance(result.error, Exception):
            yield from (self._outcome(item, loaded, result, len(items)) for item in items)
            return
        if result.out_of_memory:
            self._make_room(result.used)
        middle = len(items) // 2
        yield from self._run_vectorised(loaded, items[:middle], first)
        yield from self._run_vectorised(loaded, items[middle:], first + middle)

    def _run_on_streams(self, loaded: LoadedTask, items: Sequence[Item], first: int) -> Iterator[Outcome]:
        """Launch each body on a stream of its own, then wait for one after the other; the device overlaps them.

        One that runs out of memory while the others hold theirs has its second try, alone, when they are done.
        """
        started = begun = time.monotonic_ns()
        launched: deque[tuple[Item, Stream, Result]] = deque()
        for count, (item, stream) in enumerate(zip(items, self._device.streams(len(items)), strict=True), 1):
            if count > 1 and self._journal.is_cancelled(first + count - 1):
                break
            begun = time.monotonic_ns()
            with stream:
                result = self._guarded(loaded, self._call_of(loaded, item), item, first, count, waits=False)
            launched.append((item, stream, result))
        del result  # or its arrays would stay until all have ended
        count, short = len(launched), []
        for index in range(first, first + count):
            item, stream, result = launched.popleft()
            with stream:
                result = self._awaited(stream, result, (first, count, begun))
                if result.out_of_memory and loaded.may_run_twice:
                    short.append((item, result.used, index))
                    continue
                share_s = (time.monotonic_ns() - started) / 1e9 / count
                outcome = self._outcome(item, loaded, result._replace(run_s=share_s), 1)
            del result
            yield outcome
        for item, used, index in short:
            self._make_room(used)
            result = self._guarded(loaded, self._call_of(loaded, item), item, index)
            yield self._outcome(item, loaded, result, 1)

    def _call_of(self, loaded: LoadedTask, item: Item) -> Any:
        call = self._opener.opening(loaded.task, loaded.call) if item.has_arrays else loaded.call
        return loaded.reader.reading(call, item.checks) if item.is_closed else call

    def _awaited(self, stream: Stream, result: Result, run: tuple[int, int, int]) -> Result:
        """A launched body's result when its stream has ended; a late error of the device is the body's."""
        try:
            self._enter_body(stream.synchronize, (), {}, *run)
        except BaseException as error:
            out_of_memory = self._is_short_of_memory(error)
            if result.error is None:
                return result._replace(value=None, error=error, out_of_memory=out_of_memory)
        finally:
            self._interrupter.serial = 0
            sys.settrace(None)
        return result

    def _guarded(
        self, loaded: LoadedTask, call: Any, item: Item, first: int, count: int = 1, waits: bool = True
    ) -> Result:
        """Run a body with its request in place, interruptible; the device is idle again afterwards if it waits."""
        task, args, context = loaded.task, item.args, item.context
        request = Context(context, args=type(context.get("args", []))(args), kwargs=item.kwargs, called_directly=False)
        before = dict(vars(request))
        task.request_stack.push(request)
        self._token = item.token
        celery_state._task_stack.push(task)
        self.close_connections()
        residents.shared.forget_touched()
        self._logs.start()
        started = time.monotonic_ns()
        value, error = None, None
        try:
            value = self._enter_body(call, args, item.kwargs, first, count, started, waits)
        except BaseException as raised:  # SystemExit and KeyboardInterrupt are the task's problem only
            error = raised
        finally:
            if os.getpid() != self._pid:
                os._exit(
                    outcomes.exit_code(error)
                )  # a child that the body forked has come out here: it is no second executor
            self._interrupter.serial = 0
            sys.settrace(None)
            celery_state._task_stack.pop()
            task.request_stack.pop()
        run_s = (time.monotonic_ns() - started) / 1e9
        used, wishes = residents.shared.touched(), b""
        try:
            self._wishes.add_traces(request, before)
            wishes = self._wishes.take()
        except (Exception, Cancelled) as raised:  # it has asked for what cannot be sent
            value, error = None, raised if error is None or isinstance(error, RetryWanted | ReplaceWanted) else error
        self.close_connections()
        if used or error is None:
            self._note_used(loaded, used)
        out_of_memory = error is not None and self._is_short_of_memory(error)
        return Result(value, error, out_of_memory, run_s, used, self._logs.take(), wishes)

    def _enter_body(
        self, call: Any, args: Any, kwargs: Any, first: int, count: int, started_ns: int, waits: bool = False
    ) -> Any:
        """The frame below which everything is the user's: interrupts and tracebacks look no further up."""
        self._interrupter.serial = self._journal.begin(first, count, started_ns)
        value = call(*args, **kwargs)
        if waits:
            self._device.synchronize()  # or CUDA's error would be charged to the next task
        return value

    def _is_short_of_memory(self, error: BaseException) -> bool:
        """Whether an error means too little memory; unused memory is given back then. A broken device ends us."""
        if not self._device.is_healthy(error):
            self._end_broken(error)
        clear_frames(error)
        if not self._device.is_out_of_memory(error):
            return False
        self._device.free()
        self._admission.forget()
        return True

    def _how_full(self) -> str:
        """What is on the device now, for an error; "" where nobody knows."""
        held, results = residents.shared.size_bytes(), device_results.shared.device_bytes()
        memory = self._device.memory(held + results)
        if not memory.total:
            return ""
        whole, used = readable(memory.total), readable(memory.used)
        stays = f"{readable(held)} by residents" + (f", {readable(results)} by results" if results else "")
        return f"; {used} of the device's {whole} are in use now, {stays}"

    def _make_room(self, used: tuple[str, ...]) -> None:
        """Before a second try: whatever else is on the device goes, except residents that the first has `used`."""
        self._device.free()
        device_results.shared.spill()
        residents.shared.evict(used)

    def _end_broken(self, error: BaseException) -> None:
        """End this process: a broken CUDA context stays broken. The journal still names the tasks that ran."""
        os.write(2, f"CUDA context is broken, executor ends: {error!r}\n".encode())
        try:
            self._say_broken(f"{type(error).__name__}: {error}"[:BROKEN_LIMIT])
        finally:
            os._exit(EXIT_DEVICE_FAULTY if self._device.is_faulty(error) else EXIT_DEVICE_BROKEN)

    def _used_by(self, loaded: LoadedTask) -> tuple[str, ...]:
        return self._used.get(loaded.name, ())

    def _note_used(self, loaded: LoadedTask, names: tuple[str, ...]) -> None:
        if names != self._used_by(loaded):
            self._used[loaded.name] = self._news[loaded.name] = names

    def _outcome(self, item: Item, loaded: LoadedTask, result: Result, batch: int) -> Outcome:
        token, logs, wishes = item.token, result.logs, result.wishes
        if result.error is not None:
            entry = Runner._enter_body.__code__
            failed = outcomes.failure(token, result.error, entry, result.out_of_memory, result.run_s)
            if result.out_of_memory:
                failed = failed._replace(message=failed.message + self._how_full())
            return failed._replace(logs=logs, wishes=wishes)
        try:
            value = self._sendable(item, loaded, result)
        except (DataError, SoftTimeLimitExceeded, Cancelled) as error:  # the store has not taken it, or not in time
            self._opener.undo()
            if not isinstance(error, DataError):
                self._journal.begin_again()  # the limit is every result's of a shared run
            failed = outcomes.failure(token, error, Runner._enter_body.__code__, False, result.run_s)
            return failed._replace(logs=logs, wishes=wishes)
        except Exception as error:
            self._opener.undo()
            if self._is_short_of_memory(error):
                failed = outcomes.failure(token, error, Runner._enter_body.__code__, True, result.run_s)
                message = f"{failed.message}; {TOO_FULL}{self._how_full()}"
                return failed._replace(message=message, logs=logs, wishes=wishes)
            message = f"{type(result.value).__name__}: {error}"[: outcomes.TEXT_LIMIT]
            return Failed(
                token, FailureKind.NOT_SENDABLE, type(error).__name__, message, run_s=result.run_s, logs=logs,
                wishes=wishes,
            )  # fmt: skip
        return Succeeded(token, value, result.run_s, batch, logs, wishes, self._opener.made())

    def _sendable(self, item: Item, loaded: LoadedTask, result: Result) -> bytes:
        """A value as it travels; on a device that is too full to keep or copy it, room is made, once."""
        try:
            return self._pickled(item, loaded, result.value)
        except Exception as error:
            if isinstance(error, DataError) or not self._is_short_of_memory(error):
                raise
        self._opener.undo()
        self._make_room(result.used)
        return self._pickled(item, loaded, result.value)

    def _pickled(self, item: Item, loaded: LoadedTask, value: Any) -> bytes:
        value = self._opener.sendable(loaded, value, item.stays, item.context)
        return pickle.dumps(outcomes.plain(value, loaded.keeps_models), 5)
