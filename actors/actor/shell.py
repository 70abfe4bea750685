"""The actor without Ray: a queue of calls, and one supervisor thread that feeds the executors.

Call threads put entries (`entries.py`) into the queue and wait. The supervisor starts executors (`children.py`), gives
them one call after another and enforces its limits (`active.py`); when an executor dies, the journal says who was
running. Who may still ask for something, and when the actor ends, is in `leases.py`. It never touches CUDA and never
imports the user's app.
"""

import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from actors.actor.account import Account
from actors.actor.active import HOLDS_UP_S, ActiveCall
from actors.actor.child import Child, is_outcome
from actors.actor.children import Children
from actors.actor.entries import Entry, Limits, lost
from actors.actor.leases import Leases
from actors.actor.waker import Waker
from actors.contract import (
    Asked,
    Busy,
    Call,
    Config,
    Done,
    FailureKind,
    Health,
    Outcome,
    Reason,
    Reply,
    StoreConfig,
    Succeeded,
)
from actors.gateway import Lender

#: Cancellations kept for calls that have not arrived, at most.
EARLY_CANCELS = 64
#: A call that expects to wait comes back at once if so many times that is ahead of it. The foreseen end of a late call
#: recedes while another one is under way, and what its driver has heard must not send that back again and again.
MORE_THAN_SAID = 1.5


