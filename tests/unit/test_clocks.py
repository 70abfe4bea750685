"""Limits, leases, pauses and windows survive a clock that jumps: nothing but dates reads the wall clock."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Who may read the wall clock, and for what.
DATES = {
    "bridge/consumer.py": "`expires` is a date, set by the producer's clock",
    "bridge/redis_channel.py": "kombu's score of an unacknowledged message, which other hosts read",
}
WALL = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime"}
FILES = [str(path.relative_to(ROOT)) for folder in ("actors", "bridge") for path in (ROOT / folder).glob("*.py")]


def reads_of_the_wall_clock(name):
    tree = ast.parse((ROOT / name).read_text())
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in WALL
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in ("time", "datetime", "date")
    ]


@pytest.mark.parametrize("name", FILES)
def test_only_dates_read_the_wall_clock(name):
    assert bool(reads_of_the_wall_clock(name)) == (name in DATES), DATES.get(name, reads_of_the_wall_clock(name))
