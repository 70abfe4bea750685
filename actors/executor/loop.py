"""The child process that owns the CUDA context and runs bodies on its main thread. Never imports ray.

It loads one release of the user's app, warms the device, says Ready, then takes one call after the other from its pipe.
Each body is noted in the journal before it starts; each outcome is in the journal, or in the pipe when it is large, as
soon as its body has ended.
"""

import ctypes
import math
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

from celery import _state as celery_state

from actors import frames
from actors.contract import (
    EXIT_NOT_STARTED,
    STEP_DEVICE,
    Asked,
    Bell,
    Broken,
    Call,
    Config,
    DeviceState,
    Done,
    Full,
    NotStarted,
    Outcome,
    Ready,
    Step,
)
from actors.data import arrays, stores
from actors.data.ahead import Shelf
from actors.executor import device_results, residents
from actors.executor.device import is_short_of_memory, open_device
from actors.executor.device_api import Device, DeviceUnusable
from actors.executor.leaks import Leaks
from actors.executor.logs import Output
from actors.executor.release import load_app
from actors.executor.runner import Runner
from actors.executor.signals import executor_init
from actors.executor.surroundings import Surroundings
from actors.garbage import settle
from actors.gateway import ActorStore
from actors.journal import Journal
from actors.sizes import read_bytes, read_limit

#: The actor is told of finished tasks at most this often while a call goes on; it can always read the journal itself.
BELL_EVERY_S = 0.001
#: The actor is told of the device's memory at most this often, in seconds: asking a GPU for it takes time.
MEMORY_EVERY_S = 1.0
_PR_SET_PDEATHSIG = 1


class Executor:
    """Takes calls; one instance per process, on the main thread."""

    def __init__(self, pipe: Connection, journal: Journal, config: Config, shelf: Shelf) -> None:
        self._pipe = pipe
        self._speaking = threading.Lock()  # a body may report progress from threads of its own
        self._journal = journal
        self._config = config
        self._shelf = shelf
        self._runner = Runner(journal, config, lambda token, data: self._say(Asked(token, data)), self._say_broken)
        self._device: Device
        self._told_at = -math.inf  # when the device's state was last told
        self._told_changes = -1  # of residents and results, by then
        os.register_at_fork(after_in_child=pipe.close)  # or the actor would not see this process end

    def start(self) -> None:
        """Load the release and warm everything a first task would otherwise wait for."""
        started = time.monotonic()
        self._say(Step("importing the app"))
        sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
        app = load_app(self._config.release)
        arrays.keeps_forms = True
        celery_state._set_task_join_will_block(True)  # as in a prefork child: a body must not wait for other tasks
        self._runner.load(app)
        self._say(Step(STEP_DEVICE))
        self._device = open_device(self._config.device, self._config.memory_limit)
        self._device.warm_up()
        self._runner.use(self._device)
        info = self._device.describe()
        self._has_memory = info.memory_bytes > 0
        settle()  # not after residents are loaded: of those that are evicted, cycles must be found
        executor_init.send(sender=app, device=info._asdict())
        self._say(Step("loading residents"))
        residents.shared.limit_bytes = read_limit(self._config.resident_limit, info.memory_bytes)
        residents.load_all()
        results = device_results.shared
        results.host_limit_bytes = read_bytes(self._config.host_results_limit)
        of_device = read_limit(self._config.results_limit, info.memory_bytes)  # None: NumPy, in the host's memory
        results.device_limit_bytes = results.host_limit_bytes if of_device is None else of_device
        self._say(Step("running examples"))
        self._runner.run_examples()
        self._device.synchronize()
        self._runner.close_connections()  # of residents and examples
        left_limit = read_limit(self._config.left_limit, info.memory_bytes) or 0
        self._leaks = Leaks(self._device, residents.shared, results, left_limit)
        self._surroundings = Surroundings()
        self._tell_device()
        self._say(Ready(info._asdict(), time.monotonic() - started, results.executor))

    def serve(self) -> None:
        """Take calls until the actor closes the pipe."""
        while True:
            try:
                self._expire_results()
                call: Call = frames.receive(self._pipe.fileno())
            except (EOFError, ConnectionError):  # the second where the actor died with unread messages
                return
            self._run_call(call)
            device_results.shared.tidy()
            self._tell_device()
            complaint = self._leaks.complaint()
            if complaint:
                self._say(Full(complaint))
            self._say(Done(call.id))

    def _expire_results(self) -> None:
        """While no call comes, results go when their time is over: the device may not be only ours."""
        while (wait_s := device_results.shared.expires_in_s()) is not None and not self._pipe.poll(wait_s):
            device_results.shared.tidy()
            self._tell_device()

    def _run_call(self, call: Call) -> None:
        index, bell = 0, time.monotonic()
        self._runner.start_call()
        self._shelf.begin(call.ahead)
        while index < len(call.tasks):
            for outcome in self._runner.run(call.tasks, index):
                self._deliver(outcome)
                index += 1
            self._journal.end()  # not before: who dies while its value is made plain and pickled has run
            self._surroundings.restore()
            self._leaks.note(call.tasks[index - 1].name)
            if time.monotonic() - bell > BELL_EVERY_S and index < len(call.tasks):
                self._say(Bell())
                bell = time.monotonic()
        self._shelf.end()

    def _deliver(self, outcome: Outcome) -> None:
        data = pickle.dumps(outcome, 5)
        if not self._journal.append(data):
            self._pipe.send_bytes(data)

    def _tell_device(self) -> None:
        """Tell what is on the device, if it has changed; memory, which other processes take too, from time to time."""
        touched = self._runner.take_touched()
        is_due = self._has_memory and time.monotonic() - self._told_at > MEMORY_EVERY_S
        changes = residents.shared.changes + device_results.shared.changes
        if not (touched or is_due or changes != self._told_changes):
            return
        self._told_at, self._told_changes = time.monotonic(), changes
        held, results = residents.shared.sizes(), device_results.shared.holdings()
        memory = self._device.memory(residents.shared.size_bytes() + results.device_bytes)
        self._say(DeviceState(memory.used, memory.total, memory.free, held, touched, results))

    def _say_broken(self, text: str) -> None:
        """The last word of this process; it does not wait for a thread that is in the middle of one."""
        if self._speaking.acquire(timeout=1.0):
            self._pipe.send_bytes(pickle.dumps(Broken(text), 5))

    def _say(self, message: Any) -> None:
        with self._speaking:
            self._pipe.send_bytes(pickle.dumps(message, 5))


def main(pipe_fd: int, journal_fd: int, ahead_fd: int, gateway_fd: int | None = None) -> None:
    """Entry of the child process; the actor has passed the descriptors."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is for the worker to decide on
    pipe = Connection(pipe_fd)
    config: Config = frames.receive(pipe_fd)
    in_ray = ActorStore(gateway_fd, config.stores.timeout_s)
    stores.reach_ray = lambda _app, _config: in_ray
    stores.shelf = shelf = Shelf(ahead_fd)
    executor = Executor(pipe, Journal(journal_fd), config, shelf)
    try:
        executor.start()
    except ConnectionError:  # nobody waits for it any more
        os._exit(EXIT_NOT_STARTED)
    except BaseException as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        failed = NotStarted(reason, isinstance(error, DeviceUnusable), memory=is_short_of_memory(error))
        pipe.send_bytes(pickle.dumps(failed, 5))
        os._exit(EXIT_NOT_STARTED)
    executor.serve()
