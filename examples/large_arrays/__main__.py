"""``python -m examples.large_arrays``: one array sent three ways and through a chain: milliseconds and bytes of each.

It needs a worker of `examples.large_arrays.tasks`; README.md says how to start one.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy
from celery import chain
from kombu.utils import json

from bridge import data
from examples.large_arrays.tasks import centre, scaled

#: 1.2 MB of float64.
SHAPE = (50_000, 3)
CALLS = 5
RESULT_TIMEOUT_S = 60.0


def main() -> int:
    """Send, compare, print; 1 if a result is wrong."""
    points = numpy.random.default_rng(1).random(SHAPE)
    expected = points.mean(axis=0)
    listed = points.tolist()  # a producer that sends lists has lists
    ways: dict[str, Callable[[], Any]] = {
        "JSON list": lambda: listed,
        "base64 envelope": lambda: data.Inline.of(points),
        "by reference": lambda: data.put(points, once=True),
    }
    print(f"{points.nbytes:,} bytes of {points.dtype}, shape {points.shape}\n")
    print(f"{'way':<24}{'ms, best of 5':>14}{'bytes in the message':>22}{'beside it':>12}")
    right = True
    for name, make in ways.items():
        seconds, found = _timed(lambda make=make: centre.delay(make()))
        right = right and numpy.allclose(found, expected)
        _print_line(name, seconds, make())
    ref = data.put(points)
    seconds, found = _timed(chain(scaled.s(ref, 2.0), scaled.s(0.5), centre.s()).apply_async)
    _print_line("chain of three, by ref.", seconds, ref)
    data.delete(ref)
    return 0 if right and numpy.allclose(found, expected) else 1


def _timed(send: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest call, encoding and putting included, and the last result."""
    fastest, found = float("inf"), None
    for _ in range(CALLS):
        began = time.perf_counter()
        found = send().get(timeout=RESULT_TIMEOUT_S)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest, found


def _print_line(name: str, seconds: float, argument: Any) -> None:
    inside = len(json.dumps([argument]))
    beside = argument.size_bytes if isinstance(argument, data.ArrayRef) else 0
    print(f"{name:<24}{1000 * seconds:>14.1f}{inside:>22,}{beside:>12,}")


if __name__ == "__main__":
    sys.exit(main())
