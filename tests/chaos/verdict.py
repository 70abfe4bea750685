"""Whether a run passes: pure, from the ledgers alone. docs/reliability.md states the rules and the bounds."""

from collections import Counter, defaultdict
from datetime import datetime
from itertools import pairwise

from tests.chaos.app import BATCH
from tests.chaos.cluster import SLOTS
from tests.chaos.ledger import FINAL

#: Most bodies that one fault may make run once more, by its kind; all that one worker or all workers have in hand.
IN_HAND = SLOTS + 6  # GPU tasks with a slot, and CPU tasks that one child has prefetched
RERUNS = {
    "kill executor": BATCH, "kill actor": 2 * IN_HAND, "kill node": 2 * IN_HAND, "kill driver": IN_HAND,
    "kill worker": IN_HAND, "term worker": IN_HAND, "restart redis": 2 * IN_HAND, "reset all": 2 * IN_HAND,
    "reset one": IN_HAND, "stop redis": 2 * IN_HAND, "stop worker": IN_HAND, "stop driver": IN_HAND,
    "stop actor": IN_HAND, "stop executor": IN_HAND, "stop node": IN_HAND,
}  # fmt: skip
#: Faults that may lose what was acknowledged early.
LOSES_EARLY = ("kill worker",)
#: Kinds whose bodies may never start.
NEVER_RUN = frozenset({"invalid", "expired"})
EARLY = frozenset({"noop_early", "batch_early", "nap_early", "long_early", "retry_early"})
#: Kind -> the only ends it may have; all others: SUCCESS.
ENDS = {
    "poison": {"TaskPoisoned"},
    "invalid": {"PayloadInvalid"},
    "expired": {"TaskRevokedError"},
    "revoked": {"SUCCESS", "TaskRevokedError"},
    **{kind: {"SUCCESS", "WorkerLostError"} for kind in EARLY},
}
#: Kinds that end their own executor: the charge each brings with it.
OWN_CHARGES = {"once": 1}
MAX_CRASHES = 2


class Story:
    """One task: what was sent, what its bodies did, what was stored."""

    def __init__(self, kind, history):
        self.kind, self.history = kind, history
        self.received, self.starts, self.ends = [], [], []

    @property
    def end(self):
        """SUCCESS, the class of the error, or None."""
        if not self.history or self.history[-1][0] not in FINAL:
            return None
        state, error, _ = self.history[-1]
        return state if state == "SUCCESS" else error

    @property
    def changed(self):
        """Whether a final state was followed by another state."""
        states = [seen[:2] for seen in self.history]
        return any(one[0] in FINAL and one != other for one, other in pairwise(states))


