"""What bodies say of when they ran, and what follows from it. Pure. Seconds of the monotonic clock of one host."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Ran(NamedTuple):
    """One run of a body on one executor."""

    began: float
    ended: float
    pid: int


def runs_of(values: Iterable[Sequence[float]]) -> list[Ran]:
    """The runs in returned values [anything, began, ended, pid], in order of their beginning; a batch counts once."""
    return sorted({Ran(value[1], value[2], int(value[3])) for value in values})


def busy_share(runs: Sequence[Ran], executors: int, since: float | None = None) -> float:
    """The share of all executors' time in which a body ran, while there was work: until the last body began.

    Args:
        runs: at least one.
        executors: how many there are.
        since: when work was there for all of them; default the first body's beginning.
    """
    start, until = runs[0].began if since is None else since, runs[-1].began
    used = sum(max(0.0, min(run.ended, until) - max(run.began, start)) for run in runs)
    return used / (executors * (until - start)) if until > start else 1.0


def used_s(runs: Iterable[Ran], since: float, until: float) -> float:
    """Seconds of executors' time that bodies used between two moments."""
    return sum(max(0.0, min(run.ended, until) - max(run.began, since)) for run in runs)


def shared_window(first: Sequence[Ran], second: Sequence[Ran]) -> tuple[float, float]:
    """From when both have begun to when the first of both has begun its last body."""
    return max(first[0].began, second[0].began), min(first[-1].began, second[-1].began)


def by_executor(runs: Iterable[Ran]) -> dict[int, list[Ran]]:
    """The runs of each process, in order."""
    found: defaultdict[int, list[Ran]] = defaultdict(list)
    for run in runs:
        found[run.pid].append(run)
    return dict(found)


def gaps_ms(runs: Iterable[Ran]) -> list[float]:
    """Milliseconds between the end of a body and the beginning of the next one on the same executor."""
    return [
        1000 * (later.began - earlier.ended)
        for mine in by_executor(runs).values()
        for earlier, later in itertools.pairwise(mine)
    ]


def in_slices(runs: Sequence[Ran], executors: int, slices: int = 60) -> tuple[list[float], list[float]]:
    """Busy share over time: (seconds since the first body began, share of the slice in percent)."""
    start = runs[0].began
    width = (max(run.ended for run in runs) - start) / slices or 1.0
    edges = [start + index * width for index in range(slices)]
    return [edge - start for edge in edges], [
        100 * used_s(runs, edge, edge + width) / (executors * width) for edge in edges
    ]
