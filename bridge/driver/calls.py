"""In the driver: calls, from the scheduler's word that one is to start until all its tasks are answered.

A reply may answer some tasks, say that an outcome is too large to travel with it, bring news of bodies that still run,
or be lost with its actor. What is still owed is asked for again; outcomes go on to `finishing.py`.
"""

import pickle
from collections import deque
from typing import TYPE_CHECKING

from actors.contract import (
    Answer,
    Busy,
    Call,
    Failed,
    FailureKind,
    Large,
    LogLine,
    Pending,
    Reason,
    Reply,
    TaskCall,
)
from bridge.driver.errands import Errands
from bridge.driver.finishing import Finishing
from bridge.driver.in_hand import TasksInHand
from bridge.driver.lines import ANY, TaskRule
from bridge.driver.orders import ActorBusy, Event, StartCall, TaskFinished
from bridge.driver.roster import Roster
from bridge.driver.tracing import TracedTask
from bridge.driver.waiting import WaitingTasks
from bridge.settings import Settings

if TYPE_CHECKING:
    from bridge.driver.fleet import Fleet  # it loads Ray, and the worker imports this file


class Calls:
    """The calls a driver has not heard the end of.

    Args:
        driver, release: ids, for the actors.
        rules: what the scheduler knows of the tasks.
        events: takes what the scheduler is to be told.
    """

    def __init__(
        self, driver: str, release: str, settings: Settings, rules: dict[str, TaskRule], events: list[Event],
        tasks: TasksInHand, waiting: WaitingTasks, errands: Errands, finishing: Finishing, fleet: "Fleet",
        roster: Roster,
    ) -> None:  # fmt: skip
        self._driver, self._release, self._settings, self._rules = driver, release, settings, rules
        self._events, self._tasks, self._waiting, self._errands = events, tasks, waiting, errands
        self._finishing, self._fleet, self._roster = finishing, fleet, roster
        self.unanswered: dict[str, tuple[int, Call]] = {}  # in full; with the tasks still owed
        self.unsent: deque[tuple[int, Call]] = deque()  # whose `Accepted` the link has not taken yet
        self._fetching: dict[str, int] = {}  # token of a large outcome on its way -> its actor

    def start(self, start: StartCall) -> None:
        """Make a call of the tasks the scheduler has chosen, each as its tracer gives it; it is to be sent."""
        calls = []
        for token in start.tokens:
            if token in self._errands:
                calls.append(self._errands.call(token))
                continue
            task = self._tasks.by_token[token]
            if not task.accepted:
                self._tasks.accept(task)
            if task.tracer is None:
                self._tasks.tracing.start(task)
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
            call = Call(f"{self._driver}.{start.call}", self._driver, self._release, tuple(calls), *times)
            self.unanswered[call.id] = start.actor, call
            self.unsent.append((start.actor, call))

    def replied(self, call_id: str, reply: Reply | Busy | None, reason: str, without: FailureKind) -> None:
        """A call has come back; with no reply, for `reason`, all it still owes counts as `without` says."""
        if call_id not in self.unanswered:
            return
        actor, call = self.unanswered[call_id]
        if reply is None:
            self._events += self._roster.lose(actor, reason)
            self._fleet.forget(actor, call_id, [task.token for task in call.tasks])
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
            self.unanswered[call_id] = actor, call
        else:
            del self.unanswered[call_id]
        self._take_answers(actor, call_id, answers)
        if call.tasks:
            self._fleet.collect(actor, call)

    def _put_back(self, call_id: str, actor: int, call: Call, why: str) -> None:
        """The actor takes nothing now: its tasks wait here, and it is asked again after the next beat."""
        del self.unanswered[call_id]
        self._events += self._roster.lose(actor, why)
        for sent in call.tasks:
            self._events.append(TaskFinished(sent.token, None))
            if sent.token in self._tasks.by_token:
                self._waiting.again(self._tasks.by_token[sent.token], alone=False)
            elif sent.token in self._errands:
                self._errands.wait(sent.token)

    def _take_answers(self, actor: int, call_id: str, answers: tuple[Answer, ...]) -> None:
        for answer in answers:
            task = self._tasks.by_token.get(answer.token)
            if isinstance(answer, Large):
                self._fetching[answer.token] = actor
                self._fleet.fetch(actor, answer.token)
            elif not isinstance(answer, Pending):
                self._finishing.finish(actor, answer)
            elif task is not None:
                self._take_news(actor, call_id, task, answer)

    def _take_news(self, actor: int, call_id: str, task: TracedTask, news: Pending) -> None:
        """What a task that is not finished has asked, logged or met."""
        if news.soft_limit_hit:
            self._tasks.tell_soft_limit(task)
        if news.wishes:
            task.told.extend(wish for wish in news.wishes if len(wish) <= 2 * self._settings.log_limit_bytes)
            goes_on = not task.cancelled or task.how is Reason.SOFT_LIMIT  # else progress would overwrite REVOKED
            self._tasks.tracing.resume(task, news if goes_on else _only_logs(news))
        if task not in self._tasks:  # its wish has failed, and with it the task
            self._fleet.cancel(actor, call_id, [news.token], Reason.CANCEL)
        elif task.cancelled:
            self._fleet.cancel(actor, call_id, [news.token], task.how)  # the first may have overtaken the call

    def fetched(self, token: str, data: bytes | None) -> None:
        """A large outcome is here, or lost with its actor."""
        lost = Failed(token, FailureKind.UNSURE, "UNSURE", "a large result was lost with its actor")
        actor = self._fetching.pop(token, None)
        if actor is not None:
            self._finishing.finish(actor, pickle.loads(data) if data is not None else lost)


def _only_logs(news: Pending) -> Pending:
    wishes = [wish for data in news.wishes for wish in pickle.loads(data)]
    return news._replace(wishes=(pickle.dumps([wish for wish in wishes if isinstance(wish, LogLine)], 5),))
