"""On PYTHONPATH of a process under test: its wall clock is off by the seconds in the file that TESTS_CLOCK names."""

import os
import time


def jumps(clock, factor, file):
    """A clock that is off by what the file says at that moment."""

    def now():
        with open(file) as text:
            return clock() + type(clock())(text.read()) * factor

    return now


if "TESTS_CLOCK" in os.environ:
    time.time = jumps(time.time, 1, os.environ["TESTS_CLOCK"])
    time.time_ns = jumps(time.time_ns, 10**9, os.environ["TESTS_CLOCK"])
