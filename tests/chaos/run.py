"""A chaos run from one seed: `python -m tests.chaos.run --seed 1 --minutes 1`. What it proves: docs/reliability.md."""

import argparse
import gc
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

from celery import Celery, chain, chord, signature

from tests.chaos import measure, plan
from tests.chaos.cluster import Cluster
from tests.chaos.faults import Faults
from tests.chaos.ledger import Results, lines
from tests.chaos.verdict import EARLY, Verdict
from tests.support.services import ROOT

#: Waits of the harness, in seconds: for what was sent to end, and for capacity to come back.
DRAIN_S, WHOLE_S = 120, 90
#: Tasks of each kind before the first measurement, so that everything has been used once.
WARM_UP = 20


class Run:
    """One run: brings the system up, lets the plan happen, judges."""

    def __init__(self, seed, seconds, keep=None, say=print):
        self.seed, self.seconds, self.keep, self.say = seed, seconds, keep, say
        self.cluster = Cluster(plan.appendonly(seed))
        self.sent = self.cluster.folder / "sent"
        self.struck = self.cluster.folder / "faults"
        self.problems = []
        self.began = time.monotonic()

    def go(self):
        """The summary of the run; everything is taken down, whatever happens."""
        try:
            return self._go()
        except BaseException:
            self._keep()
            raise
        finally:
            left = self.cluster.end()
            if left:
                self.say(f"would not end: {left}")

    def _go(self):
        self.say(f"seed {self.seed}: {self.seconds:.0f} s, Redis appendonly {self.cluster.appendonly}")
        self.cluster.start()
        self.say(f"started, {time.monotonic() - self.began:.0f} s")
        url = self.cluster.redis.url
        self.app = Celery("observer", broker=url, backend=url, set_as_current=False)
        results = Results(url, self.sent)
        self._warm_up()
        before = self._measure()
        results.start()
        self._chaos()
        self._drain(results)
        results.end()
        self.say(f"drained, {time.monotonic() - self.began:.0f} s")
        results.look(everything=True)
        whole = self._try(lambda: self.cluster.wait_until_whole(self.app, WHOLE_S), "capacity did not come back")
        self._keys_are_gone()
        after = self._measure()
        self.problems += measure.leaks(before["processes"], after["processes"])
        self.problems += measure.leaked_in_ray(before["ray"], after["ray"])
        verdict = Verdict(
            lines(self.sent), lines(self.cluster.folder / "effects"), results.histories, lines(self.struck)
        )
        self.problems += [
            f"{task} has a dead letter and has not ended enough executors"
            for task in measure.dead_letters(self.cluster.redis.client) - verdict.buried
        ]
        summary = self._summary(verdict, before, after, whole)
        if summary["violations"]:
            self._keep()
        return summary

    def _keep(self):
        """Logs and ledgers of a failed run, beside its summary."""
        if self.keep:
            shutil.rmtree(self.keep, ignore_errors=True)
            shutil.copytree(self.cluster.folder / "logs", self.keep)
            for name in ("sent", "effects", "faults"):
                if (self.cluster.folder / name).exists():
                    shutil.copy(self.cluster.folder / name, self.keep)

    def _warm_up(self):
        self.cluster.wait_until_whole(self.app, WHOLE_S)
        # Drivers are forks: one that starts later holds copies of what its worker has opened since.
        for pid in self.cluster.find("driver").values():
            os.kill(pid, signal.SIGKILL)
        for worker in self.cluster.workers.values():
            worker.says("the GPU driver ended", WHOLE_S)
        self.cluster.wait_until_whole(self.app, WHOLE_S)
        self._use_everything()
        gc.collect()  # results of parts of chains and chords are left, which ask Redis when they are collected

    def _use_everything(self):
        url = self.cluster.redis.url
        app = Celery("warm-up", broker=url, backend=url, set_as_current=False)
        for each in [sent for n in range(WARM_UP) for sent in _one_of_each(app, f"warm-up-{n}")]:
            each.get(timeout=60)
        app.close()

    def _measure(self):
        return {
            "processes": measure.processes(self.cluster),
            "ray": measure.ray_holds(self.cluster),
            "keys": measure.keys(self.cluster.redis.client),
        }

    def _chaos(self):
        url, folder = self.cluster.redis.url, str(self.cluster.folder)
        command = [sys.executable, "-m", "tests.chaos.producer", url, folder, str(self.seed), str(self.seconds)]
        producer = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        faults = Faults(self.cluster, self.struck)
        started = time.monotonic()
        for fault in plan.faults(self.seed, self.seconds):
            time.sleep(max(0.0, started + fault.at - time.monotonic()))
            self.say(f"{time.monotonic() - started:6.1f} s  {fault.kind}: {faults.strike(fault)['victim']}")
        if producer.wait(self.seconds + 60) != 0:
            self.problems.append("the producer failed")
        faults.end()
        self.problems += faults.problems

    def _drain(self, results):
        deadline = time.monotonic() + DRAIN_S
        while time.monotonic() < deadline:
            wanted = {each["id"] for each in lines(self.sent) if each["what"] == "sent"}
            open_ones = [each for each in wanted if not results.final(each)]
            self._try(self.cluster.ensure, "a service did not start again")
            if not open_ones:
                return
            if not self._is_busy() and len(open_ones) < 50 and deadline - time.monotonic() < DRAIN_S / 2:
                return  # whatever has not ended by now is in nobody's hands
            time.sleep(1)

    def _is_busy(self):
        return any(name != "unacked_mutex" for name in measure.keys(self.cluster.redis.client))

    def _keys_are_gone(self):
        deadline = time.monotonic() + 40  # a message noted in the index alone is cleared when its time is up
        while (left := measure.keys(self.cluster.redis.client)) and time.monotonic() < deadline:
            time.sleep(1)
        self.problems += [
            f"Redis: {name} is left with {size}" for name, size in left.items() if name != "unacked_mutex"
        ]

    def _try(self, what, problem):
        try:
            return what()
        except Exception as error:
            self.problems.append(f"{problem}: {str(error)[-500:]}")

    def _summary(self, verdict, before, after, whole):
        violations = verdict.violations() + self.problems
        recoveries = verdict.recoveries()
        every = sorted(seconds for each in recoveries.values() for seconds in each)
        struck = Counter(each["kind"] for each in verdict.faults)
        stories = verdict.stories.values()
        ends = {kind: dict(Counter(str(each.end) for each in stories if each.kind == kind)) for kind in plan.SHARES}
        on_the_way = set(verdict.lost_on_the_way)
        lost_early = [task for task in verdict.lost if verdict.stories[task].kind in EARLY and task not in on_the_way]
        reruns, early = verdict.bound
        return {
            "seed": self.seed,
            "minutes": round(self.seconds / 60, 2),
            "appendonly": self.cluster.appendonly,
            "faults": dict(sorted(struck.items())),
            "tasks": dict(Counter(each["kind"] for each in verdict.sent)),
            "ends": ends,
            "sent": len(verdict.sent),
            "bodies": sum(len(story.starts) for story in stories),
            "lost": sorted(set(verdict.lost) - set(lost_early) - on_the_way),
            "lost on the way": sorted(on_the_way),
            "lost early": lost_early,
            "lost early allowed": early,
            "duplicated": sum(verdict.duplicated.values()),
            "duplicated allowed": reruns,
            "duplicated by kind": dict(Counter(verdict.stories[task].kind for task in verdict.duplicated)),
            "recovery s": {"p50": _percentile(every, 0.5), "p95": _percentile(every, 0.95)},
            "recovery s by fault": {kind: _percentile(sorted(each), 0.5) for kind, each in sorted(recoveries.items())},
            "whole again after s": whole and round(whole, 1),
            "before": before,
            "after": after,
            "violations": violations,
            "plan": [fault._asdict() for fault in plan.faults(self.seed, self.seconds)],
        }


