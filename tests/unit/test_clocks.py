"""Limits, leases and pauses count by the monotonic clock; the wall clock, which jumps, is asked for dates only."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: File -> what it asks the wall clock for.
ALLOWED = {
    "actors/executor/opening.py": "when a result that stays expires, for who has its handle",
    "actors/data/stores.py": "when data by reference expire, for people",
    "bridge/driver/blame.py": "when an executor died, for people",
    "bridge/doctor/broker_checks.py": "whether it is that of Redis",
    "bridge/worker/consumer.py": "whether `expires`, a date the producer has written, has passed",
    "bridge/driver/dead_letters.py": "when a task was poisoned, for people",
    "bridge/worker/redis_clock.py": "what Redis' clock may say, until it is asked",
    "bridge/dead/replay.py": "whether `expires` has passed, of a dead letter",
}
WALL = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today")}


def asks_the_wall_clock(file):
    calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    names = [(f.value.id, f.attr) for f in calls if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name)]
    return any(name in WALL for name in names)


def test_only_dates_of_others_are_compared_with_the_wall_clock():
    files = [file for folder in ("bridge", "actors") for file in (ROOT / folder).rglob("*.py")]
    found = {str(file.relative_to(ROOT)) for file in files if asks_the_wall_clock(file)}
    assert found == set(ALLOWED)
