"""Summaries as text a person reads. Pure: no services, no clock."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cpu import Kind
from benchmarks.samples import Sample, Spread, Summary

#: Share of the machine's CPU that others may use before the numbers are called noisy.
QUIET_SHARE = 0.10


def report(summaries: Sequence[Summary], samples: Sequence[Sample], idle: Mapping[str, Mapping[str, float]]) -> str:
    """All tables and remarks of a run."""
    parts = [main_table(summaries), ratio_table(summaries), kind_table(summaries, idle), remarks(samples)]
    return "\n\n".join(part for part in parts if part)


def main_table(summaries: Sequence[Summary]) -> str:
    """What each approach achieves and costs; medians over the rounds, smallest and largest in brackets."""
    head = ["approach", "tasks/s", "p50 ms", "p95 ms", "CPU ms/task", "CPU ms, one at a time"]
    rows = [
        [s.title, *(show(v) for v in (s.throughput, s.p50_ms, s.p95_ms, s.cpu_ms, s.alone_cpu_ms))] for s in summaries
    ]
    return table(head, rows)


def ratio_table(summaries: Sequence[Summary]) -> str:
    """CPU and throughput as multiples of the baselines."""
    bases = list(dict.fromkeys(base for s in summaries for base in s.cpu_ratio))
    head = ["ratio to", *(f"CPU / {base}" for base in bases), *(f"tasks/s / {base}" for base in bases)]
    rows = [
        [s.title, *(show(s.cpu_ratio.get(b)) for b in bases), *(show(s.throughput_ratio.get(b)) for b in bases)]
        for s in summaries
    ]
    return table(head, rows) if bases else ""


def kind_table(summaries: Sequence[Summary], idle: Mapping[str, Mapping[str, float]]) -> str:
    """Where the CPU goes: milliseconds per task by kind of process, and what all of them use while nothing is sent."""
    kinds = [kind.value for kind in Kind if any(s.cpu_ms_by_kind.get(kind) for s in summaries)]
    rows = [
        [
            s.title,
            *(number(s.cpu_ms_by_kind.get(kind)) for kind in kinds),
            number(sum(idle.get(s.approach, {}).values())),
        ]
        for s in summaries
    ]
    return table(["CPU ms/task by process", *kinds, "idle ms/s"], rows)


def remarks(samples: Sequence[Sample]) -> str:
    """What the sender used, and whether others used the machine."""
    if not samples:
        return ""
    producer = sorted(s.producer_cpu_ms for s in samples)[len(samples) // 2]
    foreign = sorted(s.foreign_share for s in samples)[len(samples) // 2]
    noise = " The machine was not quiet: trust ratios only." if foreign > QUIET_SHARE else ""
    return (
        f"Sending a task: {number(producer)} ms of the producer's CPU, counted nowhere above.\n"
        f"CPU used by others while backlogs were worked off: {100 * foreign:.0f} % (median).{noise}"
    )


def failures(failed: Mapping[str, str]) -> str:
    """The approaches that gave no numbers, with the end of their logs."""
    return "\n\n".join(f"FAILED {name}: {reason}" for name, reason in failed.items())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(len(line[column]) for line in [head, *rows]) for column in range(len(head))]
    lines = [_line(head, widths), "  ".join("-" * width for width in widths)]
    return "\n".join([*lines, *(_line(row, widths) for row in rows)])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()


def show(value: Spread | None) -> str:
    """A median with its extremes."""
    return f"{number(value.median)} ({number(value.low)}..{number(value.high)})" if value else "-"


def number(value: float | None) -> str:
    """Three digits that matter."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f}"
    if value >= 1 or not value:
        return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    return f"{value:.3g}" if value < 0.1 else f"{value:.2f}"


def as_json(run: Mapping[str, Any], summary: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> str:
    """Everything a later reader needs to judge or recompute the numbers; one sample per line."""
    document = json.dumps({**run, "summary": list(summary)}, indent=1)
    lines = ",\n  ".join(json.dumps(s) for s in samples)
    return f'{document[:-2]},\n "samples": [\n  {lines}\n ]\n}}\n'