def _one_of_each(app, name):
    """Also what sends further messages, for which driver and children connect to the broker."""
    send, part = app.send_task, partial(signature, app=app)
    yield from (send(f"chaos.{kind}", [name]) for kind in ("noop_late", "batch_late", "large", "cpu"))
    yield send("chaos.retry_late", [name, 1])
    yield chain(part("chaos.add", [0, name, 1]), part("chaos.cpu_add", [name, 1]), app=app).apply_async()
    yield chord([part("chaos.add", [0, name, n]) for n in (1, 2)], app=app)(part("chaos.total", [name]))


def _percentile(values, part):
    if len(values) < 2:
        return round(values[0], 2) if values else None
    return round(statistics.quantiles(values, n=100, method="inclusive")[int(part * 100) - 1], 2)


def table(summary):
    """The summary as a person reads it."""
    rows = [("fault", "times", "median s to the next success")]
    rows += [
        (kind, str(times), str(summary["recovery s by fault"].get(kind, "")))
        for kind, times in summary["faults"].items()
    ]
    said = ["", *(f"{one:<16}{two:>6}  {three}" for one, two, three in rows), ""]
    said += [f"{kind:<12} {times:>5}  {summary['ends'][kind]}" for kind, times in sorted(summary["tasks"].items())]
    said += [
        "",
        f"sent {summary['sent']}, bodies {summary['bodies']}, lost {len(summary['lost'])},"
        f" lost on the way {len(summary['lost on the way'])},"
        f" lost early {len(summary['lost early'])} (allowed {summary['lost early allowed']}),"
        f" duplicated {summary['duplicated']} (allowed {summary['duplicated allowed']}):"
        f" {summary['duplicated by kind']}",
        f"recovery p50 {summary['recovery s']['p50']} s, p95 {summary['recovery s']['p95']} s,"
        f" whole again after {summary['whole again after s']} s",
        *(f"VIOLATION {each}" for each in summary["violations"]),
        f"seed {summary['seed']}: {'FAILED' if summary['violations'] else 'passed'}",
    ]
    return "\n".join(said)


def main():
    """Exit code 1 when a rule was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "chaos")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    keep = options.out / f"seed-{options.seed}-logs"
    summary = Run(options.seed, options.minutes * 60, keep).go()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"seed-{options.seed}.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(table(summary))
    return 1 if summary["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
