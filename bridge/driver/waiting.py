"""In the driver: tasks that wait, for arrays that other actors hold and then in the scheduler for an actor.

What is to be fetched first, and which actor a task is pinned to, says its plan (`holders.py`); when a task
leaves, the scheduler. A task that waits in vain runs anywhere or fails, with the reason.
"""

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any

from kombu.serialization import prepare_accept_content

from actors.data.arrays import ArrayRef
from bridge.driver.errands import ENDED, NOT_HEARD_OF, Errands
from bridge.driver.holders import HOLDER_WAIT_S, Plan, handles_of, plan
from bridge.driver.in_hand import TasksInHand
from bridge.driver.lines import TaskRule
from bridge.driver.orders import Event, TaskCancelled, TaskWaiting
from bridge.driver.roster import Roster
from bridge.driver.scheduler import Stranded
from bridge.driver.tracing import TracedTask
from bridge.errors import BridgeError, ClusterUnavailable, NoSuitableGpu
from bridge.marks import Mark
from bridge.settings import Settings

logger = logging.getLogger(__name__)

#: From when on waiting calls for more actors, in seconds.
GROW_AFTER_S = 0.5


class WaitingTasks:
    """The way of tasks into the scheduler, and out of it where they do not leave in a call.

    Args:
        rules: what the scheduler knows of the tasks.
        events: takes what the scheduler is to be told.
    """

    def __init__(
        self, app: Any, settings: Settings, marks: dict[str, Mark], rules: dict[str, TaskRule], events: list[Event],
        tasks: TasksInHand, errands: Errands, roster: Roster,
    ) -> None:  # fmt: skip
        self._app, self._settings, self._marks, self._rules = app, settings, marks, rules
        self._events, self._tasks, self._errands, self._roster = events, tasks, errands, roster
        self._accepted_content = prepare_accept_content(app.conf.accept_content)
        self._highest_first = app.connection_for_read().transport.driver_type == "amqp"  # Redis: 0 goes first
        self._quiet: set[str] = set()  # tokens that are cancelled in the scheduler only
        self._warned: set[str] = set()  # names of tasks that wait for a GPU there is none of

    # ---- in

    def wait(self, task: TracedTask, alone: bool = False) -> None:
        """Let a task wait for its run, once all it takes is where it can be read."""
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
        if task not in self._tasks:
            self._tasks.discard_refs(task)  # answered meanwhile
        elif error is not None:
            self._tasks.refuse(task, error)
        else:
            self.wait(task, task.alone)

    def again(self, task: TracedTask, alone: bool) -> None:
        """Let a task wait for another run."""
        if task.cancelled:
            self._tasks.terminate(task)
            return
        self._tasks.renew(task)
        task.alone = task.alone or alone
        self.wait(task, task.alone)

    # ---- out

    def give_back(self, task: TracedTask) -> None:
        """To the worker, unless it runs or the broker has it no more: it never started, or is late and came back."""
        acks_late = getattr(self._app.tasks.get(task.run.task), "acks_late", False)
        if not task.accepted and (acks_late or not task.announced):
            self._cancel_quietly(task.token)
            self._tasks.give_back(task)

    def _cancel_quietly(self, token: str) -> None:
        """Take a waiting task from the scheduler; whoever does this answers for the task."""
        self._quiet.add(token)
        self._events.append(TaskCancelled(token))

    def drop(self, token: str) -> None:
        """The scheduler has dropped a task that was cancelled."""
        if token not in self._quiet and token in self._tasks.by_token:
            self._tasks.terminate(self._tasks.by_token[token])

    def forget_dropped(self) -> None:
        """The scheduler has been told all there was, and has dropped what it was to drop."""
        self._quiet.clear()

    # ---- in vain

    def hand_back(self, token: str) -> None:
        """What an executor held is lost, unless it is the new one that a task waits for."""
        task = self._tasks.by_token.get(token)
        if token in self._errands:
            actor, executor = self._errands.holder(token)
            if self._roster.executor(actor) == executor:
                self._errands.wait(token)
            else:
                self._errands.lose(token, ENDED)
        elif task is not None and task.plan is not None and task.plan.actor is not None:
            if self._roster.executor(task.plan.actor) == task.plan.executor:
                self.wait(task, task.alone)
            else:
                self._unpin(task)

    def _unpin(self, task: TracedTask) -> None:
        """What it takes is lost to all purposes: it runs anywhere, with the copy or to fail as HandleLost."""
        task.plan = Plan()
        self.wait(task, task.alone)

    def look_at(self, all_stranded: Iterable[Stranded], now: float) -> None:
        """Fail what has waited too long for an actor that suits, and what for its holder let run anywhere."""
        longest = self._settings.cluster_wait_s
        for stranded in all_stranded:
            task = self._tasks.by_token.get(stranded.token)
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
                self._tasks.refuse(task, self._no_actor(stranded.name))
            elif self._roster.ready and now - stranded.since > GROW_AFTER_S and stranded.name not in self._warned:
                self._warned.add(stranded.name)
                logger.warning("%s waits up to %g s: %s", stranded.name, longest, self._no_actor(stranded.name))

    def _no_actor(self, name: str) -> BridgeError:
        """Why a task cannot run anywhere now."""
        if not self._roster.ready:
            why = self._roster.why_fenced()
            return ClusterUnavailable(f"no GPU actor was ready for {self._settings.cluster_wait_s:g} s{why}")
        return NoSuitableGpu(name, self._marks[name].gpu.needs(), self._roster.describe())


def _number(priority: Any) -> int:
    """A message's priority; brokers take whatever a producer writes."""
    try:
        return int(priority)
    except (TypeError, ValueError):
        return 0
