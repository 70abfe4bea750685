"""Bodies whose device is busy while the CPU is not: they sleep, as a process does that waits for a kernel.

Each returns when it ran, in seconds of the monotonic clock, which all processes of one host share. `time.sleep` ends
some 60 us late and more under load, so what is made of these times uses them, not what was asked for.
"""

import os
import time

#: A vectorised body costs this for being run, and this for each item.
RUN_S, ITEM_S = 0.001, 10e-6


def wait(seconds: float, sent: float = 0.0) -> list[float]:
    """Keep the device busy; [sent, began, ended, pid]."""
    began = time.monotonic()
    time.sleep(seconds)
    return [sent, began, time.monotonic(), os.getpid()]


def vectorised(items: int) -> list[float]:
    """One run for so many items; [items, began, ended, pid]."""
    began = time.monotonic()
    time.sleep(RUN_S + items * ITEM_S)
    return [items, began, time.monotonic(), os.getpid()]
