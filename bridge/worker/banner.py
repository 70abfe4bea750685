"""What a person sees while a worker starts: what is being waited for, then the [gpu] part of the banner."""

import sys
import time
from typing import Any

from bridge.marks import Mark

#: Without a terminal a line is written only this often while the same thing is waited for, in seconds.
REPEAT_S = 10.0


class Progress:
    """One line that says what is being waited for; rewritten in place on a terminal."""

    def __init__(self) -> None:
        self._terminal = sys.__stderr__ is not None and sys.__stderr__.isatty()
        self._text = ""
        self._said_at = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._text:
            self._write("\r\033[K")

    def say(self, text: str) -> None:
        """Show what is being waited for now."""
        waited = time.monotonic() - self._started
        if self._terminal:
            self._write(f"\r\033[K {text} … {waited:.0f} s")
        elif text != self._text or time.monotonic() - self._said_at > REPEAT_S:
            self._write(f"bridge: {text} … {waited:.0f} s\n")
            self._said_at = time.monotonic()
        self._text = text

    def _write(self, text: str) -> None:
        if sys.__stderr__ is not None:
            sys.__stderr__.write(text)
            sys.__stderr__.flush()


def gpu_banner(info: dict[str, Any], marks: dict[str, Mark]) -> str:
    """The [gpu] part of the worker's banner; `info` is what `inspect stats` shows under pool.gpu."""
    if not marks:
        return "[gpu]\n.> no task is marked: write @app.task(gpu=True), or set BRIDGE_GPU_TASKS\n"
    size = f"{_count(info['nodes'], 'node')}, {_count(info['gpus'], 'GPU')}"
    lines = [
        "[gpu]",
        f".> cluster:     {info['cluster']} (Ray {info['ray']}, {size})",
        f".> device:      {_device(info['actors'])}",
        f".> slots:       {info['slots']}",
        *(f".> actor {actor['slot']}:     {_actor(actor)}" for actor in info["actors"]),
        "",
        "[gpu tasks]",
        *(f"  . {name}{_remark(mark)}" for name, mark in sorted(marks.items())),
        "",
    ]
    return "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _device(actors: list[dict[str, Any]]) -> str:
    devices = [actor["device"] for actor in actors if actor.get("device")]
    if not devices:
        return "not known yet: no actor is ready"
    first = devices[0]
    if first["kind"] == "cpu":
        return f"NumPy on CPU: *** NO GPU IS USED *** ({first['note']})"
    return f"{first['name']}, {first['memory_bytes'] / 2**30:.0f} GiB ({first['libraries']})"


def _actor(actor: dict[str, Any]) -> str:
    if actor["state"] == "ready" and actor["device"]:
        device = actor["device"]["name"]
        return (
            f"ready on {actor['node']}, {device}, executor pid {actor['executor_pid']}, warm in {actor['warm_s']:.1f} s"
        )
    return f"{actor['state']}: {actor.get('reason', '')}"


def _remark(mark: Mark) -> str:
    remarks = []
    if mark.batch:
        remarks.append(f"batches of up to {mark.batch.max_size}")
    if mark.configured:
        remarks.append("BRIDGE_GPU_TASKS")
    return f" ({', '.join(remarks)})" if remarks else ""
