"""What a body is to get, on its way from the driver, which looks at no bytes, to the executor, which opens them."""

from typing import Any, Protocol

_found: "list[Unopened]" = []


class Spec(Protocol):
    """What a body is to get; `ArraySpec` and `actors/data/blobs.py` have those there are."""

    def open(self, source: Any) -> Any:
        """It, on this process's device, from a form or from what is in this process already."""
        ...


class Unopened:
    """An array or a file that a body is to get: what it must be, and where it is."""

    __slots__ = ("source", "spec")

    def __init__(self, spec: Spec, source: Any) -> None:
        self.spec = spec
        self.source = source  # in this process's memory, or a form

    def __reduce__(self) -> Any:
        return _unpickled, (self.spec, self.source)

    def __repr__(self) -> str:  # Celery shows arguments in logs and events
        return f"<{self.spec}>"

    def open(self) -> Any:
        """What the body gets."""
        return self.spec.open(self.source)


def _unpickled(spec: Spec, source: Any) -> Unopened:
    unopened = Unopened(spec, source)
    _found.append(unopened)
    return unopened


def forget_found() -> None:
    """Before something is unpickled."""
    _found.clear()


def take_found() -> list[Unopened]:
    """What has been unpickled since: with most tasks nothing, and then nobody looks for it in their arguments."""
    found = _found.copy()
    _found.clear()
    return found
