"""The public names of `bridge`, loaded together when the first of them is used."""

from actors.batching import batched
from actors.executor.device import array_module, scipy_module, to_device, to_host
from actors.executor.residents import resident
from actors.executor.signals import executor_init
from bridge import errors
from bridge.marks import Gpu

__all__ = [
    "Gpu", "array_module", "batched", "errors", "executor_init", "resident", "scipy_module", "to_device", "to_host",
]  # fmt: skip
