"""What one round of one lane gave, for benchmarks other than `noop`; and what is made of many. Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from pydantic import BaseModel

from benchmarks.report import number, show, table
from benchmarks.samples import Spread, spread


class Record(BaseModel):
    """One lane in one round: single figures, and lists of many."""

    lane: str
    round: int
    figures: dict[str, float] = {}
    lists: dict[str, list[float]] = {}


Records = Sequence[Record]


def over(records: Records, lane: str, figure: str) -> Spread | None:
    """A figure of a lane over all rounds; None if it was never measured."""
    values = [r.figures[figure] for r in records if r.lane == lane and figure in r.figures]
    return spread(values) if values else None


def ratio(records: Records, figure: str, lane: str, base: str) -> Spread | None:
    """A figure of one lane divided by that of another, within each round; not where the other's is 0.

    That is CPU time of a very short run, of which the kernel's clock has seen nothing.
    """
    records = [record for record in records if record.lane != base or record.figures.get(figure)]
    return across(records, lambda mine: mine[lane][figure] / mine[base][figure], (lane, base))


def across(
    records: Records, value: Callable[[Mapping[str, Mapping[str, float]]], float], lanes: Iterable[str]
) -> Spread | None:
    """A value made of the figures of several lanes, for each round that has all of them."""
    rounds: dict[int, dict[str, dict[str, float]]] = {}
    for record in records:
        rounds.setdefault(record.round, {})[record.lane] = record.figures
    wanted = set(lanes)
    values = [value(figures) for figures in rounds.values() if wanted <= figures.keys()]
    return spread(values) if values else None


def pooled(records: Records, lane: str, name: str) -> list[float]:
    """The lists of all rounds of a lane, one after the other."""
    return [value for r in records if r.lane == lane for value in r.lists.get(name, [])]


def lanes_of(records: Records) -> list[str]:
    """The lanes that were measured, in the order of their first record."""
    return list(dict.fromkeys(r.lane for r in records))


def record_table(records: Records, titles: Mapping[str, str], columns: Mapping[str, str], head: str) -> str:
    """A row per lane, a column per figure: medians with extremes. `columns` maps a figure to its heading."""
    measured = set(lanes_of(records))
    rows = [
        [title, *(show(over(records, lane, figure)) for figure in columns)]
        for lane, title in titles.items()
        if lane in measured
    ]
    return table([head, *columns.values()], rows)


def summary_of(records: Records) -> list[dict[str, object]]:
    """Medians with extremes of every figure, for the JSON."""
    return [
        {"lane": lane} | {name: over(records, lane, name) for name in _figures(records, lane)}
        for lane in lanes_of(records)
    ]


def noise(foreign_shares: Sequence[float], quiet: float) -> str:
    """Whether others used the machine."""
    if not foreign_shares:
        return ""
    foreign = spread(foreign_shares)
    warning = " The machine was not quiet: trust ratios only." if foreign.median > quiet else ""
    return (
        f"CPU used by others meanwhile: {100 * foreign.median:.0f} % (median), "
        f"at most {number(100 * foreign.high)} %.{warning}"
    )


def _figures(records: Records, lane: str) -> list[str]:
    return list(dict.fromkeys(name for r in records if r.lane == lane for name in r.figures))
