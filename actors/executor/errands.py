"""GPU tasks of ours, run where an array is held: one puts it where every process can read it, one forgets it.

Drivers send them for tasks that take arrays of several actors, producers for `handle.get()` and `data.delete`.
"""

from typing import Any

from actors.data.arrays import Array, Inline
from actors.executor import device_results, opening
from actors.executor.device import to_host

EXPORT, DELETE = "bridge.data.export", "bridge.data.delete"


def add_errands(app: Any) -> None:
    """Give an app these tasks, unless it has them; in its workers and executors alike."""
    for name, body in ((EXPORT, export), (DELETE, delete)):
        if name not in app.tasks:
            app.task(body, name=name, gpu=True, acks_late=True, ignore_result=False, shared=False)


def export(array: Array, inline_bytes: int = 0, to_actor: bool = False) -> dict[str, Any]:
    """JSON of an envelope with an array of up to so many bytes, of a reference to a larger one; 0: always of one.

    What goes `to_actor` goes through Ray's object store.
    """
    host, stores = to_host(array), opening.current().stores
    if to_actor:
        return stores.put_for_actor(host).model_dump(mode="json")
    form = Inline.of(host) if inline_bytes and host.nbytes <= inline_bytes else stores.put(host)
    return form.model_dump(mode="json")


def delete(handles: list[dict[str, Any]]) -> None:
    """Forget the arrays of handles that are held here; copies are for whoever asks to delete."""
    mine = [each["id"] for each in handles if each["executor"] == device_results.shared.executor]
    device_results.shared.drop(mine)
