"""A run as one picture: what a task costs, where that goes, how many get through, how long one takes."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cpu import Kind
from benchmarks.report import number
from benchmarks.samples import Spread, Summary

#: A bar longer than this many times the shortest one does not fit on a linear axis.
FITS = 20

OTHERS, BRIDGE = "#9aa5b1", "#d9480f"
KIND_COLOURS = {
    Kind.WORKER: "#1864ab",
    Kind.CHILD: "#74b3e8",
    Kind.DRIVER: "#7048e8",
    Kind.SPAWNED: "#c2255c",
    Kind.ACTOR: "#2b8a3e",
    Kind.EXECUTOR: "#8ce99a",
    Kind.RAY: "#868e96",
    Kind.REDIS: "#f2b705",
}


def draw(summaries: Sequence[Summary], about: Mapping[str, Any], path: Path) -> bool:
    """Write the picture; False, with a line that says so, where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(13, 7.5), layout="constrained", sharey=True)
    (cost, parts), (throughput, latency) = panels
    _bars(cost, [s.cpu_ms for s in summaries], summaries, "CPU per task, all processes together (ms)\nless is better")
    _stacks(parts, summaries)
    _bars(throughput, [s.throughput for s in summaries], summaries, "Tasks per second from a backlog\nmore is better")
    _latencies(latency, summaries)
    cost.set_yticks(range(len(summaries)), [s.title for s in summaries])
    cost.invert_yaxis()  # and with it that of all panels, which share it
    figure.suptitle("A task that does nothing: what the way there and back costs", fontsize=15, fontweight="bold")
    figure.supxlabel(_footnote(about), fontsize=8, color="#495057")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _bars(axes: Any, values: Sequence[Spread], summaries: Sequence[Summary], title: str) -> None:
    """One bar each on a logarithmic axis, with the median as a number and the extremes as a line."""
    medians = [v.median for v in values]
    reach = [[v.median - v.low for v in values], [v.high - v.median for v in values]]
    colours = [BRIDGE if s.approach == "bridge" else OTHERS for s in summaries]
    lines = {"ecolor": "#343a40", "capsize": 3}
    axes.barh(range(len(values)), medians, xerr=reach, color=colours, error_kw=lines, log=True)
    for place, value in enumerate(values):
        axes.text(value.high * 1.15, place, number(value.median), va="center", fontweight="bold")
    axes.set_xlim(min(medians) / 3, max(v.high for v in values) * 4)
    _finish(axes, title)
    _plain_numbers(axes)


def _stacks(axes: Any, summaries: Sequence[Summary]) -> None:
    """CPU by kind of process, on a linear axis; what does not fit is said in words."""
    shortest = min(s.cpu_ms.median for s in summaries)
    fits = [s.cpu_ms.median <= FITS * shortest for s in summaries]
    left = [0.0] * len(summaries)
    for kind in Kind:
        widths = [s.cpu_ms_by_kind.get(kind.value, 0.0) * fit for s, fit in zip(summaries, fits, strict=True)]
        if any(widths):
            axes.barh(range(len(widths)), widths, left=left, label=kind.value, color=KIND_COLOURS[kind])
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, (summary, fit) in enumerate(zip(summaries, fits, strict=True)):
        if not fit:
            axes.text(
                0, place, f"  {number(summary.cpu_ms.median)} ms: far beyond this scale", va="center", style="italic"
            )
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    _finish(axes, "The same CPU by kind of process (ms)\nlinear scale")


def _latencies(axes: Any, summaries: Sequence[Summary]) -> None:
    """From p50 to p95, on a logarithmic axis."""
    for place, s in enumerate(summaries):
        colour = BRIDGE if s.approach == "bridge" else "#495057"
        axes.plot([s.p50_ms.median, s.p95_ms.median], [place, place], color=colour, linewidth=3, alpha=0.5)
        axes.plot(s.p50_ms.median, place, "o", color=colour, markersize=8)
        axes.plot(s.p95_ms.median, place, "|", color=colour, markersize=14, markeredgewidth=2)
        text = f"{number(s.p50_ms.median)} .. {number(s.p95_ms.median)}"
        axes.text(s.p95_ms.median * 1.3, place, text, va="center", fontweight="bold")
    axes.set_xscale("log")
    axes.set_xlim(min(s.p50_ms.median for s in summaries) / 2, max(s.p95_ms.median for s in summaries) * 10)
    _finish(axes, "Send to result, one task at a time: p50 .. p95 (ms)\nless is better")
    _plain_numbers(axes)


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_numbers(axes: Any) -> None:
    """1, 10, 100 instead of powers of ten."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _footnote(about: Mapping[str, Any]) -> str:
    machine, size = about["machine"], about["size"]
    return (
        f"{machine['cores']} cores {machine['cpu']}, Python {machine['python']}, Celery {machine['celery']}, "
        f"Ray {machine['ray']}, Redis {machine['redis']}; {size['rounds']} rounds of {size['tasks']} tasks "
        f"(seed: 1 % of that), medians with extremes; {about['began'][:10]}"
    )
