"""Remote commands: ``inspect gpu``, ``control gpu_restart``, and what ``revoke`` means to a task that waits for a GPU.

Registered by import, in workers and in the `celery` command, by Celery's way of adding commands of one's own.
"""

import functools
from typing import Any

from celery.worker.control import Panel, control_command, inspect_command


@inspect_command()
def gpu(state: Any) -> dict[str, Any]:
    """The GPU actors this worker uses: device, memory, state, current task."""
    pool = state.consumer.pool
    if not hasattr(pool, "gpu_info"):
        return {"error": "this worker has no GPU pool: start it with `python -m bridge.worker`"}
    info: dict[str, Any] = pool.gpu_info()
    return info


@control_command()
def gpu_restart(state: Any) -> dict[str, Any]:
    """Drain and restart the GPU actors, one at a time; waiting tasks go to the others or wait."""
    pool = state.consumer.pool
    if not hasattr(pool, "gpu_info"):
        return {"error": "this worker has no GPU pool: start it with `python -m bridge.worker`"}
    if not pool.gpu.restart_actors():
        return {"error": "the GPU driver is not there; it is started again by itself, try later"}
    return {"ok": "GPU actors restart one at a time; `inspect gpu` shows how far they are"}


def _withdrawing(name: str) -> None:
    """After Celery's own command, take back what it has revoked while it waits for a GPU."""
    command = Panel.data[name]

    @functools.wraps(command)
    def with_waiting_tasks(state: Any, *args: Any, **kwargs: Any) -> Any:
        answer = command(state, *args, **kwargs)
        if hasattr(state.consumer, "withdraw_revoked"):
            state.consumer.withdraw_revoked()
        return answer

    Panel.data[name] = with_waiting_tasks


for _name in ("revoke", "revoke_by_stamped_headers"):
    _withdrawing(_name)
