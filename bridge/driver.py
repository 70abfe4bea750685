"""The driver process: Celery's own tracer for every GPU task, in greenlets on one loop; bodies run elsewhere.

Started by the worker as prefork starts its children. A task waits in the scheduler; when its call leaves for an actor
its tracer starts (`bridge/tracing.py`), and its outcome resumes it. Every Run from
the worker gets exactly one answer. Nothing here touches CUDA or runs a body.
"""

import logging
import os
import pickle
import select
import signal
import socket
import sys
import time
import uuid
from collections import deque
from functools import partial
from typing import Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated, WorkerLostError
from billiard.pool import MaybeEncodingError
from celery.concurrency.prefork import process_destructor, process_initializer
from kombu.serialization import prepare_accept_content

from actors import arrays
from actors.arrays import ArrayRef
from actors.contract import (
    Answer,
    Busy,
    Call,
    Config,
    Failed,
    FailureKind,
    Large,
    LogLine,
    Outcome,
    Pending,
    Reason,
    Reply,
    Succeeded,
    TaskCall,
)
from actors.garbage import settle
from actors.handles import DeviceArray
from bridge import link as messages
from bridge.auth import use_token
from bridge.blame import Blame
from bridge.discards import is_final
from bridge.errands import ENDED, NOT_HEARD_OF, Errands
from bridge.errors import (
    BridgeError,
    ClusterUnavailable,
    GpuOutOfMemory,
    MessageInvalid,
    NoSuitableGpu,
    StartupError,
    TaskPoisoned,
)
from bridge.handles import HOLDER_WAIT_S, Plan, handles_of, plan
from bridge.head import outlast
from bridge.ledger import Answered, Ledger
from bridge.lines import ANY, TaskRule
from bridge.link import Link
from bridge.marks import Mark, map_marks, marks_of
from bridge.orders import (
    ActorBusy,
    ActorShort,
    Drop,
    Event,
    HandBack,
    Interrupt,
    StartCall,
    TaskCancelled,
    TaskFinished,
    TaskWaiting,
    Tick,
    WakeAt,
)
from bridge.places import needs
from bridge.results import GroupedResults
from bridge.roster import Alarm, Roster
from bridge.scheduler import Rules, Scheduler
from bridge.settings import Settings, settings
from bridge.tracing import TracedTask, Tracing, einfo, prepare
from bridge.verdicts import Verdict, judge

logger = logging.getLogger(__name__)

#: Exit codes of the driver: the cluster is gone; it could not start (it has reported why).
EXIT_CLUSTER_LOST = 75
EXIT_NOT_STARTED = 76
#: The worker hears of the driver at least this often, in seconds; silence means that it is stuck.
REPORT_S = 5.0
#: How often it is looked whether tasks wait in vain, in seconds; and from when on waiting calls for more actors.
LOOK_S = 0.25
GROW_AFTER_S = 0.5
#: How a task is cancelled by signals that mean something to a prefork child; any other interrupts its body.
_BY_SIGNAL: dict[int, Reason] = {signal.SIGUSR1: Reason.SOFT_LIMIT, signal.SIGKILL: Reason.KILL}
#: What a lost task's error says beyond how the process ended.
_REMARKS = {
    FailureKind.CRASHED: " The GPU executor died while the task ran.",
    FailureKind.SUSPECT: " The GPU executor died while a batch ran that the task was part of.",
    FailureKind.UNSURE: " The GPU actor was lost while the task ran, or may have run.",
}


