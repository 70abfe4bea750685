"""The driver process: Celery's own tracer for every GPU task, in greenlets on one loop; bodies run elsewhere.

Started by the worker as prefork starts its children. Here is the loop; what it hears goes to the part it is for. In the
order of a task's way these are `in_hand.py` (its tasks, and what the worker hears of them), `waiting.py` (until a task
leaves; then its tracer starts, `tracing.py`), `calls.py` (while it is with an actor) and `finishing.py` (its outcome
resumes its tracer, or it runs again). Nothing here touches CUDA or runs a body.
"""

import logging
import os
import select
import signal
import socket
import sys
import time
import uuid
from collections import deque
from typing import Any

from billiard.pool import MaybeEncodingError
from celery.concurrency.prefork import process_destructor, process_initializer

from actors.contract import Config, FailureKind, Reason
from actors.data import arrays
from actors.garbage import settle
from bridge import link as messages
from bridge.auth import use_token
from bridge.driver.blame import Blame
from bridge.driver.calls import Calls
from bridge.driver.errands import Errands
from bridge.driver.finishing import Finishing
from bridge.driver.head import outlast
from bridge.driver.in_hand import TasksInHand
from bridge.driver.ledger import Answered, Ledger
from bridge.driver.lines import TaskRule
from bridge.driver.news import (
    ActorReleased,
    ClusterLost,
    Connected,
    Fetched,
    Replied,
    SlotChanged,
    StartFailed,
)  # fmt: skip
from bridge.driver.orders import Drop, Event, HandBack, Interrupt, StartCall, TaskCancelled, Tick, WakeAt
from bridge.driver.results import GroupedResults
from bridge.driver.roster import Alarm, Roster
from bridge.driver.scheduler import Rules, Scheduler
from bridge.driver.tracing import TracedTask, einfo, prepare
from bridge.driver.waiting import GROW_AFTER_S, WaitingTasks
from bridge.errors import MessageInvalid, StartupError
from bridge.link import Link
from bridge.marks import Mark, map_marks, marks_of
from bridge.places import needs
from bridge.settings import Settings, settings

logger = logging.getLogger(__name__)

#: Exit codes of the driver: the cluster is gone; it could not start (it has reported why).
EXIT_CLUSTER_LOST = 75
EXIT_NOT_STARTED = 76
#: The worker hears of the driver at least this often, in seconds; silence means that it is stuck.
REPORT_S = 5.0
#: How often it is looked whether tasks wait in vain, in seconds.
LOOK_S = 0.25
#: How a task is cancelled by signals that mean something to a prefork child; any other interrupts its body.
_BY_SIGNAL: dict[int, Reason] = {signal.SIGUSR1: Reason.SOFT_LIMIT, signal.SIGKILL: Reason.KILL}


