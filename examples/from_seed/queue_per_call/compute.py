"""The child of `tasks.py`. A module of its own, so that the spawned process does not import Celery."""

import ctypes
import multiprocessing
import os
import threading
import traceback
from multiprocessing import connection
from types import ModuleType
from typing import Any

#: Characters of an error's text that travel. An outcome then is one write of less than 4096 bytes to the queue's pipe,
#: which is atomic: a child killed at any moment leaves a whole outcome or none, never half of one to wait for.
ERROR_LIMIT = 900

#: ``("result", number)`` or ``("error", text)``.
Outcome = tuple[str, Any]


def compute(data: list[float], outcomes: "multiprocessing.Queue[Outcome]") -> None:
    """Put what became of `data` into `outcomes`."""
    threading.Thread(target=die_with_parent, daemon=True).start()
    try:
        outcomes.put(("result", sum_of_squares(data)))
    except Exception:
        outcomes.put(("error", traceback.format_exc()[-ERROR_LIMIT:]))


def sum_of_squares(data: list[float]) -> float:
    """The work itself."""
    xp = array_module()
    values = xp.asarray(data, dtype=float)
    return float((values * values).sum())


def array_module() -> ModuleType:
    """CuPy where an NVIDIA driver is; otherwise NumPy, without paying half a second for importing CuPy in vain."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        import numpy

        return numpy
    import cupy

    return cupy


def die_with_parent() -> None:
    """A worker that is killed must not leave a process behind that holds the GPU."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