class Driver:
    """The loop; one instance per driver process."""

    def __init__(
        self, app: Any, sock: socket.socket, marks: dict[str, Mark], config: Config, supersedes: str, first: bool,
        hostname: str = "",
    ) -> None:  # fmt: skip
        self.id = uuid.uuid4().hex[:12]
        self._app = app
        self._marks = marks | map_marks()
        self._highest_first = app.connection_for_read().transport.driver_type == "amqp"  # Redis: 0 goes first
        self._settings: Settings = settings()
        self._link = Link(sock)
        self._first = first
        self._tracing = Tracing(app, self._answer, marks)
        self._errands = Errands(lambda event: self._events.append(event))
        self._accepted_content = prepare_accept_content(app.conf.accept_content)
        self._results = GroupedResults(self._tracing, self._lose_outcome)
        self._results.adopt(app.tasks[name] for name in self._marks)
        self._results.warm_up()
        self._told = ""  # of the trouble results have
        self._tasks: dict[int, TracedTask] = {}  # by serial
        self._by_token: dict[str, TracedTask] = {}
        self._calls: dict[str, tuple[int, Call]] = {}  # calls not answered in full, with the tasks still owed
        self._unsent: deque[tuple[int, Call]] = deque()  # calls whose `Accepted` the link has not taken yet
        self._fetching: dict[str, int] = {}  # token of a large outcome on its way -> its actor
        self._finished: list[tuple[TracedTask, Succeeded]] = []  # outcomes their tracers have not seen yet
        self._roster = Roster(self.id)
        self._report_alarm, self._look_alarm = Alarm(REPORT_S), Alarm(LOOK_S)
        self._warned: set[str] = set()  # names of tasks that wait for a GPU there is none of
        self._wake_at: float | None = None
        self._stopping = False
        self._events: list[Event] = []  # not told to the scheduler yet
        self._quiet: set[str] = set()  # tokens that are cancelled in the scheduler only
        self._inbox: deque[Any] = deque()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        s = self._settings
        rules = Rules(s.call_budget_s, s.call_gap_s, s.call_tasks, s.calls_outstanding, s.starve_after_s)
        self._rules = {name: rule_of(mark) for name, mark in self._marks.items()}
        self._scheduler = Scheduler(rules, self._rules)
        use_token()
        outlast(s.head_wait_s)
        from bridge.fleet import Fleet  # Ray is loaded here, in the driver, and never in the worker

        namespace = s.namespace_of(app)
        self._ledger = Ledger(app, s, namespace, self._notify)
        self._blame = Blame(app, s, self._marks, self._ledger, self.id, hostname)
        self._config = config
        self._fleet = Fleet(s, namespace, self.id, supersedes, self._config, needs(marks.values()))

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
            if written and self._unsent:  # the worker has taken what was in their way
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
                        self._tasks.pop(serial, None)
                        self._send(messages.Ended(serial, einfo(error)))
                case messages.Cancel(serial, signum):
                    if serial in self._tasks:
                        self._cancel(self._tasks[serial], _BY_SIGNAL.get(signum, Reason.CANCEL))
                case messages.Withdraw(serial):
                    if serial in self._tasks:
                        self._give_back(self._tasks[serial])
                case messages.Flush(_, ends):
                    for task in list(self._tasks.values()):
                        self._give_back(task)
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
        while self._events or self._finished or self._unsent:
            self._run_scheduler()
            self._submit()
            finished, self._finished = self._finished, []
            for task, outcome in finished:
                if task.run.serial in self._tasks:
                    self._tracing.resume(task, outcome)
            if self._unsent and not (self._events or self._finished):
                return  # the link takes no more for now

    def _handle_inbox(self) -> int | None:
        """Fleet events; an exit code when this process is of no more use."""
        from bridge import cluster, fleet

        while self._inbox:
            event = self._inbox.popleft()
            match event:
                case fleet.Replied(call, reply, reason, sent):
                    self._replied(call, reply, reason, FailureKind.UNSURE if sent else FailureKind.LOST)
                case fleet.Fetched(token, data):
                    self._fetched(token, data)
                case fleet.SlotChanged(slot, health, reason):
                    self._slot_changed(slot, health, reason)
                case fleet.ActorReleased(slot):
                    self._events += self._roster.release(slot)
                    self._send_report()
                case cluster.Connected():
                    self._roster.set_cluster(event._asdict())
                    self._send_report()
                case Answered(then, value):
                    then(value)
                case fleet.ClusterLost():
                    logger.error("the Ray cluster is gone; GPU tasks wait for it, CPU tasks go on")
                    return EXIT_CLUSTER_LOST
                case fleet.StartFailed(error):
                    self._send_report(error)
                    self._flush()
                    return EXIT_NOT_STARTED
        return None

    def _look_at_waiting(self) -> None:
        """Ask for actors while tasks wait; fail what has waited too long for one that suits."""
        self._run_scheduler()  # an actor that has come in this turn may suit them
        now, longest = time.monotonic(), self._settings.cluster_wait_s
        self._fleet.want(self._scheduler.wanted_by(now, GROW_AFTER_S))
        for stranded in self._scheduler.stranded(now):
            task = self._by_token.get(stranded.token)
            is_late = now - stranded.since >= HOLDER_WAIT_S
            if stranded.token in self._errands:
                if is_late:
                    self._cancel_quietly(stranded.token)
                    self._errands.lose(stranded.token, NOT_HEARD_OF)
            elif task is None:
                continue  # given back in this turn
            elif task.plan is not None and task.plan.actor is not None:
                if is_late:
                    self._cancel_quietly(stranded.token)
                    self._unpin(task)
            elif now - stranded.since >= longest:
                self._cancel_quietly(stranded.token)
                self._refuse(task, self._no_actor(stranded.name))
            elif self._roster.ready and now - stranded.since > GROW_AFTER_S and stranded.name not in self._warned:
                self._warned.add(stranded.name)
                logger.warning("%s waits up to %g s: %s", stranded.name, longest, self._no_actor(stranded.name))

    def _no_actor(self, name: str) -> BridgeError:
        """Why a task cannot run anywhere now."""
        if not self._roster.ready:
            why = self._roster.why_fenced()
            return ClusterUnavailable(f"no GPU actor was ready for {self._settings.cluster_wait_s:g} s{why}")
        return NoSuitableGpu(name, self._marks[name].gpu.needs(), self._roster.describe())

    @property
    def forward(self) -> Any:
        """What stands in the place of every marked body."""
        return self._tracing.forward

    # ---- tasks in

    def _take(self, run: messages.Run) -> None:
        task = TracedTask(run)
        self._tasks[run.serial] = self._by_token[task.token] = task
        if run.refusal:
            self._refuse(task, MessageInvalid(f"{run.task}: {run.refusal}"))
        elif run.task in self._marks:
            if (run.request.get("delivery_info") or {}).get("redelivered"):
                self._begin_again(task)
            else:
                self._wait(task)
        else:  # the registry of this process differs from the worker's
            self._accept(task)
            self._tracing.start(task)

    def _begin_again(self, task: TracedTask) -> None:
        """Let a task wait that the broker delivers again, unless it has had its crashes elsewhere."""

        def go_on() -> None:
            if self._tasks.get(task.run.serial) is not task:
                return  # given back meanwhile
            standing = self._blame.standing(task)
            if task.cancelled:
                self._end(task, einfo(Terminated(signal.SIGTERM)))
            elif standing.crashes >= standing.max_crashes:
                self._poison(task)
            else:
                self._wait(task, task.alone)

        self._blame.recall(task, go_on)

    def _wait(self, task: TracedTask, alone: bool = False) -> None:
        if task.plan is None:
            wanted = self._rules[task.run.task].accelerator
            task.plan = plan(
                handles_of(task.run, self._accepted_content),
                lambda actor: wanted in ("", self._roster.accelerator(actor, wanted)),
            )
        if task.plan.elsewhere and not task.refs:
            task.alone, task.fetches = alone, True
            self._errands.fetch(task.plan.elsewhere, partial(self._go_on_with, task))
            return
        priority = _number((task.run.request.get("delivery_info") or {}).get("priority"))
        rank = -priority if self._highest_first else priority
        self._events.append(TaskWaiting(task.token, task.run.task, rank, alone, task.plan.actor))

    def _go_on_with(self, task: TracedTask, refs: dict[str, ArrayRef], error: BridgeError | None) -> None:
        """What other actors hold for a task is where it can be read, or not all of it."""
        task.refs, task.fetches = refs, False
        if self._tasks.get(task.run.serial) is not task:
            self._discard_refs(task)  # answered meanwhile
        elif error is not None:
            self._refuse(task, error)
        else:
            self._wait(task, task.alone)

    def _discard_refs(self, task: TracedTask) -> None:
        if task.refs:
            self._ledger.discard([*task.refs.values()])
            task.refs = {}

    def _unpin(self, task: TracedTask) -> None:
        """What it takes is lost to all purposes: it runs anywhere, with the copy or to fail as HandleLost."""
        task.plan = Plan()
        self._wait(task, task.alone)

    def _hand_back(self, token: str) -> None:
        """What an executor held is lost, unless it is the new one that a task waits for."""
        task = self._by_token.get(token)
        if token in self._errands:
            actor, executor = self._errands.holder(token)
            if self._roster.executor(actor) == executor:
                self._errands.wait(token)
            else:
                self._errands.lose(token, ENDED)
        elif task is not None and task.plan is not None and task.plan.actor is not None:
            if self._roster.executor(task.plan.actor) == task.plan.executor:
                self._wait(task, task.alone)
            else:
                self._unpin(task)

    def _again(self, task: TracedTask, alone: bool) -> None:
        """Let a task wait for another run; a new token, so that nothing late ever touches it."""
        if task.cancelled:
            self._end(task, einfo(Terminated(signal.SIGTERM)))
            return
        self._by_token.pop(task.token, None)
        task.attempt += 1
        task.token = f"{task.run.serial}.{task.attempt}"
        self._by_token[task.token] = task
        if task.accepted:
            task.accepted = False
            self._send(messages.Returned(task.run.serial))
        task.alone = task.alone or alone
        self._wait(task, task.alone)

    def _cancel(self, task: TracedTask, how: Reason) -> None:
        """The worker has given it up."""
        task.cancelled, task.how = True, how
        if task.fetches:  # what comes for it later is deleted
            self._end(task, einfo(Terminated(signal.SIGTERM)))
        else:
            self._events.append(TaskCancelled(task.token))

    def _cancel_quietly(self, token: str) -> None:
        """Take a waiting task from the scheduler; whoever does this answers for the task."""
        self._quiet.add(token)
        self._events.append(TaskCancelled(token))

    def _run_scheduler(self) -> None:
        """Tell the scheduler what has happened and do what it says."""
        events, self._events = self._events, []
        for instruction in self._scheduler.handle(*events, now=time.monotonic()):
            match instruction:
                case StartCall():
                    self._start_call(instruction)
                case Interrupt(actor, call, token) if token in self._by_token:  # else it has just been answered
                    self._fleet.cancel(actor, f"{self.id}.{call}", [token], self._by_token[token].how)
                case Drop(token) if token not in self._quiet and token in self._by_token:
                    self._end(self._by_token[token], einfo(Terminated(signal.SIGTERM)))
                case HandBack(token):
                    self._hand_back(token)
                case WakeAt(at):
                    self._wake_at = at
        self._quiet.clear()

    def _start_call(self, start: StartCall) -> None:
        calls = []
        for token in start.tokens:
            if token in self._errands:
                calls.append(self._errands.call(token))
                continue
            task = self._by_token[token]
            if not task.accepted:
                self._accept(task)
            if task.tracer is None:
                self._tracing.start(task)
            if task.payload is None:  # it ended before its body: an invalid payload, or a hook that raised
                self._events.append(TaskFinished(token, None))
            else:
                run = task.run
                payload, texts = task.payload
                limits = run.soft_limit_s, run.hard_limit_s
                calls.append(TaskCall(token, run.task, payload, *limits, task.stays, texts, task.checks, task.large))
        if calls:
            is_short = start.estimate_s < self._settings.call_budget_s
            may_part = is_short and not self._rules.get(calls[0].name, ANY).together
            times = start.estimate_s, may_part, start.waits_s
            call = Call(f"{self.id}.{start.call}", self.id, self._config.release.id, tuple(calls), *times)
            self._calls[call.id] = start.actor, call
            self._unsent.append((start.actor, call))

    def _submit(self) -> None:
        """Send calls, and word of them to the worker before: should this process die, it must know what has started."""
        while self._unsent and self._flush() and not self._stopping:
            self._fleet.submit(*self._unsent.popleft())

    def _accept(self, task: TracedTask) -> None:
        task.accepted = task.announced = True
        self._send(messages.Accepted(task.run.serial, time.monotonic()))

    def _refuse(self, task: TracedTask, error: BridgeError) -> None:
        """End a task with an error of ours, through its tracer, so that the result is stored as for any other."""
        if task.tracer is None:
            self._accept(task)
            self._tracing.start(task, refusal=error)
        else:
            self._tracing.resume(task, error)

    def _end(self, task: TracedTask, einfo: ExceptionInfo) -> None:
        """End a task that the worker has given up: its tracer stores nothing."""
        self._tracing.stop(task)
        self._answer(task, messages.Ended(task.run.serial, einfo))

    def _give_back(self, task: TracedTask) -> None:
        """To the worker, unless it runs or the broker has it no more: it never started, or is late and came back."""
        acks_late = getattr(self._app.tasks.get(task.run.task), "acks_late", False)
        if not task.accepted and (acks_late or not task.announced):
            self._cancel_quietly(task.token)
            self._tracing.stop(task)
            self._answer(task, messages.Flushed(task.run.serial))

    def _lose_outcome(self, task: TracedTask, error: Exception) -> None:
        """A late task has run, the worker ends, and the result backend still does not store it."""
        logger.error(
            "%s[%s] has run and its outcome is not stored (%r): its message goes back to the broker, and it runs again",
            task.run.task, task.run.id, error,
        )  # fmt: skip
        self._answer(task, messages.Flushed(task.run.serial))

    def _answer(self, task: TracedTask, message: Any) -> None:
        self._tasks.pop(task.run.serial, None)
        self._by_token.pop(task.token, None)
        self._send(message)
        self._discard_refs(task)
        acks_on_timeout = getattr(self._app.tasks.get(task.run.task), "acks_on_timeout", True)
        if task.once and is_final(message, self._blame.standing(task), acks_on_timeout):
            self._ledger.discard(task.once)

    # ---- outcomes

    def _replied(self, call_id: str, reply: Reply | Busy | None, reason: str, without: FailureKind) -> None:
        if call_id not in self._calls:
            return
        actor, call = self._calls[call_id]
        if reply is None:
            self._lose_actor(actor, reason)
            self._fleet.forget(actor, call_id)
            reply = Reply(tuple(Failed(t.token, without, without.name, reason) for t in call.tasks), 0.0)
        elif isinstance(reply, Busy):
            self._put_back(call_id, actor, call, reply.reason)
            return
        elif actor in self._roster.ready:
            self._events.append(ActorBusy(actor, reply.queue_s))
        owed = {task.token for task in call.tasks}
        answers = tuple(answer for answer in reply.answers if answer.token in owed)
        answered = {answer.token for answer in answers if not isinstance(answer, Pending)}
        call = call._replace(tasks=tuple(task for task in call.tasks if task.token not in answered))
        if call.tasks:
            self._calls[call_id] = actor, call
        else:
            del self._calls[call_id]
        self._take_answers(actor, call_id, answers)
        if call.tasks:
            self._fleet.collect(actor, call)

    def _put_back(self, call_id: str, actor: int, call: Call, why: str) -> None:
        """The actor takes nothing now: its tasks wait here, and it is asked again after the next beat."""
        del self._calls[call_id]
        self._lose_actor(actor, why)
        for sent in call.tasks:
            self._events.append(TaskFinished(sent.token, None))
            if sent.token in self._by_token:
                self._again(self._by_token[sent.token], alone=False)
            elif sent.token in self._errands:
                self._errands.wait(sent.token)

    def _take_answers(self, actor: int, call_id: str, answers: tuple[Answer, ...]) -> None:
        for answer in answers:
            task = self._by_token.get(answer.token)
            if isinstance(answer, Large):
                self._fetching[answer.token] = actor
                self._fleet.fetch(actor, answer.token)
            elif not isinstance(answer, Pending):
                self._finish(actor, answer)
            elif task is not None:
                self._take_news(actor, call_id, task, answer)

    def _take_news(self, actor: int, call_id: str, task: TracedTask, news: Pending) -> None:
        """What a task that is not finished has asked, logged or met."""
        if news.soft_limit_hit:
            self._send(messages.SoftLimited(task.run.serial, task.run.soft_limit_s or 0.0))
        if news.wishes:
            task.told.extend(wish for wish in news.wishes if len(wish) <= 2 * self._settings.log_limit_bytes)
            goes_on = not task.cancelled or task.how is Reason.SOFT_LIMIT  # else progress would overwrite REVOKED
            self._tracing.resume(task, news if goes_on else _only_logs(news))
        if task.run.serial not in self._tasks:  # its wish has failed, and with it the task
            self._fleet.cancel(actor, call_id, [news.token], Reason.CANCEL)
        elif task.cancelled:
            self._fleet.cancel(actor, call_id, [news.token], task.how)  # the first may have overtaken the call

    def _fetched(self, token: str, data: bytes | None) -> None:
        lost = Failed(token, FailureKind.UNSURE, "UNSURE", "a large result was lost with its actor")
        actor = self._fetching.pop(token, None)
        if actor is not None:
            self._finish(actor, pickle.loads(data) if data is not None else lost)

    def _finish(self, actor: int, outcome: Outcome) -> None:
        """A task's outcome: give it to its tracer, or let the task run again when somebody else is to blame."""
        task = self._by_token.get(outcome.token)
        ran = isinstance(outcome, Succeeded) or outcome.kind in (FailureKind.RAISED, FailureKind.RETRY)
        self._events.append(TaskFinished(outcome.token, outcome.run_s if ran else None))
        if task is None:
            self._take_unasked(actor, outcome)
        elif isinstance(outcome, Succeeded):
            self._blame.acquit(task)
            self._finished.append((task, outcome))
        else:
            self._judge(task, actor, outcome)

    def _take_unasked(self, actor: int, outcome: Outcome) -> None:
        """An outcome no message waits for: of an errand, or of a task that was given up; then nothing of it stays."""
        if outcome.token in self._errands:
            if isinstance(outcome, Failed) and outcome.kind is FailureKind.LOST and actor in self._roster.ready:
                self._lose_actor(actor, outcome.message)  # it is asked again after its next beat
            self._errands.take(outcome)
        elif isinstance(outcome, Succeeded) and outcome.made:
            made = pickle.loads(outcome.made)
            self._errands.delete(each for each in made if isinstance(each, DeviceArray))
            refs = [each.kept if isinstance(each, DeviceArray) else each for each in made]
            self._ledger.discard([ref for ref in refs if ref is not None])

    def _judge(self, task: TracedTask, actor: int, outcome: Failed) -> None:
        """A failure: count it, then `_decide`."""
        if outcome.kind is FailureKind.CRASHED:
            node = self._roster.node(actor)
            self._blame.charge(task, actor, node, outcome.message, lambda: self._decide(task, actor, outcome))
            return
        if outcome.kind in (FailureKind.LOST, FailureKind.UNSURE):
            task.losses += 1
            if actor in self._roster.ready:
                self._lose_actor(actor, outcome.message)
        self._decide(task, actor, outcome)

    def _decide(self, task: TracedTask, actor: int, outcome: Failed) -> None:
        """What becomes of a task that has failed; `bridge/verdicts.py` says it."""
        if self._tasks.get(task.run.serial) is not task:
            return  # the driver has answered for it while Redis was asked
        standing = self._blame.standing(task)
        if outcome.kind is FailureKind.CRASHED:
            logger.error(
                "%s[%s] was running when its executor died (%s): crash %d of %d",
                task.run.task, task.run.id, outcome.message, standing.crashes, standing.max_crashes,
            )  # fmt: skip
        match judge(outcome.kind, standing):
            case Verdict.RESUME:
                self._blame.acquit(task)
                self._tracing.resume(task, outcome)
            case Verdict.AGAIN:
                self._again(task, alone=False)
            case Verdict.AGAIN_LATER:
                self._again_later(task, actor, outcome.message)
            case Verdict.AGAIN_ALONE:
                self._again(task, alone=True)
            case Verdict.WORKER_LOST:
                self._log(task, outcome)
                reason = f"Worker exited prematurely: {outcome.message}.{_REMARKS.get(outcome.kind, '')}"
                self._end(task, einfo(WorkerLostError(reason)))
            case Verdict.POISONED:
                self._poison(task)
            case Verdict.UNAVAILABLE:
                self._tracing.resume(task, ClusterUnavailable(f"lost {task.losses} times, last: {outcome.message}"))
            case Verdict.TIMED_OUT:
                self._tracing.stop(task)
                self._answer(task, messages.TimedOut(task.run.serial, task.run.hard_limit_s or 0.0))
            case Verdict.CANCELLED:
                self._log(task, outcome)
                self._end(task, einfo(Terminated(signal.SIGTERM)))

    def _log(self, task: TracedTask, outcome: Failed) -> None:
        """Log what a body said whose tracer will not see its outcome."""
        if outcome.logs:
            self._tracing.resume(task, Pending(task.token, True, (pickle.dumps(outcome.logs, 5),)))

    def _again_later(self, task: TracedTask, actor: int, why: str) -> None:
        """Too little memory is free there: elsewhere, or there when the actor has been heard of again."""
        task.short_since = task.short_since or time.monotonic()
        if time.monotonic() - task.short_since >= self._settings.cluster_wait_s and not task.cancelled:
            self._tracing.resume(task, GpuOutOfMemory(f"waited {self._settings.cluster_wait_s:g} s for memory: {why}"))
            return
        logger.info("%s[%s] waits for memory of GPU actor %d: %s", task.run.task, task.run.id, actor, why)
        self._events.append(ActorShort(actor, task.run.task))
        self._again(task, alone=False)

    def _poison(self, task: TracedTask) -> None:
        """It has ended too many executors: it fails when its message is kept."""

        def fail(error: TaskPoisoned) -> None:
            if self._tasks.get(task.run.serial) is not task:
                return  # given back meanwhile
            if task.cancelled:
                self._end(task, einfo(Terminated(signal.SIGTERM)))
            else:
                self._refuse(task, error)

        self._blame.bury(task, fail)

    # ---- actors

    def _slot_changed(self, slot: int, health: Any, reason: str) -> None:
        self._events += self._roster.change(slot, health, reason)
        self._send_report()

    def _lose_actor(self, slot: int, reason: str) -> None:
        self._events += self._roster.lose(slot, reason)

    def _send_report(self, error: StartupError | None = None) -> None:
        counts = {"waiting": self._scheduler.waiting, "running": self._scheduler.running}
        report = self._roster.report() | counts | {"results": self._results.trouble}
        self._send(messages.Report(0, report, (type(error).__name__, str(error)) if error else None))

    # ---- answers

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


def _only_logs(news: Pending) -> Pending:
    wishes = [wish for data in news.wishes for wish in pickle.loads(data)]
    return news._replace(wishes=(pickle.dumps([wish for wish in wishes if isinstance(wish, LogLine)], 5),))


def _number(priority: Any) -> int:
    """A message's priority; brokers take whatever a producer writes."""
    try:
        return int(priority)
    except (TypeError, ValueError):
        return 0


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
