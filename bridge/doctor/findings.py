"""What `python -m bridge.doctor` has found: one line each, and what to do about it."""

from enum import StrEnum
from typing import NamedTuple


class Level(StrEnum):
    """How bad it is."""

    OK = "OK"
    WARN = "WARN"  # it works, and may not when it matters
    FAIL = "FAIL"  # the worker would not start, or lose or repeat tasks


class Finding(NamedTuple):
    """One thing that was looked at."""

    level: Level
    about: str  # such as "broker"
    text: str
    do: str = ""  # empty for OK


def ok(about: str, text: str) -> Finding:
    """It is as it should be."""
    return Finding(Level.OK, about, text)


def warn(about: str, text: str, do: str) -> Finding:
    """It works, and may not when it matters."""
    return Finding(Level.WARN, about, text, do)


def fail(about: str, text: str, do: str) -> Finding:
    """The worker would not start, or lose or repeat tasks."""
    return Finding(Level.FAIL, about, text, do)
