"""Which version of the user's code this worker runs, and how an executor on another process or node loads it."""

import hashlib
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from actors.contract import Config, Release
from bridge.errors import AppNotImportable
from bridge.settings import Settings


def make_config(app: Any, tasks: Iterable[str], settings: Settings) -> Config:
    """What an executor needs to run `tasks` of `app` as this process would.

    Raises:
        AppNotImportable: the app is not an attribute of any imported module.
    """
    return Config(
        release=_release(app, tuple(sorted(tasks)), settings),
        device=settings.device,
        memory_limit=settings.gpu_memory_limit,
        log_level=logging.getLogger().level or logging.WARNING,
        log_limit_bytes=settings.log_limit_bytes,
    )


def _release(app: Any, tasks: tuple[str, ...], settings: Settings) -> Release:
    module, attribute = _find(app)
    script = ""
    if module == "__main__":
        script = str(Path(sys.modules["__main__"].__file__ or "").resolve())
        module = Path(script).stem
    includes = tuple(sorted({type(app.tasks[name]).__module__ for name in tasks} - {"__main__"}))
    sys_path = tuple(str(Path(entry or ".").resolve()) for entry in sys.path)
    name = settings.release or _digest(module, script, includes, tasks, sys_path)
    environment = tuple(
        (key, value) for key, value in sorted(os.environ.items()) if key.startswith(("CELERY_", "DJANGO_"))
    )
    return Release(name, f"{module}:{attribute}", script, sys_path, str(Path.cwd()), includes, tasks, environment)


def _find(app: Any) -> tuple[str, str]:
    """The module and attribute that hold the app, the one it was named after first."""
    found = [
        (name, attribute)
        for name, module in list(sys.modules.items())
        if module is not None and not name.startswith(("celery.", "bridge.", "actors."))
        for attribute, value in list(vars(module).items())
        if value is app
    ]
    if not found:
        raise AppNotImportable(
            f"the Celery app {app.main or app!r} is not an attribute of any module, so GPU nodes cannot import it; "
            "assign it at module level, as in `app = Celery(...)`"
        )
    preferred = os.environ.get("CELERY_APP", "").partition(":")[0]
    return min(found, key=lambda place: (place[0] != preferred, place[0].count("."), place[0]))


def _digest(module: str, script: str, includes: tuple[str, ...], tasks: tuple[str, ...], path: tuple[str, ...]) -> str:
    """Changes when the app, its task modules, or a module beside them in their packages changes."""
    digest = hashlib.sha256(repr((module, script, tasks, path)).encode())
    files = {Path(script)} if script else set()
    for name in {module, *includes}:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file:
            files |= set(Path(file).parent.glob("*.py")) if Path(file).parent != Path.cwd() else {Path(file)}
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
