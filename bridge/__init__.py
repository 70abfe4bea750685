"""The bridge from a Celery request to a warm GPU actor and back.

A folder for each process: `worker`, `driver`, and the commands `doctor` and `dead`; beside them what several share and
what users name.

Importing this package loads neither ray nor cupy: producers and CPU workers may import it. Its names are loaded when
the first of them is used, for `python -m bridge.health` needs none and is started every few seconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bridge import errors
    from bridge.api import (
        Gpu,
        array_module,
        batched,
        executor_init,
        resident,
        scipy_module,
        to_device,
        to_host,
    )

__all__ = [
    "Gpu", "array_module", "batched", "errors", "executor_init", "resident", "scipy_module", "to_device", "to_host",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bridge' has no attribute {name!r}")
    import bridge.api

    return getattr(bridge.api, name)
