"""docs/celery-compatibility.md: every test it names exists, every "yes" names one, every row has a verdict."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = "docs/celery-compatibility.md"
VERDICTS = ("yes", "no", "differs", "untested")
#: What stands where no test is named.
NOTHING = "\N{EN DASH}"
#: A verdict stands in the second column of tables with this head.
HEADS = ("| feature | GPU task | test |", "| setting | GPU task | test |")


def tables():
    """(section, head, rows as lists of cells) of each table."""
    section, head, rows = "", "", []
    for line in [*(ROOT / DOCUMENT).read_text().splitlines(), ""]:
        if line.startswith("#"):
            section = line.lstrip("# ")
        if not line.startswith("|"):
            if rows:
                yield section, head, rows
            head, rows = "", []
        elif not head:
            head = line
        elif not line.startswith("|---"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])


JUDGED = [(section, row) for section, head, rows in tables() if head in HEADS for row in rows]
IDS = [f"{section}: {row[0]}"[:70] for section, row in JUDGED]


def named(text):
    """The tests a text names: (file, function or "")."""
    for path, function in re.findall(r"`((?:tests/\w+/)?test_\w+\.py)(?:::(\w+))?`", text):
        yield (path if "/" in path else f"tests/acceptance/{path}"), function


def verdict(row):
    return re.split(r"\W", row[1], maxsplit=1)[0]


@cache
def functions(path):
    if not (ROOT / path).is_file():
        return None
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_is_named_exists():
    found = set(named((ROOT / DOCUMENT).read_text()))
    assert len(found) > 100
    stale = {f"{path}::{name}" for path, name in found if name and name not in (functions(path) or ())}
    missing = {path for path, _ in found if functions(path) is None}
    assert not stale and not missing, f"renamed or gone: {sorted(stale)} {sorted(missing)}"


def test_whatever_looks_like_a_test_is_read_as_one():
    text = (ROOT / DOCUMENT).read_text()
    assert text.count(".py::") == sum(bool(name) for _, name in named(text))


@pytest.mark.parametrize(("section", "row"), JUDGED, ids=IDS)
def test_every_row_has_a_verdict_and_every_yes_a_test(section, row):
    assert len(row) == 3, "three columns"
    assert verdict(row) in VERDICTS
    proofs = list(named(row[2]))
    assert proofs or row[2] == NOTHING
    assert all(function for _, function in proofs), "a test, not only a file"
    assert verdict(row) != "yes" or proofs, "who says yes names a test"


def test_no_row_is_there_twice():
    seen = Counter((section, row[0]) for section, row in JUDGED)
    assert [row for row, times in seen.items() if times > 1] == []
