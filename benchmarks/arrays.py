"""`python -m benchmarks.arrays`: the sum of 1 MB of float64, sent as today's producers send it: a JSON list."""

import random
import sys
from collections.abc import Sequence
from functools import cache

from benchmarks import real
from benchmarks.run import main

TASK = "celery_app.tasks.arrays.total"

#: 2**17 numbers of 8 bytes are 1 MiB in memory, and about 2.5 MB as JSON.
NUMBERS = 2**17


@cache
def numbers() -> list[float]:
    """The same ones in every run."""
    drawn = random.Random(1)
    return [drawn.random() for _ in range(NUMBERS)]


class Arrays(real.RealWork):
    """A payload so large that JSON, Redis and copies are the cost."""

    name = "arrays"
    title = "The sum of 1 MB of float64, sent as a JSON list"
    task = TASK
    approaches = real.approaches(TASK)
    sizes = {"rounds": (5, 2, 5), "tasks": (40, 4, 100), "calls": (10, 1, 20)}

    def payloads(self) -> Sequence[object]:
        """One list."""
        return [numbers()]


if __name__ == "__main__":
    sys.exit(main(Arrays()))
