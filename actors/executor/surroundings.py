"""The working directory and the environment of the process, put back after each body that has changed them.

All tasks of a release run in one process, one after another for days: what a body changes for itself must not decide
where the next one writes. Kept is what was there when the executor had become warm.
"""

import os
from contextlib import suppress


class Surroundings:
    """As they are now."""

    def __init__(self) -> None:
        self._folder = os.getcwd()  # noqa: PTH109 - no object for each task
        self._variables = dict(os.environ)
        self._raw = dict(_raw())

    def restore(self) -> None:
        """Put back what has changed; costs next to nothing when nothing has."""
        if _folder() != self._folder:
            with suppress(OSError):  # a body may have removed it
                os.chdir(self._folder)
        if _raw() != self._raw:
            for name in os.environ.keys() - self._variables.keys():
                del os.environ[name]
            os.environ.update(self._variables)


def _folder() -> str:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:
        return ""


def _raw() -> dict[bytes, bytes]:
    """The variables undecoded: comparing those takes a microsecond."""
    raw: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
    return raw
