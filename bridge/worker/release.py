"""Which version of the user's code this worker runs, and how an executor on another process or node loads it."""

import hashlib
import logging
import os
import sys
import sysconfig
from collections.abc import Iterable
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

from actors.contract import Config, Release
from bridge.errors import AppNotImportable
from bridge.settings import Settings

#: Variables of the worker that executors get, always; all others they have from `ray start` on their node.
_ENVIRONMENT = ("CELERY_*", "DJANGO_*", "FLASK_*")
#: What Celery, or the worker's command, sets for its own process: no part of the app's configuration.
_NOT_ENVIRONMENT = ("CELERY_LOG_*", "CELERY_APP", "CELERY_CUSTOM_WORKER_POOL")


def make_config(app: Any, tasks: Iterable[str], settings: Settings, share: float = 1.0) -> Config:
    """What an executor needs to run `tasks` of `app` as this process would, on a `share` of a GPU.

    Raises:
        AppNotImportable: the app is not an attribute of any imported module.
    """
    for_life: dict[str, Any] = {  # a warm executor would go on with those of the last worker: they are of the release
        "device": settings.device,
        "memory_limit": _share_of(settings.gpu_memory_limit, share),
        "resident_limit": _share_of(settings.resident_limit, share),
        "left_limit": _share_of(settings.left_limit, share),
        "stores": settings.stores,
        "results_limit": _share_of(settings.device_results_limit, share),
        "host_results_limit": settings.host_results_limit,
        "keep_s": settings.device_result_s,
    }
    return Config(
        release=_release(app, tuple(sorted(tasks)), settings, for_life),
        log_level=logging.getLogger().level or logging.WARNING,  # workers that differ in what they log share executors
        log_limit_bytes=settings.log_limit_bytes,
        **for_life,
    )


def _share_of(limit: str, share: float) -> str:
    """A limit in percent counts for what the actor reserves of the GPU; one in bytes is meant as it stands."""
    try:
        return f"{float(limit.removesuffix('%')) * share:g}%" if limit.endswith("%") else limit
    except ValueError:
        return limit  # the executor says what is wrong with it


def _release(app: Any, tasks: tuple[str, ...], settings: Settings, for_life: dict[str, Any]) -> Release:
    module, attribute = _find(app)
    script = ""
    if module == "__main__":
        script = str(Path(sys.modules["__main__"].__file__ or "").resolve())
        module = Path(script).stem
    includes = tuple(sorted({type(app.tasks[name]).__module__ for name in tasks} - {"__main__"}))
    sys_path = tuple(str(Path(entry or ".").resolve()) for entry in sys.path)
    patterns = [*_ENVIRONMENT, *settings.environment]
    environment = tuple(
        (key, value)
        for key, value in sorted(os.environ.items())
        if any(fnmatchcase(key, each) for each in patterns)
        and not any(fnmatchcase(key, each) for each in _NOT_ENVIRONMENT)
    )
    workdir = str(Path.cwd())
    parts = module, attribute, script, tasks, sys_path, workdir, environment, for_life
    name = settings.release or _digest(*parts)
    return Release(name, f"{module}:{attribute}", script, sys_path, workdir, includes, tasks, environment)


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
    wanted = os.environ.get("CELERY_APP") or _named_on_the_command_line()
    users = {type(task).__module__ for task in app.tasks.values()}  # they have imported it from somewhere, mostly
    return min(found, key=lambda place: (place[0] != wanted.partition(":")[0], place[0] in users, place))


def _named_on_the_command_line() -> str:
    """What `celery -A` was given, when this worker was started without `bridge.worker`."""
    for option, value in pairwise([*sys.argv, ""]):
        if option in ("-A", "--app"):
            return value
        if option.startswith(("-A", "--app=")):
            return option.removeprefix("--app=").removeprefix("-A")
    return ""


def _digest(*parts: Any) -> str:
    """Changes with its parts and with any module that the app has imported and that is not an installed package."""
    digest = hashlib.sha256(repr(parts).encode())
    installed = [sysconfig.get_path("stdlib"), *{sysconfig.get_path(name) for name in ("purelib", "platlib")}]
    files = {getattr(each, "__file__", None) for each in list(sys.modules.values())}
    for file in sorted(Path(name) for name in files if name and name.endswith(".py")):
        if not any(file.is_relative_to(folder) for folder in installed) and file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
