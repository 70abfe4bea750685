"""What was to be reached, and whether it was. Pure."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks.report import number, table
from benchmarks.samples import Spread


class Target(NamedTuple):
    """One promise: a measured figure must be at most, or at least, a limit. The median over the rounds decides."""

    what: str
    measured: Spread | None  # None: not measured, because something failed or was left out
    limit: float
    at_most: bool = True
    unit: str = "x"
    chosen: bool = False  # the limit is ours; issue 4 states none

    @property
    def verdict(self) -> str:
        """``met``, ``missed`` or ``not measured``."""
        if self.measured is None:
            return "not measured"
        value = self.measured.median
        return "met" if (value <= self.limit if self.at_most else value >= self.limit) else "missed"

    @property
    def asked(self) -> str:
        """The limit in words."""
        text = f"{'<=' if self.at_most else '>='} {self.limit:g} {self.unit}"
        return f"{text} (chosen)" if self.chosen else text

    def as_dict(self) -> dict[str, Any]:
        """For the JSON."""
        return {
            "what": self.what,
            "verdict": self.verdict,
            "measured": list(self.measured) if self.measured else None,
            "limit": self.limit,
            "at_most": self.at_most,
            "unit": self.unit,
            "chosen": self.chosen,
        }


def at_most(what: str, measured: Spread | None, limit: float, unit: str = "x", chosen: bool = False) -> Target:
    """A figure that must not be larger."""
    return Target(what, measured, limit, True, unit, chosen)


def at_least(what: str, measured: Spread | None, limit: float, unit: str = "x", chosen: bool = False) -> Target:
    """A figure that must not be smaller."""
    return Target(what, measured, limit, False, unit, chosen)


def target_table(targets: Sequence[Target]) -> str:
    """One line each: asked, measured (median and extremes), verdict."""
    rows = [[t.what, t.asked, _measured(t), t.verdict.upper()] for t in targets]
    return table(["target", "asked", "measured", ""], rows) if rows else ""


def one_line(targets: Iterable[Target]) -> str:
    """For a picture: each target with its verdict."""
    return "   ".join(f"{t.what} {t.asked}: {_median(t)} {t.verdict}" for t in targets)


def _measured(target: Target) -> str:
    if target.measured is None:
        return "-"
    return f"{_fine(target.measured.median)} ({_fine(target.measured.low)}..{_fine(target.measured.high)})"


def _median(target: Target) -> str:
    return _fine(target.measured.median) if target.measured else "-"


def _fine(value: float) -> str:
    """Three decimals near 1, where targets are."""
    return f"{value:.3f}" if abs(value) < 2 else number(value)