class Driver:
    """The loop; one instance per driver process."""

    def __init__(
        self, app: Any, sock: socket.socket, marks: dict[str, Mark], config: Config, supersedes: str, first: bool,
        hostname: str = "",
    ) -> None:  # fmt: skip
        self.id = uuid.uuid4().hex[:12]
        self._settings: Settings = settings()
        s, namespace = self._settings, self._settings.namespace_of(app)
        self._marks = marks | map_marks()
        self._link = Link(sock)
        self._first = first
        self._told = ""  # of the trouble results have
        self._report_alarm, self._look_alarm = Alarm(REPORT_S), Alarm(LOOK_S)
        self._wake_at: float | None = None
        self._stopping = False
        self._inbox: deque[Any] = deque()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        rules = {name: rule_of(mark) for name, mark in self._marks.items()}
        paces = Rules(s.call_budget_s, s.call_gap_s, s.call_tasks, s.calls_outstanding, s.starve_after_s)
        self._scheduler = Scheduler(paces, rules)
        self._events: list[Event] = []  # not told to the scheduler yet; this one list is everybody's
        self._roster = Roster(self.id)
        self._ledger = Ledger(app, s, namespace, self._notify)
        self._blame = Blame(app, s, self._marks, self._ledger, self.id, hostname)
        self._tasks = TasksInHand(app, marks, self._send, self._blame, self._ledger)
        self._results = GroupedResults(self._tasks.tracing, self._tasks.lose_outcome)
        self._results.adopt(app.tasks[name] for name in self._marks)
        self._results.warm_up()
        use_token()
        outlast(s.head_wait_s)
        from bridge.driver.fleet import Fleet  # Ray is loaded here, in the driver, and never in the worker

        self._fleet = Fleet(s, namespace, self.id, supersedes, config, needs(marks.values()))
        self._errands = errands = Errands(self._events.append)
        self._waiting = WaitingTasks(app, s, self._marks, rules, self._events, self._tasks, errands, self._roster)
        self._finishing = Finishing(
            s, self._events, self._tasks, self._waiting, errands, self._blame, self._ledger, self._roster
        )
        self._calls = Calls(
            self.id, config.release.id, s, rules, self._events, self._tasks, self._waiting, errands, self._finishing,
            self._fleet, self._roster,
        )  # fmt: skip

    @property
    def forward(self) -> Any:
        """What stands in the place of every marked body."""
        return self._tasks.tracing.forward

    # ---- the loop

    def run(self) -> int:
        """Serve until the worker says stop or is gone; returns the exit code."""
        self._fleet.start(self._notify, patient=not self._first)
        poll = select.epoll()
        poll.register(self._link.fileno(), select.EPOLLIN)
        poll.register(self._wake_read, select.EPOLLIN)
        waiting_to_write = False
        while True:
            for fd, _ in poll.poll(self._timeout()):
                if fd == self._wake_read:
                    os.read(self._wake_read, 65536)
                else:
                    self._read_link()
            code = self._handle_inbox()
            if self._wake_at is not None and time.monotonic() >= self._wake_at:
                self._wake_at = None
                self._events.append(Tick())
            if code is None and self._report_alarm.is_due():  # the last word of a driver that ends is its error
                self._send_report()
            self._turn()
            if self._look_alarm.is_due():  # after the turn: an actor that has just become ready has taken what it can
                self._look_at_waiting()
                self._turn()
            self._results.flush()
            if self._results.trouble != self._told:  # probes should not wait for it
                self._told = self._results.trouble
                self._send_report()
            written = self._flush()
            if written and self._calls.unsent:  # the worker has taken what was in their way
                self._submit()
                written = self._flush()
            if written is waiting_to_write:
                waiting_to_write = not written
                poll.modify(self._link.fileno(), select.EPOLLIN | (select.EPOLLOUT if waiting_to_write else 0))
            if code is not None or self._stopping:
                self._fleet.close()
                return code or 0

    def _notify(self, event: Any) -> None:
        """Take a fleet event from any thread."""
        self._inbox.append(event)
        os.write(self._wake_write, b"x")

    def _timeout(self) -> float:
        if self._inbox:
            return 0.0
        wake_in_s = 1.0 if self._wake_at is None else max(0.0, self._wake_at - time.monotonic())
        return min(wake_in_s, self._results.due_in_s())

    def _flush(self) -> bool:
        try:
            return self._link.flush()
        except ConnectionError:
            self._stopping = True
            return True

    def _read_link(self) -> None:
        try:
            received = self._link.receive()
        except EOFError:
            self._stopping = True
            return
        for message in received:
            match message:
                case messages.Run(serial=serial):
                    try:
                        self._take(message)
                    except Exception as error:  # one odd request must cost only itself
                        logger.exception("a request could not be taken")
                        self._tasks.forget(serial)
                        self._send(messages.Ended(serial, einfo(error)))
                case messages.Cancel(serial, signum):
                    if serial in self._tasks.by_serial:
                        self._cancel(self._tasks.by_serial[serial], _BY_SIGNAL.get(signum, Reason.CANCEL))
                case messages.Withdraw(serial):
                    if serial in self._tasks.by_serial:
                        self._waiting.give_back(self._tasks.by_serial[serial])
                case messages.Flush(_, ends):
                    for task in list(self._tasks.by_serial.values()):
                        self._waiting.give_back(task)
                    if ends:
                        self._results.end()
                case messages.Discard(refs=refs):
                    self._ledger.discard(refs)
                case messages.RestartActors():
                    self._fleet.restart_actors()
                case messages.Stop():
                    self._stopping = True
                case messages.Unreadable(serial, reason):
                    self._send(messages.Ended(serial, einfo(RuntimeError(f"request could not be unpickled: {reason}"))))

    def _turn(self) -> None:
        """Do what all that was heard leads to. Calls leave first: results can be stored while the GPUs work."""
        finishing, calls = self._finishing, self._calls
        while self._events or finishing.finished or calls.unsent:
            self._run_scheduler()
            self._submit()
            finished, finishing.finished = finishing.finished, []
            for task, outcome in finished:
                if task.run.serial in self._tasks.by_serial:
                    self._tasks.tracing.resume(task, outcome)
            if calls.unsent and not (self._events or finishing.finished):
                return  # the link takes no more for now

    def _handle_inbox(self) -> int | None:
        """Fleet events; an exit code when this process is of no more use."""
        while self._inbox:
            event = self._inbox.popleft()
            match event:
                case Replied(call, reply, reason, sent):
                    self._calls.replied(call, reply, reason, FailureKind.UNSURE if sent else FailureKind.LOST)
                case Fetched(token, data):
                    self._calls.fetched(token, data)
                case SlotChanged(slot, health, reason):
                    self._events += self._roster.change(slot, health, reason)
                    self._send_report()
                case ActorReleased(slot):
                    self._events += self._roster.release(slot)
                    self._send_report()
                case Connected():
                    self._roster.set_cluster(event._asdict())
                    self._send_report()
                case Answered(then, value):
                    then(value)
                case ClusterLost():
                    logger.error("the Ray cluster is gone; GPU tasks wait for it, CPU tasks go on")
                    return EXIT_CLUSTER_LOST
                case StartFailed(error):
                    self._send_report(error)
                    self._flush()
                    return EXIT_NOT_STARTED
        return None

    # ---- requests of the worker

    def _take(self, run: messages.Run) -> None:
        task = self._tasks.take(run)
        if run.refusal:
            self._tasks.refuse(task, MessageInvalid(f"{run.task}: {run.refusal}"))
        elif run.task in self._marks:
            if (run.request.get("delivery_info") or {}).get("redelivered"):
                self._finishing.begin_again(task)
            else:
                self._waiting.wait(task)
        else:  # the registry of this process differs from the worker's
            self._tasks.accept(task)
            self._tasks.tracing.start(task)

    def _cancel(self, task: TracedTask, how: Reason) -> None:
        """The worker has given it up."""
        task.cancelled, task.how = True, how
        if task.fetches:  # what comes for it later is deleted
            self._tasks.terminate(task)
        else:
            self._events.append(TaskCancelled(task.token))

    # ---- the scheduler

    def _run_scheduler(self) -> None:
        """Tell the scheduler what has happened and do what it says."""
        events = self._events.copy()
        self._events.clear()
        for instruction in self._scheduler.handle(*events, now=time.monotonic()):
            match instruction:
                case StartCall():
                    self._calls.start(instruction)
                case Interrupt(actor, call, token) if token in self._tasks.by_token:  # else it has just been answered
                    self._fleet.cancel(actor, f"{self.id}.{call}", [token], self._tasks.by_token[token].how)
                case Drop(token):
                    self._waiting.drop(token)
                case HandBack(token):
                    self._waiting.hand_back(token)
                case WakeAt(at):
                    self._wake_at = at
        self._waiting.forget_dropped()

    def _submit(self) -> None:
        """Send calls, and word of them to the worker before: should this process die, it must know what has started."""
        unsent = self._calls.unsent
        while unsent and self._flush() and not self._stopping:
            self._fleet.submit(*unsent.popleft())

    def _look_at_waiting(self) -> None:
        """Ask for actors while tasks wait; fail what has waited too long for one that suits."""
        self._run_scheduler()  # an actor that has come in this turn may suit them
        now = time.monotonic()
        self._fleet.want(self._scheduler.wanted_by(now, GROW_AFTER_S))
        self._waiting.look_at(self._scheduler.stranded(now), now)

    # ---- messages to the worker

    def _send_report(self, error: StartupError | None = None) -> None:
        counts = {"waiting": self._scheduler.waiting, "running": self._scheduler.running}
        report = self._roster.report() | counts | {"results": self._results.trouble}
        self._send(messages.Report(0, report, (type(error).__name__, str(error)) if error else None))

    def _send(self, message: Any) -> None:
        try:
            self._link.send(message)
        except Exception as error:  # a result that cannot be pickled: say so, as billiard does
            wrapped = MaybeEncodingError(error, getattr(message, "result", None))
            self._link.send(messages.Ended(message.serial, einfo(wrapped)))


