"""Prints the README's tables from the stored results: ``python -m benchmarks.readme``; a test keeps both in step."""

import json
from pathlib import Path

RESULTS = Path(__file__).with_name("results")
RESULT = RESULTS / "noop.json"
HEAD = "| a task that does nothing | tasks/s | p50 ms | CPU ms | CPU to prefork | tasks/s to a blocking Ray call |"
TARGETS_HEAD = "| benchmark | target | asked | measured | |"
#: In the order the README shows them.
NAMES = ("noop", "latency", "batching", "waiting", "mixed", "growth", "scaling", "warm", "data")

DATA_HEAD = (
    "| an array of float64 | 1 MiB: p50 ms | CPU ms | producer's CPU ms | 16 MiB: p50 ms | CPU ms | producer's CPU ms |"
)
#: Way -> what a reader is told.
DATA_ROWS = {
    "prefork-list": "Celery prefork, JSON list",
    "bridge-list": "this bridge, JSON list",
    "prefork-base64": "Celery prefork, base64",
    "bridge-envelope": "this bridge, base64 envelope",
    "bridge-ref": "**this bridge, by reference**",
    "prefork-chain-base64": "chain of three: Celery prefork, base64",
    "bridge-chain-ref": "chain of three: this bridge, by reference",
    "bridge-chain-device": "chain of three: this bridge, on the device",
}

GPU_HEAD = "| on one {device} | median (extremes) |"
#: Figure -> what a reader is told, factor, unit.
GPU_ROWS = {
    "cold s": ("first sum in a new process", 1000, "ms"),
    "warm s": ("the same in a warm one", 1000, "ms"),
    "enhance compiling s": ("a photograph, kernels to be compiled (once per machine)", 1000, "ms"),
    "enhance from disk s": ("a photograph in a new process, kernels on disk", 1000, "ms"),
    "enhance after warm-up s": ("the first photograph after warm-up", 1000, "ms"),
    "enhance later s": ("later photographs", 1000, "ms"),
    "batch gain": ("items/s of the best batch to one by one", 1, "x"),
    "pinned gain": ("copy to the device, pinned to pageable", 1, "x"),
    "to_device 64 MiB to pinned copy": ("64 MiB from NumPy to the device, to one pinned copy", 1, "x"),
    "to_device 256 MiB to pinned copy": ("256 MiB, likewise", 1, "x"),
    "overlap gain": ("copy, compute, copy back: streams to one after the other", 1, "x"),
}


def table(result):
    """The Markdown table of one stored result; medians."""
    lines = [HEAD, "|---|---|---|---|---|---|"]
    for row in result["summary"]:
        title = f"**{row['title']}**" if row["approach"] == "bridge" else row["title"]
        cells = [_number(row[key][0]) for key in ("throughput", "p50_ms", "cpu_ms")]
        ratios = row["cpu_ratio"]["prefork"][0], row["throughput_ratio"]["blocking-ray"][0]
        cells += [f"{_number(ratio)} x" for ratio in ratios]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def targets_table(results):
    """The Markdown table of all targets of stored results by name; medians with extremes."""
    lines = [TARGETS_HEAD, "|---|---|---|---|---|"]
    for name, result in results.items():
        for target in result["targets"]:
            if not target["measured"]:
                continue
            bound = f"{'≤' if target['at_most'] else '≥'} {target['limit']:g} {target['unit']}".rstrip()
            chosen = " (chosen)" if target["chosen"] else ""
            middle, low, high = (_number(value) for value in target["measured"])
            verdict = target["verdict"] if target["verdict"] == "met" else f"**{target['verdict']}**"
            lines.append(f"| `{name}` | {target['what']} | {bound}{chosen} | {middle} ({low}..{high}) | {verdict} |")
    return "\n".join(lines)


def data_table(result):
    """The Markdown table of how large arrays travel; medians. CPU is that of a backlog, of chains one at a time."""
    figures = {row["lane"]: row for row in result["summary"]}
    lines = [DATA_HEAD, "|---|---|---|---|---|---|---|"]
    for way, title in DATA_ROWS.items():
        cells = []
        for mib in (1, 16):
            row = figures.get(f"{way}-{mib}", {})
            cpu = "cpu_ms" if "cpu_ms" in row else "alone_cpu_ms"
            cells += [_number(row[key][0]) if key in row else "" for key in ("p50_ms", cpu, "sender_ms")]
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_table(result):
    """The Markdown table of what only a GPU can show; medians with extremes."""
    (summary,) = result["summary"]
    lines = [GPU_HEAD.format(device=result["device"]), "|---|---|"]
    for key, (title, factor, unit) in GPU_ROWS.items():
        if key not in summary:
            continue  # a result from before this was measured
        middle, low, high = (_number(value * factor) for value in summary[key])
        lines.append(f"| {title} | {middle} {unit} ({low}..{high}) |")
    return "\n".join(lines)


def stored_gpu():
    """The stored result of `benchmarks.gpu`."""
    return json.loads((RESULTS / "gpu-nvidia-h200-kernels.json").read_text())


def stored():
    """The stored results the README speaks of, by name."""
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in NAMES}


def _number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    print(table(json.loads(RESULT.read_text())) + "\n\n" + targets_table(stored()))
    print("\n" + data_table(stored()["data"]) + "\n\n" + gpu_table(stored_gpu()))
