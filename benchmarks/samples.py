"""What one round of one approach gave; and the statistics made of many."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel


class Sample(BaseModel):
    """One approach in one round. CPU times are per task and by kind of process."""

    approach: str
    round: int
    tasks: int
    seconds: float
    cpu_ms: dict[str, float]
    latencies_ms: list[float]
    alone_cpu_ms: dict[str, float]
    producer_cpu_ms: float
    foreign_share: float  # of the machine's CPU, used by others while the backlog was worked off

    @property
    def throughput(self) -> float:
        """Tasks per second."""
        return self.tasks / self.seconds


class Spread(NamedTuple):
    """The median over the rounds, with the extremes."""

    median: float
    low: float
    high: float


class Summary(BaseModel):
    """One approach over all rounds. Ratios are taken within each round, so that noise that hit all cancels."""

    approach: str
    title: str
    throughput: Spread
    p50_ms: Spread
    p95_ms: Spread
    cpu_ms: Spread
    alone_cpu_ms: Spread
    cpu_ms_by_kind: dict[str, float]
    cpu_ratio: dict[str, Spread]
    throughput_ratio: dict[str, Spread]


def spread(values: Iterable[float]) -> Spread:
    """Median, smallest and largest of at least one value."""
    ordered = sorted(values)
    return Spread(statistics.median(ordered), ordered[0], ordered[-1])


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def total(by_kind: Mapping[str, float]) -> float:
    """CPU over all kinds of processes."""
    return sum(by_kind.values())


def summarise(samples: Sequence[Sample], titles: Mapping[str, str], baselines: Sequence[str]) -> list[Summary]:
    """One summary for each approach that has samples, in the order of `titles`."""
    rounds = {name: {s.round: s for s in samples if s.approach == name} for name in titles}
    present = {name: by_round for name, by_round in rounds.items() if by_round}
    bases = {base: present[base] for base in baselines if base in present}
    return [_summary(titles[name], list(mine.values()), bases) for name, mine in present.items()]


def _summary(title: str, mine: list[Sample], bases: Mapping[str, Mapping[int, Sample]]) -> Summary:
    pairs = {base: [(s, theirs[s.round]) for s in mine if s.round in theirs] for base, theirs in bases.items()}
    pairs = {base: found for base, found in pairs.items() if found}
    return Summary(
        approach=mine[0].approach,
        title=title,
        throughput=spread(s.throughput for s in mine),
        p50_ms=spread(percentile(s.latencies_ms, 0.50) for s in mine),
        p95_ms=spread(percentile(s.latencies_ms, 0.95) for s in mine),
        cpu_ms=spread(total(s.cpu_ms) for s in mine),
        alone_cpu_ms=spread(total(s.alone_cpu_ms) for s in mine),
        cpu_ms_by_kind={k: statistics.median(s.cpu_ms.get(k, 0.0) for s in mine) for k in kinds_of(mine)},
        cpu_ratio={b: spread(total(s.cpu_ms) / total(t.cpu_ms) for s, t in found) for b, found in pairs.items()},
        throughput_ratio={b: spread(s.throughput / t.throughput for s, t in found) for b, found in pairs.items()},
    )


def kinds_of(samples: Iterable[Sample]) -> list[str]:
    """The kinds of processes that used CPU in any of the samples."""
    return sorted({kind for sample in samples for kind in sample.cpu_ms})
