"""How producers, prefork children and drivers reach Ray's object store: only where they have joined the cluster.

Ray is loaded at the first use, by those alone who have chosen this store.
"""

import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from actors.contract import StoreConfig
from actors.data import stores
from actors.data.roots import RAY
from bridge.auth import use_token
from bridge.errors import StartupError, StoreUnavailable
from bridge.settings import settings

_joining = threading.Lock()
_stores: dict[str, Any] = {}  # by namespace


def use_ray() -> None:
    """References to data in Ray's object store are good in this process; an executor has its own way to them."""
    if stores.reach_ray is None:
        stores.reach_ray = _reach


def _reach(app: Any, config: StoreConfig) -> Any:
    """Ray's object store.

    Raises:
        StoreUnavailable: this process has not joined the cluster, and is not told to, or it cannot.
    """
    with _joining:
        if not _is_joined():
            _join(app, config)
        from actors.data.ray_store import RayStore

        namespace = settings().namespace_of(app)
        return _stores.setdefault(namespace, RayStore(namespace, config))


def _is_joined() -> bool:
    ray: Any = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _join(app: Any, config: StoreConfig) -> None:
    if config.url != RAY:
        raise StoreUnavailable(
            "data in Ray's object store are for processes that have joined its cluster: call ray.init(address) first, "
            "or set BRIDGE_DATA_URL=ray"
        )
    use_token()
    from bridge.driver.cluster import (  # loads Ray, which reads once whether it shows a token
        answers,
        connect,
        find_cluster,
    )

    try:
        address = find_cluster(settings().ray_address)
        if not answers(address):  # Ray itself would ask for minutes, and then end this process
            raise StoreUnavailable(f"Ray's object store: nothing answers at {address}")
        with redirect_stdout(sys.__stdout__), redirect_stderr(sys.__stderr__):  # Ray needs real ones
            connect(address, settings().namespace_of(app), settings().connect_wait_s)
    except StartupError as error:
        raise StoreUnavailable(f"Ray's object store: {error}") from error