def rule_of(mark: Mark) -> TaskRule:
    """What the scheduler must know of a marked task."""
    batch, gpu = mark.batch, mark.gpu
    size, wait_s = (batch.max_size, batch.max_wait_s) if batch else (0, 0.0)
    return TaskRule(size, wait_s, gpu.streams, gpu.memory or 0, gpu.accelerator or "")


def main(app: Any, hostname: str, sock: socket.socket, name: str, config: Config, supersedes: str, first: bool) -> None:
    """Entry of the driver process, as of a prefork child."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # Ray needs real ones; the worker's are log proxies
    os.environ["CELERY_LOG_REDIRECT"] = ""
    if os.environ.get("USE_FAST_LOCALS"):
        raise SystemExit(
            "USE_FAST_LOCALS keys Celery's stacks by thread; GPU tasks need them keyed by greenlet: unset it"
        )
    from billiard.process import current_process

    current_process().name = name
    app.loader.init_worker()  # where children are spawned, not forked, nothing has imported the tasks yet
    driver: list[Driver] = []
    marks = marks_of(app, settings().gpu_tasks)
    prepare(app, marks, lambda *args, **kwargs: driver[0].forward(*args, **kwargs), settings().validate_configured)
    process_initializer(app, hostname)
    arrays.keeps_forms = arrays.passes_on = True  # after a signal that says the opposite to prefork children
    driver.append(Driver(app, sock, marks, config, supersedes, first, hostname))
    settle()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the worker decides when a driver ends
    code = driver[0].run()
    process_destructor(os.getpid(), code)
    logging.shutdown()
    os._exit(code)  # Ray's threads and atexit handlers have nothing left to do
