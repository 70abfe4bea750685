"""Soft limits and cancellation inside a running body, without leaving a lock held.

Bodies run on the executor's main thread, so a signal reaches them in Python code, in sleep, locks and I/O. The handler
raises at the first instruction outside logging, threading, import, queue and CuPy frames: an exception inside those
would leave their locks held for ever (measured: after 11 interrupts of a body that logs). Each interrupt names the
serial of the body it is meant for, so a late one is ignored. A resident's loader may take long and is the user's: it is
interrupted, although the frame that called it is not.
"""

import signal
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from celery.exceptions import SoftTimeLimitExceeded

from actors.contract import INTERRUPT_SIGNAL, Reason
from actors.executor.residents import _enter_loader
from actors.journal import Journal

#: Modules whose frames hold locks or half-made state; an interrupt waits until they are left.
_SHIELDED = frozenset(
    {
        *("logging", "threading", "queue", "concurrent", "cupy", "cupyx", "cupy_backends"),
        *("importlib", "_frozen_importlib", "_frozen_importlib_external"),
    }
)
#: Ours of that kind.
_OURS = ("actors.executor.device_results", "actors.executor.pinned", "actors.executor.residents", "actors.wishes")


class Cancelled(BaseException):
    """Raised in a body that was cancelled; not an Exception, so that ``except Exception`` does not swallow it."""


class Interrupter:
    """Owns the signal handler; `guard` marks which frame is the body's and which serial runs."""

    def __init__(self, journal: Journal, entry: CodeType) -> None:
        self._journal = journal
        self._entries = (
            entry,
            Interrupter.reach.__code__,
        )  # frames that call what may end: shielding looks no further up
        self.serial = 0  # of the body that runs now; 0 while none does
        signal.signal(INTERRUPT_SIGNAL, self._on_signal)

    def reach(self, call: Callable[..., Any], *args: Any) -> Any:
        """Call what may wait for long in the name of the body that runs or has just ended: interrupts reach it, too.

        What has reached the body already does not come again.

        Raises:
            SoftTimeLimitExceeded, Cancelled: it was interrupted.
        """
        before, running = self.serial, self._journal.running()
        self.serial = before or (running.serial if running else 0)
        try:
            return call(*args)
        finally:
            self.serial = before
            if not before:
                sys.settrace(None)

    def _on_signal(self, _number: int, frame: FrameType | None) -> None:
        serial, reason = self._journal.wanted()
        if not self.serial or serial != self.serial or frame is None:
            return
        safe = self._first_unshielded(frame)
        if safe is None:
            return
        self._journal.take(serial)
        if safe is frame or _waits(frame):
            raise self._exception(reason)
        self._raise_at_next_instruction(safe, serial, reason)

    def _first_unshielded(self, frame: FrameType) -> FrameType | None:
        """The innermost frame outside all shielded ones, up to the executor's entry."""
        safe: FrameType | None = frame
        current: FrameType | None = frame
        while current is not None and current.f_code not in self._entries:
            if current.f_code is _enter_loader.__code__ and safe is not current:
                return safe  # its caller, which holds a lock, lets go of it when the exception comes by
            if _is_shielded(current):
                safe = current.f_back
            current = current.f_back
        if current is None or safe is None or safe.f_code in self._entries:
            return None  # between bodies, or in the executor's own code: nothing of the user's runs
        return safe

    def _raise_at_next_instruction(self, safe: FrameType, serial: int, reason: int) -> None:
        def trace(frame: FrameType, event: str, _argument: Any) -> Callable[..., Any] | None:
            if frame is safe and event in ("opcode", "return"):
                sys.settrace(None)
                safe.f_trace = None
                if self.serial == serial:
                    raise self._exception(reason)
            return trace if frame is safe else None

        # Not at the next line: after the last call in a `with` block that is its end, and nothing would exit it.
        safe.f_trace_opcodes = True
        safe.f_trace = trace
        sys.settrace(lambda *_: None)

    def _exception(self, reason: int) -> BaseException:
        return SoftTimeLimitExceeded() if reason == Reason.SOFT_LIMIT else Cancelled()


def _is_shielded(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] in _SHIELDED or module in _OURS


def _waits(frame: FrameType) -> bool:
    """Whether the innermost frame blocks at a place that `threading` itself makes safe for KeyboardInterrupt."""
    if frame.f_globals.get("__name__") != "threading":
        return False
    name = frame.f_code.co_name
    return (name == "wait" and frame.f_locals.get("gotit") is False) or name in ("join", "_wait_for_tstate_lock")
