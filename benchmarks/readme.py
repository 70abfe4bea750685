"""Prints the README's table from the stored result: ``python -m benchmarks.readme``; a test keeps both in step."""

import json
from pathlib import Path

RESULT = Path(__file__).with_name("results") / "noop.json"
HEAD = "| a task that does nothing | tasks/s | p50 ms | CPU ms | CPU to prefork | tasks/s to a blocking Ray call |"


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


def _number(value):
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    print(table(json.loads(RESULT.read_text())))
