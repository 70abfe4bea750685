"""Faults of a GPU, injected where CUDA would report them: below the executor's own code, above NumPy.

Called in executors only. Nothing of what is tested is replaced: probing, exit codes, warm-up and breaker are real.
"""

import time
from pathlib import Path

from actors.executor.device import CpuDevice, current_device
from actors.executor.device_api import DeviceUnusable


def break_device(faulty=False):
    """Raise as a kernel does that has broken its context; `faulty`: the driver says that the hardware did it."""
    device = current_device()
    device.is_healthy = lambda error=None: False
    device.is_faulty = lambda error: faulty
    raise RuntimeError("an illegal memory access was encountered")


def sick_while(path, hangs=False):
    """Let devices fail the test of their warm-up as long as the file is there, or hang in it."""

    def warm_up(self):
        if Path(path).exists():
            if hangs:
                time.sleep(600)
            raise DeviceUnusable("a first kernel failed: an illegal memory access was encountered")

    CpuDevice.warm_up = warm_up
