"""What all pictures share: colours, axes, and a footnote with the machine. Axes and pyplot are matplotlib's."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import number
from benchmarks.samples import Spread

#: The bridge stands out; the others are grey.
BRIDGE, OTHERS, INK = "#d9480f", "#9aa5b1", "#343a40"
#: For more than one line that is neither.
SERIES = ("#d9480f", "#1864ab", "#2b8a3e", "#7048e8", "#868e96")


def colour_of(lane: str) -> str:
    """Lanes of the bridge in its colour."""
    return BRIDGE if lane.startswith("bridge") else OTHERS


def figure(pyplot: Any, columns: int, about: Mapping[str, Any], title: str, height: float = 5.2) -> tuple[Any, Any]:
    """A figure with panels side by side: (figure, list of axes). Title, verdicts and machine stand around them."""
    made, panels = pyplot.subplots(1, columns, figsize=(6.5 * columns, height), layout="constrained", squeeze=False)
    made.suptitle(title, fontsize=15, fontweight="bold")
    made.supxlabel(footnote(about, 105 * columns), fontsize=8, color="#495057")
    return made, list(panels[0])


def bars(
    axes: Any, rows: Sequence[tuple[str, Spread, str]], title: str, unit: str = "", most: float = math.inf
) -> None:
    """Horizontal bars from 0 with medians as numbers and extremes as lines: (label, value, colour) each.

    A bar longer than `most` leaves the picture at the right; its number says so with an arrow.
    """
    medians = [value.median for _, value, _ in rows]
    reach = [[v.median - v.low for _, v, _ in rows], [v.high - v.median for _, v, _ in rows]]
    axes.barh(
        range(len(rows)), medians, xerr=reach, color=[c for *_, c in rows], error_kw={"ecolor": INK, "capsize": 3}
    )
    farthest = max((value.high for _, value, _ in rows if value.high <= most), default=most)
    on_white = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # readable where a line crosses it
    for place, (_, value, _) in enumerate(rows):
        fits = value.high <= most
        text = f"{number(value.median)}{unit}" + ("" if fits else " →")
        x = value.high + farthest * 0.015 if fits else farthest * 1.19
        axes.text(x, place, text, va="center", ha="left" if fits else "right", fontweight="bold", bbox=on_white)
    axes.set_xlim(0, farthest * 1.2)
    axes.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axes.invert_yaxis()
    finish(axes, title)


def limit(axes: Any, value: float, text: str, vertical: bool = True) -> None:
    """A dashed line at a target, named in the legend."""
    (axes.axvline if vertical else axes.axhline)(value, color="#2b8a3e", linestyle="--", label=text)
    legend_below(axes)


def legend_below(axes: Any) -> None:
    """A legend that covers nothing."""
    axes.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)


def share_below(axes: Any, values: Sequence[float], colour: str, label: str) -> None:
    """A distribution as the share of values that are at most x."""
    ordered = sorted(values)
    shares = [(index + 1) / len(ordered) * 100 for index in range(len(ordered))]
    axes.step([ordered[0], *ordered], [0.0, *shares], where="post", color=colour, label=label, linewidth=2)


def finish(axes: Any, title: str, grid: str = "x") -> None:
    """Title to the left, a light grid, no box."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def plain_numbers(axis: Any) -> None:
    """1, 10, 100 instead of powers of ten."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def footnote(about: Mapping[str, Any], width: int) -> str:
    """The targets with their verdicts, then what it was measured on."""
    machine, size = about["machine"], about["size"]
    verdicts = [
        f"{target['what']} {'≤' if target['at_most'] else '≥'} {target['limit']:g} {target['unit']}: "
        + (f"{target['measured'][0]:.3g}, " if target["measured"] else "")
        + target["verdict"]
        for target in about["targets"]
    ]
    measured_on = (
        f"{machine['cores']} cores {machine['cpu']}, Python {machine['python']}, Celery {machine['celery']}, "
        f"Ray {machine['ray']}, Redis {machine['redis']}; " + ", ".join(f"{k} {v:g}" for k, v in size.items())
    )
    lines = [*verdicts, f"{measured_on}; medians with extremes; {about['began'][:10]}"]
    return "\n".join(wrapped for line in lines for wrapped in textwrap.wrap(line, width))