class Verdict:
    """Judges a run.

    Args:
        sent: lines of the producer. effects: lines of bodies and workers. histories: what was seen of each result.
        faults: lines of the faults.
    """

    def __init__(self, sent, effects, histories, faults):
        self.faults = [each for each in faults if each["kind"] in RERUNS]
        self.sent = [each for each in sent if each["what"] == "sent"]
        self.stories = {each["id"]: Story(each["kind"], histories.get(each["id"], [])) for each in self.sent}
        for line in effects:
            if story := self.stories.get(line["id"]):
                {"received": story.received, "start": story.starts, "end": story.ends}[line["what"]].append(line)
        self.twice_sent = {each["id"] for each in self.sent if each["tries"] > 1}
        self.killed = Counter(each["victim_pid"] for each in self.faults if each["kind"] == "kill executor")
        self.lost = [task for task, story in self.stories.items() if story.end is None]
        self.lost_on_the_way = [task for task in self.lost if self._is_on_the_way(task)]
        self.duplicated = {task: extra for task, story in self.stories.items() if (extra := self._extra(story)) > 0}

    def _extra(self, story):
        """Bodies beyond those the task asked for."""
        if story.kind.startswith("retry"):
            wanted = len({line.get("retries", 0) for line in story.starts})
        else:
            wanted = {"poison": MAX_CRASHES, "once": 2}.get(story.kind, 1)
        return len(story.starts) - wanted

    @property
    def poisoned(self):
        """Tasks that ended as TaskPoisoned."""
        return {
            task for task, story in self.stories.items() if story.history and story.history[-1][1] == "TaskPoisoned"
        }

    @property
    def buried(self):
        """Tasks that may have a dead letter: poisoned ones, and such as have succeeded but once, which Celery keeps.

        The others of their runs, of a message that was delivered again, have all died.
        """
        return self.poisoned | {
            task
            for task, story in self.stories.items()
            if story.ends and len(story.starts) - len(story.ends) >= MAX_CRASHES
        }

    @property
    def bound(self):
        """Most duplicates the faults of this run allow, and how many early ones may have been lost with a worker."""
        struck = Counter(each["kind"] for each in self.faults)
        reruns = sum(RERUNS[kind] * times for kind, times in struck.items()) + len(self.twice_sent)
        return reruns, sum(struck[kind] for kind in LOSES_EARLY) * SLOTS

    def _is_on_the_way(self, task):
        """Whether no worker has ever had the message: the only one, or that of the next try."""
        story = self.stories[task]
        state, tries, _ = story.history[-1] if story.history else ("", "", "")
        return not story.received or (state == "RETRY" and len(story.received) <= int(tries) + 1)

    def violations(self):
        """Sentences, one for each rule that was broken; none means that the run passes."""
        found = []
        for task, story in self.stories.items():
            found += [f"{task} ({story.kind}): {what}; {_tale(story)}" for what in self._broken(task, story)]
        reruns, early = self.bound
        duplicates = sum(self.duplicated.values())
        if duplicates > reruns:
            found.append(f"{duplicates} bodies ran once more, the faults explain {reruns}")
        if self.lost_on_the_way:
            found.append(f"{len(self.lost_on_the_way)} messages were lost on their way to a worker")
        lost_early = sum(self.stories[task].kind in EARLY for task in set(self.lost) - set(self.lost_on_the_way))
        if lost_early > early:
            found.append(f"{lost_early} early tasks were lost, the killed workers explain {early}")
        return found

    def _broken(self, task, story):
        if story.changed and not self._may_change(task, story):
            yield "its final state changed"
        if story.end is None:
            if story.kind not in EARLY and task not in self.lost_on_the_way:
                yield "never ended"
            return
        if story.end not in ENDS.get(story.kind, {"SUCCESS"}) and not self._charged_by_us(story):
            yield f"ended as {story.end}"
        if story.end == "SUCCESS" and not story.ends:
            yield "succeeded without having run"
        if story.kind in NEVER_RUN and story.starts:
            yield "ran"
        if story.kind in EARLY and len(story.starts) > len(story.received):
            yield f"acknowledged early, ran {len(story.starts)} times, was delivered {len(story.received)} times"

    def _may_change(self, task, story):
        """Two copies from the producer; a revoked task that came to a worker which had not heard of it; a lost retry.

        Celery stores REVOKED as soon as any worker hears the command, and keeps revoked ids in its workers' memory. It
        publishes a retry before the task has ended, so that one may go on after a process lost in between.
        """
        lost = any(error == "WorkerLostError" for _, error, _ in story.history)
        return task in self.twice_sent or story.kind == "revoked" or (story.kind.startswith("retry") and lost)

    def _charged_by_us(self, story):
        """Whether an innocent was running in so many executors that we killed ourselves."""
        own = OWN_CHARGES.get(story.kind, 0)
        ours = sum(min(1, self.killed[line["pid"]]) for line in story.starts)
        return story.end == "TaskPoisoned" and own + ours >= MAX_CRASHES

    def recoveries(self):
        """Kind of fault -> seconds from each to the first success of a GPU task that was sent after it."""
        ended = []
        for each in self.sent:
            story = self.stories[each["id"]]
            if story.end == "SUCCESS" and story.kind != "cpu":
                ended.append((each["at"], _stored_at(story)))
        ended.sort()
        found = defaultdict(list)
        for fault in self.faults:
            later = [done for sent, done in ended if sent > fault["struck"]]
            if later:
                found[fault["kind"]].append(max(0.0, min(later) - fault["struck"]))
        return found


def _stored_at(story):
    first = next(seen for seen in story.history if seen[0] == "SUCCESS")
    return datetime.fromisoformat(first[2]).timestamp()


def _tale(story):
    events = [(line["at"], f"{line['what']} {line['pid']}") for line in (*story.received, *story.starts, *story.ends)]
    said = ", ".join(f"{at:.1f} {text}" for at, text in sorted(events))
    return f"[{said}] {[seen[:2] for seen in story.history]}"
