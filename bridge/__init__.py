"""The bridge from a Celery request to a warm GPU actor and back; files in the order of a task's way.

Importing this package loads neither ray nor cupy: producers and CPU workers may import it.
"""

import sys

from actors.batching import batched
from actors.device import array_module, scipy_module, to_device, to_host
from actors.residents import resident
from actors.signals import executor_init
from bridge import errors
from bridge.marks import Gpu

if "celery.worker.control" in sys.modules:  # the `celery` command is running, which offers only registered commands
    import bridge.control  # noqa: F401

__all__ = [
    "Gpu", "array_module", "batched", "errors", "executor_init", "resident", "scipy_module", "to_device", "to_host",
]  # fmt: skip
