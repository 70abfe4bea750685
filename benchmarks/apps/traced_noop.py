"""The bridge's no-op whose way leaves its times in a file: `python -m benchmarks.latency` reads them.

Worker and driver, which have `BENCH_TRACE` in their environment, write a line as a step is reached. Executors have not;
their body gives its time as its result. All processes of a machine share the clock.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

from celery import Celery

app = Celery("traced_noop")


@app.task(shared=False, name="noop", gpu=True)
def noop() -> int:
    """When it ran."""
    return time.monotonic_ns()


def _trace(path: str) -> None:
    from bridge.driver.calls import Calls
    from bridge.driver.loop import Driver
    from bridge.driver.results import GroupedResults
    from bridge.link import Link, Run
    from bridge.worker.redis_channel import GroupedChannel

    trace = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def mark(step: str) -> None:
        os.write(trace, f"{time.monotonic_ns()} {step}\n".encode())

    def wrap(
        owner: Any, name: str, before: Callable[..., str] | str = "", after: Callable[..., str] | str = ""
    ) -> None:
        """Mark a step as a method begins, or as it ends; a callable is asked which, with the value at the end."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def marked(self: Any, *args: Any, **kwargs: Any) -> Any:
            if step := before(*args) if callable(before) else before:
                mark(step)
            value = method(self, *args, **kwargs)
            if step := after(value) if callable(after) else after:
                mark(step)
            return value

        setattr(owner, name, marked)

    def holds_run(messages: list[Any]) -> str:
        return "driver has it" if any(isinstance(each, Run) for each in messages) else ""

    def trace_fleet() -> str:
        from bridge.driver.fleet import Fleet  # it loads Ray, which a worker never does

        wrap(Fleet, "submit", before="call leaves", after="Ray has it")
        return ""

    wrap(GroupedChannel, "_brpop_read", before="worker wakes")
    wrap(Link, "send", before=lambda message: "worker has it" if isinstance(message, Run) else "")
    wrap(Link, "receive", after=holds_run)
    wrap(GroupedResults, "_ask", before="result leaves")
    wrap(Driver, "run", before=trace_fleet)
    wrap(Calls, "replied", before="driver has the reply")


if os.environ.get("BENCH_TRACE"):
    _trace(os.environ["BENCH_TRACE"])
