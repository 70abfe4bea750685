"""The picture of `benchmarks.noop`: how many get through, how long one takes, what a task costs and where that goes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cpu import Kind
from benchmarks.plot import bars, colour_of, finish, footnote, plain_numbers
from benchmarks.report import number
from benchmarks.samples import Summary, percentile

#: A bar longer than this many times the median bar does not fit on a linear axis.
FITS = 8

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


def draw(
    pyplot: Any, summaries: Sequence[Summary], latencies_ms: Mapping[str, list[float]], about: Mapping[str, Any]
) -> Any:
    """Three panels that share the approaches as rows."""
    size = 20, 3 + 0.55 * len(summaries)
    made, (throughput, latency, parts) = pyplot.subplots(1, 3, figsize=size, layout="constrained", sharey=True)
    rows = [(s.title, s.throughput, colour_of(s.approach)) for s in summaries]
    with_queue = max((s.throughput.high for s in summaries if s.approach != "plain-ray"), default=math.inf)
    bars(throughput, rows, "Tasks per second from a backlog\nmore is better", most=with_queue)
    for label, summary in zip(throughput.get_yticklabels(), summaries, strict=True):
        label.set_fontweight("bold" if summary.approach == "bridge" else "normal")
    _distributions(latency, summaries, latencies_ms)
    _stacks(parts, summaries)
    made.suptitle("A task that does nothing: what the way there and back costs", fontsize=15, fontweight="bold")
    made.supxlabel(footnote(about, 260), fontsize=8, color="#495057")
    return made


def _stacks(axes: Any, summaries: Sequence[Summary]) -> None:
    """CPU by kind of process, on a linear axis; what does not fit is said in words."""
    middle = sorted(s.cpu_ms.median for s in summaries)[(len(summaries) - 1) // 2]
    fits = [s.cpu_ms.median <= FITS * middle for s in summaries]
    left = [0.0] * len(summaries)
    for kind in Kind:
        widths = [s.cpu_ms_by_kind.get(kind.value, 0.0) * fit for s, fit in zip(summaries, fits, strict=True)]
        if any(widths):
            axes.barh(range(len(widths)), widths, left=left, label=kind.value, color=KIND_COLOURS[kind])
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, (summary, fit) in enumerate(zip(summaries, fits, strict=True)):
        text = f" {number(summary.cpu_ms.median)}" + ("" if fit else ": far beyond this scale")
        axes.text(left[place], place, text, va="center", fontweight="bold")
    axes.set_xlim(0, max(left) * 1.15)
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    finish(axes, "CPU per task by kind of process (ms)\nless is better")


def _distributions(axes: Any, summaries: Sequence[Summary], latencies_ms: Mapping[str, list[float]]) -> None:
    """Every call as a faint dot, p5..p95 as a bar, the median as a mark with its number; a logarithmic axis."""
    for place, s in enumerate(summaries):
        colour, values = colour_of(s.approach), latencies_ms[s.approach]
        heights = [place + 0.3 * ((index * 0.618034) % 1 - 0.5) for index in range(len(values))]  # spread evenly
        axes.scatter(values, heights, s=5, color=colour, alpha=0.25, linewidths=0, rasterized=True)
        low, high = percentile(values, 0.05), percentile(values, 0.95)
        axes.plot([low, high], [place, place], color=colour, linewidth=4, alpha=0.9)
        axes.plot(s.p50_ms.median, place, "|", color="black", markersize=16, markeredgewidth=2)
        axes.text(max(high, max(values)) * 1.15, place, number(s.p50_ms.median), va="center", fontweight="bold")
    everything = [v for s in summaries for v in latencies_ms[s.approach]]
    axes.set_xscale("log")
    axes.set_xlim(min(everything) / 1.5, max(everything) * 3)
    finish(
        axes,
        "Send to result, one task at a time (ms, logarithmic)\nless is better; bar: 5..95 %, number: median",
    )
    plain_numbers(axes.xaxis)
