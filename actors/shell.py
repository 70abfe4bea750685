"""The actor without Ray: queue, leases, releases, limits, and one supervisor thread that owns the executors.

Call threads put entries into the queue and wait; the supervisor feeds executors, enforces limits and, when an executor
dies, reads from its journal who was running. It never touches CUDA and never imports the user's app.
"""

import math
import os
import platform
import select
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from actors.breaker import Breaker
from actors.child import Child, is_outcome
from actors.contract import (
    EXIT_DEVICE_FAULTY,
    PROTOCOL,
    STEP_DEVICE,
    ActorState,
    Asked,
    Busy,
    Call,
    Config,
    DeviceState,
    Done,
    FailureKind,
    Health,
    NotStarted,
    Outcome,
    Reason,
    Reply,
    StoreConfig,
    Succeeded,
    TaskCall,
)
from actors.entries import Entry, Limits, Tally, lost
from actors.gateway import Lender
from actors.journal import Running

#: Executors at once: the release in use and the one that takes over.
MAX_CHILDREN = 2
#: An executor of a release nobody has called for this long ends, once a newer one is there.
RETIRE_AFTER_S = 30.0
#: First and longest pause between attempts to start an executor.
BACKOFF_S = (0.5, 30.0)
#: After this many failed starts in a row, queued calls are handed back to their drivers.
START_ATTEMPTS = 3
#: An executor whose device has not become warm after this long is ended: the device hangs; in seconds.
WARM_DEVICE_S = 120.0
#: Executors that may die with one call while no body runs, before the call is blamed.
MAX_IDLE_DEATHS = 2
#: A reply needs this long, in seconds, to leave the process before it may end.
REPLY_LEAVES_S = 0.5
#: A body that runs this long in a call of tasks that should take far less holds up those behind it, in seconds.
HOLDS_UP_S = 0.1
#: Cancellations kept for calls that have not arrived, at most.
EARLY_CANCELS = 64
#: An interrupt that has not reached its body is sent again after this pause.
RESEND_S = 0.02