class ActorShell:
    """What a GPU actor does; thread-safe. `on_abandoned` is called once when no driver wants the actor any more.

    `reach_ray` gives executors Ray's object store.
    """

    def __init__(
        self, slot: int, limits: Limits, on_abandoned: Callable[[], None], accelerator: str = "",
        reach_ray: Callable[[StoreConfig], Lender] | None = None,
    ) -> None:  # fmt: skip
        self._slot = slot
        self._limits = limits
        self._on_abandoned = on_abandoned
        self._lock = threading.RLock()
        self._leases = Leases(limits)
        self._queue: deque[Entry] = deque()
        self._entries: dict[str, Entry] = {}
        self._large: dict[str, tuple[str, bytes]] = {}  # token -> driver, outcome
        self._early_cancels: dict[str, list[tuple[list[str], Reason]]] = {}  # by call
        self._children = Children(slot, limits.breaker, reach_ray)
        self._active: ActiveCall | None = None
        self._account = Account(slot, accelerator, limits.share, self._children)
        self._waker = Waker()
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._thread.start()

    # what drivers ask

    def hello(self, driver: str, supersedes: str, config: Config) -> Health:
        """A driver introduces itself and the release it wants; a superseded driver's work is dropped."""
        with self._lock:
            if supersedes:
                self._leases.supersede(supersedes)
                self._drop(supersedes, "superseded")
            if driver not in self._leases:
                self._children.greet()
            self._children.learn(config)
            self._leases.want(driver, config.release.id)
            self._leases.hear(driver)
            self._waker.wake()
            return self._tell(driver, config.release.id)

    def health(self, driver: str, release: str) -> Health:
        """The actor's account of itself for a release; renews the driver's lease."""
        with self._lock:
            self._leases.hear(driver)
            return self._tell(driver, release)

    def run(self, call: Call, wait_s: float = 0.0) -> Reply | Busy:
        """Take a call; answers when it is finished, or after `reply_after_s` as soon as there is news.

        Args:
            wait_s: without any news it answers after so long; a second call to ask costs more than a thread that waits.
        """
        with self._lock:
            self._leases.hear(call.driver)
            if self._leases.is_superseded(call.driver):
                return lost(call, FailureKind.LOST, "another driver has taken over")
            if not self._children.knows(call.release):
                return lost(call, FailureKind.LOST, "the actor was restarted and does not know this release yet")
            if self._children.breaker.is_fenced:
                self._leases.note_reply()
                return Busy(self._queue_s(), f"fenced: {self._children.breaker.reason}")
            queued = sum(len(entry.todo) for entry in self._entries.values())
            if self._leases.is_closing or (queued and queued + len(call.tasks) > self._limits.queued_tasks):
                self._leases.note_reply()
                return Busy(self._queue_s())
            entry = Entry(call, self._lock)
            is_news = self._queue_s() > MORE_THAN_SAID * call.waits_s + HOLDS_UP_S
            entry.patient_until = time.monotonic() + (0.0 if is_news else call.waits_s + HOLDS_UP_S)
            self._entries[call.id] = entry
            self._queue.append(entry)
            for tokens, how in self._early_cancels.pop(call.id, ()):
                self._cancel(entry, tokens, how)
            self._start_call()  # if an executor has nothing to do; the supervisor would come a thread switch later
            if self._active_of(entry) is None or entry.has_limits or len(call.tasks) > 1:
                self._waker.wake()
            if not entry.changed.wait_for(lambda: entry.is_finished, self._limits.reply_after_s):
                entry.changed.wait_for(entry.has_news, wait_s)
            return self._reply(entry)

    def collect(self, call: Call, wait_s: float) -> Reply:
        """What has finished of an earlier call; waits up to `wait_s` for the next outcome."""
        with self._lock:
            self._leases.hear(call.driver)
            entry = self._entries.get(call.id)
            if entry is None:
                return lost(call, FailureKind.UNSURE, "the actor was restarted, or the driver's lease ran out")
            entry.changed.wait_for(entry.has_news, wait_s)
            return self._reply(entry)

    def fetch(self, token: str) -> bytes:
        """A large outcome, pickled; once."""
        with self._lock:
            self._leases.note_reply()
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
            self._leases.drain()
            self._waker.wake()

    def forget(self, call_id: str, tokens: list[str]) -> None:
        """Drop a call whose reply was lost on its way; `tokens` are its tasks of which the driver has not heard.

        Nobody will ask for those again. Large outcomes of others the driver may still fetch.
        """
        with self._lock:
            self._early_cancels.pop(call_id, None)
            for token in tokens:
                self._large.pop(token, None)
            entry = self._entries.get(call_id)
            if entry is not None:
                self._drop_entry(entry, "its reply was lost")
                self._waker.wake()

    def close(self) -> None:
        """End the executors at once."""
        with self._lock:
            self._leases.close()
            self._children.end("the actor ends")
            self._waker.wake()

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
                if self._is_over():
                    break
                self._supply()
                is_idle = not (self._entries or self._children.breaker.is_fenced or self._children.is_one_starting())
                self._leases.drain_if_idle(is_idle)  # what has just been supplied is starting
                self._start_call()
                self._read_ahead()
                children = list(self._children)
                timeout = self._next_look()
            sources = [fd for child in children for fd in (child.socket.fileno(), child.exit_fd)]
            ready = self._waker.wait(sources, timeout)
            for child in children:
                if child.exit_fd in ready:
                    self._read_rest(child)
                elif child.socket.fileno() in ready:
                    self._read(child)
            with self._lock:
                now = time.monotonic()
                self._look_at_running(now)
                self._children.look_at_starting(now)
                for driver in self._leases.expire(now):
                    self._drop(driver, "lease ran out")

    def _is_over(self) -> bool:
        return not self._entries and not self._large and self._leases.is_over()

    # executors and their calls

    def _supply(self) -> None:
        waiting = [entry.call.release for entry in self._queue]
        busy = self._active.child if self._active is not None else None
        self._children.supply(waiting, self._leases.releases(), busy, self._leases.is_closing)

    def _start_call(self) -> None:
        """Give the first call whose executor is ready to it."""
        if self._active is not None:
            return
        for entry in list(self._queue):
            child = self._children.ready(entry.call.release)
            if child is None or child.planned_end:
                continue
            self._queue.remove(entry)
            withdrawn = [task for task in entry.todo if task.token in entry.cancelled]
            entry.fail(withdrawn, FailureKind.CANCELLED, "withdrawn")
            if not entry.is_finished:
                self._active = ActiveCall(entry, child)
                self._active.hand_over()
                break

    def _read_ahead(self) -> None:
        """While one call runs, what the next one needs may be read; whatever else was is dropped."""
        if self._active is not None:
            child = self._active.child
            following = (entry.call for entry in self._queue if entry.call.release == child.release.id)
            child.read_ahead(next(following, None))

    def _active_of(self, entry: Entry) -> ActiveCall | None:
        return self._active if self._active is not None and self._active.entry is entry else None

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
        self._children.heard(child)
        active = self._active
        if active is None or active.child is not child:
            return
        if isinstance(message, Asked):
            active.entry.ask(message.token, message.wishes)
        self._take(active, [message] if is_outcome(message) else [])
        if isinstance(message, Done):
            self._finish_call(active)

    def _read_rest(self, child: Child) -> None:
        """The process has ended: what it said before still counts."""
        while child in self._children and child.has_more():
            self._read(child)
        with self._lock:
            if child in self._children:
                self._bury(child)

    def _take(self, active: ActiveCall, outcomes: list[Outcome]) -> None:
        for outcome in outcomes + active.child.new_outcomes():
            task = active.entry.record(outcome)
            if task is not None:
                self._account.tally.add(task.name, outcome)
                if isinstance(outcome, Succeeded):
                    self._children.breaker.succeeded(task.name)

    def _finish_call(self, active: ActiveCall) -> None:
        entry, self._active = active.entry, None
        self._account.tally.calls += 1
        self._children.call_ended(active.child)
        entry.fail(entry.todo, FailureKind.UNSURE, "the executor gave no outcome")  # cannot happen; better than silence

    def _bury(self, child: Child) -> None:
        """An executor is gone: what it finished counts, who was running is charged, the rest goes to its successor."""
        gone = self._children.bury(child)
        fences = gone.fences
        if gone.hopeless is not None:
            for entry in [entry for entry in self._queue if entry.call.release == child.release.id]:
                entry.fail(entry.todo, FailureKind.LOST, f"executor does not start: {gone.hopeless}")
                self._queue.remove(entry)
        if self._active is not None and self._active.child is child:
            active, self._active = self._active, None
            self._take(active, [])
            fences = child.broke_device and active.blame_device(self._children.breaker, gone.how)
            self._account.tally.crashes += active.charge(gone.how)
            if not active.entry.is_finished:
                self._queue.appendleft(active.entry)
        child.close()
        if fences:
            self._fence()

    def _fence(self) -> None:
        """The GPU is not to be used: what waits goes back to its drivers, who may have other actors."""
        reason = self._children.breaker.reason
        print(f"GPU actor {self._slot} is fenced: {reason}", flush=True)  # noqa: T201 - Ray keeps it
        self._children.end("fenced")
        for entry in self._queue:
            entry.fail(entry.todo, FailureKind.LOST, f"fenced: {reason}")
        self._queue.clear()

    # limits and cancellation

    def _cancel(self, entry: Entry, tokens: list[str], how: Reason = Reason.CANCEL) -> None:
        active = self._active_of(entry)
        withdrawn = entry.cancel(tokens, how, active.running_tokens() if active else frozenset())
        if active is not None:
            active.withdraw(withdrawn)
        self._waker.wake()

    def _look_at_running(self, now: float) -> None:
        if self._active is not None:
            self._hand_back(now)
            self._active.enforce(now, self._limits.grace_s)

    def _hand_back(self, now: float) -> None:
        """Give back calls whose turn should have come long ago: their drivers hear the truth and choose again."""
        late = [each for each in self._queue if now >= each.patient_until and self._children.ready(each.call.release)]
        for entry in late:
            self._queue.remove(entry)
            entry.fail(entry.todo, FailureKind.HELD_UP, "what is ahead of it takes far longer than foreseen")

    def _next_look(self) -> float:
        """Seconds until something must be looked at without being asked."""
        now = time.monotonic()
        times = [1.0, *(at - now for at in self._children.due() if at > now)]
        if self._active is not None:
            times += [each.patient_until - now for each in self._queue if self._children.ready(each.call.release)]
            times += self._active.looks(now)
        return max(0.001, min(times))

    # calls that nobody waits for

    def _drop(self, driver: str, why: str) -> None:
        """Forget the calls of a driver that is gone; what runs of them is interrupted."""
        self._large = {token: kept for token, kept in self._large.items() if kept[0] != driver}
        for entry in [entry for entry in self._entries.values() if entry.call.driver == driver]:
            self._drop_entry(entry, why)

    def _drop_entry(self, entry: Entry, why: str) -> None:
        if self._active_of(entry) is not None:
            self._cancel(entry, [task.token for task in entry.todo])
        else:
            entry.fail(entry.todo, FailureKind.LOST, why)
        if entry in self._queue:
            self._queue.remove(entry)
        self._entries.pop(entry.call.id, None)

    # answers

    def _reply(self, entry: Entry) -> Reply:
        self._leases.note_reply()
        active = self._active_of(entry)
        if active is not None:
            self._take(active, [])
        running = active.running_tokens() if active else frozenset()
        large = self._large if entry.call.id in self._entries else {}  # nobody fetches what was dropped meanwhile
        answers = entry.deliver(self._limits.inline_bytes, running, large)
        if entry.is_delivered:
            self._entries.pop(entry.call.id, None)
        return Reply(answers, self._queue_s())

    def _queue_s(self) -> float:
        """How long a new call would wait, as far as foreseen.

        Behind a call that is late for no less than a lease, within which every driver hears of the actor anew.
        """
        waiting_s = sum(entry.call.estimate_s for entry in self._queue)
        return waiting_s + (self._active.left_s(self._limits.lease_s) if self._active is not None else 0.0)

    def _tell(self, driver: str, release: str) -> Health:
        self._leases.note_told(driver)
        queued = sum(len(entry.todo) for entry in self._queue)
        running = self._active.running() if self._active is not None else []
        name = running[0].name if running else ""
        return self._account.health(release, self._leases.is_closing, queued, self._queue_s(), name)