class ActorShell:
    """What a GPU actor does; thread-safe. `on_abandoned` is called once when no driver wants the actor any more.

    `reach_ray` gives executors Ray's object store.
    """

    def __init__(
        self, slot: int, limits: Limits, on_abandoned: Callable[[], None], accelerator: str = "",
        reach_ray: Callable[[StoreConfig], Lender] | None = None,
    ) -> None:  # fmt: skip
        self._slot = slot
        self._accelerator = accelerator
        self._limits = limits
        self._on_abandoned = on_abandoned
        self._reach_ray = reach_ray
        self._lock = threading.RLock()
        self._queue: deque[Entry] = deque()
        self._entries: dict[str, Entry] = {}
        self._large: dict[str, tuple[str, bytes]] = {}  # token -> driver, outcome
        self._drivers: dict[str, float] = {}
        self._releases: dict[str, str] = {}  # of each driver
        self._superseded: set[str] = set()
        self._configs: dict[str, Config] = {}
        self._children: dict[str, Child] = {}
        self._used_at: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._retry_at: dict[str, float] = {}
        self._reasons: dict[str, str] = {}
        self._early_cancels: dict[str, list[tuple[list[str], Reason]]] = {}  # by call
        self._breaker = Breaker(limits.breaker)
        self._has_cuda = False  # an executor has had a GPU here
        self._room = MAX_CHILDREN  # executors that the device has memory for together, as far as is known
        self._latest = ""  # the release of the last hello
        self._active: tuple[Entry, Child] | None = None
        self._interrupted: dict[int, float] = {}  # serial of the running body -> when last signalled
        self._tally = Tally()
        self._generation = self._recycled = 0
        self._heard_at = self._replied_at = self._worked_at = time.monotonic()
        self._closing = False
        self._untold: set[str] = set()  # drivers that do not know yet that it is closing
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._thread.start()

    # what drivers ask

    def hello(self, driver: str, supersedes: str, config: Config) -> Health:
        """A driver introduces itself and the release it wants; a superseded driver's work is dropped."""
        with self._lock:
            if supersedes:
                self._supersede(supersedes)
            if driver not in self._drivers and self._breaker.greet(time.monotonic()):
                self._failures.clear()
                self._retry_at.clear()
            self._configs[config.release.id] = config
            self._latest = self._releases[driver] = config.release.id
            self._hear(driver)
            self._wake()
            return self._tell(driver, config.release.id)

    def health(self, driver: str, release: str) -> Health:
        """The actor's account of itself for a release; renews the driver's lease."""
        with self._lock:
            self._hear(driver)
            return self._tell(driver, release)

    def run(self, call: Call, wait_s: float = 0.0) -> Reply | Busy:
        """Take a call; answers when it is finished, or after `reply_after_s` as soon as there is news.

        Args:
            wait_s: without any news it answers after so long; a second call to ask costs more than a thread that waits.
        """
        with self._lock:
            self._hear(call.driver)
            if call.driver in self._superseded:
                return lost(call, FailureKind.LOST, "another driver has taken over")
            if call.release not in self._configs:
                return lost(call, FailureKind.LOST, "the actor was restarted and does not know this release yet")
            if self._breaker.is_fenced:
                self._replied_at = time.monotonic()
                return Busy(self._queue_s(), f"fenced: {self._breaker.reason}")
            queued = sum(len(entry.todo) for entry in self._entries.values())
            if self._closing or (queued and queued + len(call.tasks) > self._limits.queued_tasks):
                self._replied_at = time.monotonic()
                return Busy(self._queue_s())
            entry = Entry(call, self._lock)
            patience_s = call.waits_s + HOLDS_UP_S
            entry.patient_until = time.monotonic() + (0.0 if self._queue_s() > patience_s else patience_s)
            self._entries[call.id] = entry
            self._queue.append(entry)
            for tokens, how in self._early_cancels.pop(call.id, ()):
                self._cancel(entry, tokens, how)
            self._start_call()  # if an executor has nothing to do; the supervisor would come a thread switch later
            if self._active is None or self._active[0] is not entry or entry.has_limits or len(call.tasks) > 1:
                self._wake()
            if not entry.changed.wait_for(lambda: entry.is_finished, self._limits.reply_after_s):
                entry.changed.wait_for(entry.has_news, wait_s)
            return self._reply(entry)

    def collect(self, call: Call, wait_s: float) -> Reply:
        """What has finished of an earlier call; waits up to `wait_s` for the next outcome."""
        with self._lock:
            self._hear(call.driver)
            entry = self._entries.get(call.id)
            if entry is None:
                return lost(call, FailureKind.UNSURE, "the actor was restarted, or the driver's lease ran out")
            entry.changed.wait_for(entry.has_news, wait_s)
            return self._reply(entry)

    def fetch(self, token: str) -> bytes:
        """A large outcome, pickled; once."""
        with self._lock:
            self._replied_at = time.monotonic()
            return self._large.pop(token)[1]

    def cancel(self, call_id: str, tokens: list[str], how: Reason = Reason.CANCEL) -> None:
        """Withdraw tasks that wait and interrupt the one that runs, in the way `how` says."""
        with self._lock:
            entry = self._entries.get(call_id)
            if entry is not None:
                self._cancel(entry, tokens, how)
            else:  # it has overtaken its call, or comes late; nobody can tell
                self._early_cancels.setdefault(call_id, []).append((tokens, how))
                while len(self._early_cancels) > EARLY_CANCELS:
                    del self._early_cancels[next(iter(self._early_cancels))]

    def drain(self) -> None:
        """Take no new calls; the actor ends when what it has is delivered and all its drivers have been told."""
        with self._lock:
            self._start_closing()
            self._wake()

    def forget(self, call_id: str) -> None:
        """Drop a call whose reply was lost on its way: nobody will ask for it again."""
        with self._lock:
            self._early_cancels.pop(call_id, None)
            entry = self._entries.get(call_id)
            if entry is not None:
                self._drop_entry(entry, "its reply was lost")
                self._wake()

    def close(self) -> None:
        """End the executors at once."""
        with self._lock:
            self._closing = True
            self._untold.clear()
            for child in self._children.values():
                child.kill("the actor ends")
            self._wake()

    # leases

    def _hear(self, driver: str) -> None:
        self._drivers[driver] = self._heard_at = time.monotonic()

    def _supersede(self, driver: str) -> None:
        self._superseded.add(driver)
        self._drivers.pop(driver, None)
        self._releases.pop(driver, None)
        self._drop(driver, "superseded")

    def _drop(self, driver: str, why: str) -> None:
        """Forget the calls of a driver that is gone; what runs of them is interrupted."""
        self._large = {token: kept for token, kept in self._large.items() if kept[0] != driver}
        for entry in [entry for entry in self._entries.values() if entry.call.driver == driver]:
            self._drop_entry(entry, why)

    def _drop_entry(self, entry: Entry, why: str) -> None:
        if self._active is not None and self._active[0] is entry:
            self._cancel(entry, [task.token for task in entry.todo])
        else:
            entry.fail(entry.todo, FailureKind.LOST, why)
        if entry in self._queue:
            self._queue.remove(entry)
        self._entries.pop(entry.call.id, None)

    def _expire_leases(self, now: float) -> None:
        gone = {driver for driver, heard in self._drivers.items() if now - heard > self._limits.lease_s}
        for driver in gone:
            del self._drivers[driver]
            self._releases.pop(driver, None)
            self._drop(driver, "lease ran out")

    # the supervisor

    def _supervise(self) -> None:
        try:
            self._loop()
        except BaseException:  # without its supervisor the actor would only look alive: Ray starts it again
            traceback.print_exc()
            os._exit(1)
        self._on_abandoned()

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._end_if_idle()
                if self._is_over():
                    break
                self._start_children()
                self._start_call()
                self._read_ahead()
                children = list(self._children.values())
                timeout = self._next_look()
            sources = [fd for child in children for fd in (child.socket.fileno(), child.exit_fd)]
            ready = _readable([self._wake_read, *sources], timeout)
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
            for child in children:
                if child.exit_fd in ready:
                    self._read_rest(child)
                elif child.socket.fileno() in ready:
                    self._read(child)
            with self._lock:
                now = time.monotonic()
                self._look_at_running(now)
                self._look_at_starting(now)
                self._expire_leases(now)

    def _is_over(self) -> bool:
        idle = not self._entries and not self._large and time.monotonic() - self._replied_at > REPLY_LEAVES_S
        if self._closing and not self._untold.isdisjoint(self._drivers):
            return False  # that driver may send a call at any moment
        unwanted = time.monotonic() - self._heard_at > self._limits.keep_warm_s
        return idle and (self._closing or unwanted)

    def _end_if_idle(self) -> None:
        """An actor beyond those that always stay gives its GPU back: it takes no new calls and ends."""
        if self._entries or self._breaker.is_fenced or any(child.ready is None for child in self._children.values()):
            self._worked_at = time.monotonic()
        elif time.monotonic() - self._worked_at > self._limits.keep_idle_s:
            self._start_closing()

    def _start_closing(self) -> None:
        if not self._closing:
            self._closing = True
            self._untold = set(self._drivers)

    def _start_children(self) -> None:
        wanted = dict.fromkeys(self._next_releases())
        now = time.monotonic()
        self._retire(set(wanted), now)
        for release in wanted:
            if release in self._children or now < self._retry_at.get(release, 0.0):
                continue
            if len(self._children) >= (1 if self._breaker.is_fenced else self._room):
                break
            if not self._breaker.may_start(now):
                break
            self._generation += 1
            config = self._config_of(release)
            self._children[release] = Child(config, self._reach_ray(config.stores) if self._reach_ray else None)

    def _config_of(self, release: str) -> Config:
        """Where there was a GPU, no executor may take NumPy instead: the GPU is broken, and tasks belong elsewhere."""
        config = self._configs[release]._replace(actor=self._slot)
        return config._replace(device="cuda") if self._has_cuda and config.device == "auto" else config

    def _retire(self, wanted: set[str], now: float) -> None:
        """End executors nobody needs: of releases without a living driver, or to make room for the next call's."""
        needed = wanted | set(self._releases.values())
        missing = next((release for release in self._next_releases() if release not in self._children), None)
        crowded = missing is not None and len(self._children) >= self._room
        idle = [child for child in self._children.values() if not child.planned_end and not self._is_busy(child)]
        for child in sorted(idle, key=self._last_used):
            release = child.release.id
            if crowded and release != self._first_release():
                child.kill("retired")
                crowded = False
            elif (
                release not in needed and now - self._last_used(child) > RETIRE_AFTER_S and self._is_ready(self._latest)
            ):
                child.kill("retired")

    def _next_releases(self) -> list[str]:
        """Releases in the order they are needed: of waiting calls, then the one drivers said hello with last."""
        latest = [self._latest] if self._latest and not self._closing else []  # an actor that ends warms nothing up
        return [*dict.fromkeys(entry.call.release for entry in self._queue), *latest]

    def _first_release(self) -> str:
        return next(iter(self._next_releases()), "")

    def _is_busy(self, child: Child) -> bool:
        return self._active is not None and self._active[1] is child

    def _last_used(self, child: Child) -> float:
        return self._used_at.get(child.release.id, child.started_at)

    def _is_ready(self, release: str) -> bool:
        child = self._children.get(release)
        return child is not None and child.ready is not None

    def _start_call(self) -> None:
        """Give the first call whose executor is ready to it."""
        if self._active is not None:
            return None
        for entry in self._queue:
            if self._is_ready(entry.call.release) and not self._children[entry.call.release].planned_end:
                break
        else:
            return None
        self._queue.remove(entry)
        child = self._children[entry.call.release]
        entry.fail([task for task in entry.todo if task.token in entry.cancelled], FailureKind.CANCELLED, "withdrawn")
        if entry.is_finished:
            return self._start_call()
        entry.sent = list(entry.todo)
        entry.started_at, entry.patient_until = time.monotonic(), math.inf
        entry.held_up.clear()
        self._active = entry, child
        try:
            child.send(entry.call._replace(tasks=tuple(entry.sent)))
        except OSError:  # it is dead, or will not take a call: its end is read next, and the entry goes back
            child.process.kill()
        return None

    def _read_ahead(self) -> None:
        """While one call runs, what the next one needs may be read; whatever else was is dropped."""
        if self._active is not None:
            child = self._active[1]
            following = (entry.call for entry in self._queue if entry.call.release == child.release.id)
            child.read_ahead(next(following, None))

    def _read(self, child: Child) -> None:
        try:
            messages = child.receive()
        except Exception as error:
            if not isinstance(error, EOFError):  # what cannot be read cannot be answered: start afresh
                child.process.kill()
            with self._lock:
                self._bury(child)
            return
        with self._lock:
            for message in messages:
                self._hear_executor(child, message)

    def _hear_executor(self, child: Child, message: Any) -> None:
        release = child.release.id
        if child.ready is not None:
            self._failures.pop(release, None)
            self._reasons.pop(release, None)
            if not child.planned_end:  # else what it had said before it was ended would end the fence
                self._breaker.started()
            self._has_cuda = self._has_cuda or child.ready.device["kind"] == "cuda"
        if self._active is None or self._active[1] is not child:
            return
        entry = self._active[0]
        if isinstance(message, Asked):
            entry.ask(message.token, message.wishes)
        self._take(entry, child, [message] if is_outcome(message) else [])
        if isinstance(message, Done):
            self._finish_call(child)

    def _read_rest(self, child: Child) -> None:
        """The process has ended: what it said before still counts."""
        while self._children.get(child.release.id) is child and child.has_more():
            self._read(child)
        with self._lock:
            if self._children.get(child.release.id) is child:
                self._bury(child)

    def _take(self, entry: Entry, child: Child, outcomes: list[Outcome]) -> None:
        for outcome in outcomes + child.new_outcomes():
            task = entry.record(outcome)
            if task is not None:
                self._tally.add(task.name, outcome)
                if isinstance(outcome, Succeeded):
                    self._breaker.succeeded(task.name)

    def _finish_call(self, child: Child) -> None:
        entry, _ = self._active  # type: ignore[misc]
        self._active = None
        self._interrupted.clear()
        self._used_at[child.release.id] = time.monotonic()
        self._tally.calls += 1
        if child.full:
            print(f"the executor of GPU actor {self._slot} is replaced: {child.full}", flush=True)  # noqa: T201
            self._recycled += 1
            child.kill("recycled")
        entry.fail(entry.todo, FailureKind.UNSURE, "the executor gave no outcome")  # cannot happen; better than silence

    def _bury(self, child: Child) -> None:
        """An executor is gone: what it finished counts, who was running is charged, the rest goes to its successor."""
        how = child.reap()
        release = child.release.id
        del self._children[release]
        fences = child.ready is None and self._note_failed_start(child, how)
        if self._active is not None and self._active[1] is child:
            entry, self._active = self._active[0], None
            self._interrupted.clear()
            self._take(entry, child, [])
            fences = child.broke_device and self._blame_device(entry, child, how)
            self._charge(entry, child, how)
            if not entry.is_finished:
                self._queue.appendleft(entry)
        child.close()
        if fences:
            self._fence()

    def _blame_device(self, entry: Entry, child: Child, how: str) -> bool:
        """Count a broken device; whether the GPU is to be fenced."""
        tasks, is_faulty = self._tasks_of(entry, child) or entry.sent, child.code == EXIT_DEVICE_FAULTY
        whose = frozenset(f"{entry.call.driver} {task.token.rpartition('.')[0] or task.token}" for task in tasks)
        return self._breaker.body_broke(whose, tasks[0].name, how, is_faulty, time.monotonic())

    def _fence(self) -> None:
        """The GPU is not to be used: what waits goes back to its drivers, who may have other actors."""
        print(f"GPU actor {self._slot} is fenced: {self._breaker.reason}", flush=True)  # noqa: T201 - Ray keeps it
        for child in self._children.values():
            child.kill("fenced")
        for entry in self._queue:
            entry.fail(entry.todo, FailureKind.LOST, f"fenced: {self._breaker.reason}")
        self._queue.clear()

    def _tasks_of(self, entry: Entry, child: Child) -> list[TaskCall]:
        """Those that run now, or ran when the executor died."""
        running = child.running()
        return entry.sent[running.first : running.first + running.size] if running else []

    def _charge(self, entry: Entry, child: Child, how: str) -> None:
        running = child.running()
        if running is None:
            self._count_idle_death(entry, child, how)
            return
        tasks = [task for task in entry.sent[running.first : running.first + running.size] if task in entry.todo]
        if child.planned_end and running.serial == child.serial_to_end:
            aimed = [task for task in tasks if len(tasks) == 1 or task.token in entry.cancelled]
            kind = FailureKind.CANCELLED if child.planned_end == "cancelled" else FailureKind.HARD_LIMIT
            entry.fail(aimed or tasks, kind, child.planned_end)
        elif not child.planned_end:
            self._tally.crashes += 1
            entry.fail(tasks, FailureKind.CRASHED if len(tasks) == 1 else FailureKind.SUSPECT, how)
        # whoever else was running when the actor itself ended the executor is innocent, but it has started
        entry.fail([task for task in tasks if task in entry.todo], FailureKind.UNSURE, "ended because of another task")

    def _count_idle_death(self, entry: Entry, child: Child, how: str) -> None:
        """An executor that dies twice around the bodies of one call has been ended by that call all the same."""
        entry.idle_deaths += not child.planned_end
        if entry.idle_deaths >= MAX_IDLE_DEATHS:
            entry.fail(entry.todo, FailureKind.CRASHED if len(entry.todo) == 1 else FailureKind.SUSPECT, how)

    def _note_failed_start(self, child: Child, how: str) -> bool:
        """Whether the GPU is to be fenced."""
        release = child.release.id
        if child.planned_end:
            return False
        failures = self._failures[release] = self._failures.get(release, 0) + 1
        first, longest = BACKOFF_S
        self._retry_at[release] = time.monotonic() + min(longest, first * 2 ** (failures - 1))
        reason = child.failed.reason if child.failed else f"its process ended while {child.step}: {how}"
        self._reasons[release] = f"{reason} (attempt {failures})"
        if failures >= START_ATTEMPTS:
            for entry in [entry for entry in self._queue if entry.call.release == release]:
                entry.fail(entry.todo, FailureKind.LOST, f"executor does not start: {reason}")
                self._queue.remove(entry)
        is_device = child.failed.device if child.failed else child.step == STEP_DEVICE
        if self._children:  # the GPU works for another release: at most there is no room for both
            self._room = 1 if child.failed and child.failed.memory else self._room
            return False
        if child.failed and child.failed.memory:
            return False  # somebody else has it, or too much is wanted of it
        return is_device and self._breaker.start_failed(reason, time.monotonic())

    def _look_at_starting(self, now: float) -> None:
        """A device that hangs when it is touched does not answer at all: end its executor."""
        for child in self._children.values():
            is_stuck = child.ready is None and child.step == STEP_DEVICE and now - child.step_since > WARM_DEVICE_S
            if is_stuck and child.failed is None:
                child.failed = NotStarted(f"the device was not warm after {WARM_DEVICE_S:g} s", device=True)
                child.process.kill()

    # limits and cancellation

    def _cancel(self, entry: Entry, tokens: list[str], how: Reason = Reason.CANCEL) -> None:
        if how is Reason.SOFT_LIMIT:
            running = self._running_tokens(entry)
            entry.softened |= running.intersection(tokens)
            tokens = [token for token in tokens if token not in running]
        since = -math.inf if how is Reason.KILL else time.monotonic()
        entry.cancelled.update({token: min(since, entry.cancelled.get(token, since)) for token in tokens})
        if self._active is not None and self._active[0] is entry:
            for index, task in enumerate(entry.sent):
                if task.token in tokens:
                    self._active[1].journal.cancel(index)
        self._wake()

    def _look_at_running(self, now: float) -> None:
        """Enforce limits and cancellations on the body that runs now."""
        if self._active is None:
            return
        self._hand_back(now)
        entry, child = self._active
        running = child.running()
        if running is None or child.planned_end:
            return
        tasks = entry.sent[running.first : running.first + running.size]
        ran_s = now - running.started_ns / 1e9
        if entry.call.may_part and ran_s > HOLDS_UP_S:
            self._part(entry, child, running)
        cancelled = [entry.cancelled[task.token] for task in tasks if task.token in entry.cancelled]
        alone = len(tasks) == 1  # one cancelled task of a shared run ends when the run ends
        softened = alone and tasks[0].token in entry.softened
        if alone and cancelled and now - cancelled[0] > self._limits.grace_s:
            child.kill("cancelled", running.serial)
        elif _exceeded(ran_s, [task.hard_limit_s for task in tasks]):
            child.kill("hard limit", running.serial)
        elif alone and cancelled:
            self._interrupt(child, running.serial, Reason.CANCEL, now)
        elif softened or _exceeded(ran_s, [task.soft_limit_s for task in tasks]):
            if running.serial not in self._interrupted:
                entry.hit_soft_limit(task.token for task in tasks if _exceeded(ran_s, [task.soft_limit_s]))
            self._interrupt(child, running.serial, Reason.SOFT_LIMIT, now)

    def _hand_back(self, now: float) -> None:
        """Give back calls whose turn should have come long ago: their drivers hear the truth and choose again."""
        late = [each for each in self._queue if now >= each.patient_until and self._is_ready(each.call.release)]
        for entry in late:
            self._queue.remove(entry)
            entry.fail(entry.todo, FailureKind.HELD_UP, "what is ahead of it takes far longer than foreseen")

    def _part(self, entry: Entry, child: Child, running: Running) -> None:
        """Give back the tasks behind a slow one: another actor may be free."""
        waiting = entry.behind(running.first + running.size)
        if not waiting:
            return
        entry.held_up.update(entry.sent[index].token for index in waiting)
        for index in waiting:
            child.journal.cancel(index)
        if child.running() == running:  # it has not ended meanwhile, so the next one has not been looked at
            slow = "a task ahead of it takes far longer than foreseen"
            entry.fail([entry.sent[index] for index in waiting], FailureKind.HELD_UP, slow)

    def _interrupt(self, child: Child, serial: int, reason: Reason, now: float) -> None:
        if child.journal.taken() != serial or self._interrupted.get(serial) != reason:
            self._interrupted = {serial: reason}
            child.interrupt(serial, reason)

    def _next_look(self) -> float:
        """Seconds until something must be looked at without being asked."""
        times = [1.0]
        looks = [*self._retry_at.values(), self._breaker.probe_at]
        times += [at - time.monotonic() for at in looks if at > time.monotonic()]
        if self._active is not None:
            entry, child = self._active
            running = child.running()
            now = time.monotonic()
            ran_s = now - running.started_ns / 1e9 if running else 0.0
            times += [each.patient_until - now for each in self._queue if self._is_ready(each.call.release)]
            if entry.call.may_part and running and entry.behind(running.first + running.size):
                times.append(HOLDS_UP_S - ran_s if ran_s < HOLDS_UP_S else RESEND_S)
            for task in entry.todo:
                for limit in (task.soft_limit_s, task.hard_limit_s):
                    if limit:
                        times.append(limit - ran_s if limit > ran_s else RESEND_S)
            if entry.cancelled or entry.softened:
                times.append(RESEND_S)
        return max(0.001, min(times))

    # answers

    def _reply(self, entry: Entry) -> Reply:
        self._replied_at = time.monotonic()
        if self._active is not None and self._active[0] is entry:
            self._take(entry, self._active[1], [])
        answers = entry.deliver(self._limits.inline_bytes, self._running_tokens(entry), self._large)
        if entry.is_delivered:
            self._entries.pop(entry.call.id, None)
        return Reply(answers, self._queue_s())

    def _running_tokens(self, entry: Entry) -> frozenset[str]:
        now = self._active[1].running() if self._active is not None and self._active[0] is entry else None
        return frozenset(task.token for task in entry.sent[now.first : now.first + now.size]) if now else frozenset()

    def _queue_s(self) -> float:
        """How long a new call would wait, as far as foreseen.

        Of a call that has run longer than foreseen nobody knows: as long again, and no less than a lease, within which
        every driver hears of the actor anew.
        """
        waiting_s = sum(entry.call.estimate_s for entry in self._queue)
        if self._active is None:
            return waiting_s
        entry, _ = self._active
        ran_s = time.monotonic() - entry.started_at
        is_late = ran_s > max(entry.call.estimate_s, HOLDS_UP_S)
        left_s = max(ran_s, self._limits.lease_s) if is_late else max(0.0, entry.call.estimate_s - ran_s)
        return waiting_s + left_s

    def _tell(self, driver: str, release: str) -> Health:
        if driver in self._untold:
            self._untold.discard(driver)
            self._replied_at = time.monotonic()  # the word must leave before the process does
        return self._health(release)

    def _health(self, release: str) -> Health:
        child = self._children.get(release)
        ready = child.ready if child else None
        device = child.device if child else DeviceState(0, 0, 0, {}, {})
        if self._closing:
            state, reason = ActorState.DRAINING, "finishes what it has, then ends"
        elif self._breaker.is_fenced:
            state, reason = ActorState.FENCED, self._breaker.reason
        elif ready is not None:
            state, reason = ActorState.READY, ""
        elif release in self._reasons:
            state, reason = ActorState.FAILING, self._reasons[release]
        elif child is None and release in self._configs and release != self._latest:
            state, reason = ActorState.READY, "its executor starts with the next call"
        else:
            state, reason = ActorState.STARTING, child.step if child else "queued"
        return Health(
            protocol=PROTOCOL,
            slot=self._slot,
            node=platform.node(),
            pid=os.getpid(),
            state=state,
            reason=reason,
            knows_release=release in self._configs,
            failed_starts=self._failures.get(release, 0),
            device=ready.device if ready else {},
            executor_pid=child.process.pid if child else 0,
            executor=ready.executor if ready else "",
            generation=self._generation,
            warm_s=ready.warm_s if ready else 0.0,
            tasks=self._tally.tasks,
            calls=self._tally.calls,
            crashes=self._tally.crashes,
            queued=sum(len(entry.todo) for entry in self._queue),
            queue_s=self._queue_s(),
            running=self._running_name(),
            by_task=self._tally.by_task(),
            memory_used_bytes=device.memory_used,
            memory_total_bytes=device.memory_total,
            memory_free_bytes=device.memory_free,
            residents=device.residents,
            warm_for=child.warm_for() if child else (),
            results=device.results._asdict(),
            accelerator=self._accelerator,
            share=self._limits.share,
            recycled=self._recycled,
            device_faults=self._breaker.total,
            probe_in_s=max(0.0, self._breaker.probe_at - time.monotonic()) if self._breaker.is_fenced else None,
        )

    def _running_name(self) -> str:
        if self._active is None:
            return ""
        entry, child = self._active
        running = child.running()
        return entry.sent[running.first].name if running else ""

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it is awake already
            os.write(self._wake_write, b"x")


def _readable(descriptors: list[int], timeout_s: float) -> set[int]:
    """Those that can be read or are closed at the other end; multiprocessing's `wait` costs ten times as much."""
    poll = select.poll()
    for fd in descriptors:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(math.ceil(1000 * timeout_s))}


def _exceeded(ran_s: float, limits: list[Any]) -> bool:
    return any(limit is not None and limit and ran_s >= limit for limit in limits)
