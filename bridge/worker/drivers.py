"""In the worker: all its drivers as one. Nearly always it is one; ``--drivers N`` is for hosts with many cores.

What becomes of the requests of one driver is in `supervisor.py`, the process in `driver_process.py`; here
it is only decided which of them gets a task.
"""

import select
from collections.abc import Callable, Iterable
from typing import Any
from zlib import crc32

from bridge.marks import Mark
from bridge.places import needs
from bridge.settings import Settings
from bridge.worker.supervisor import DriverSupervisor, GpuRequest


class Drivers:
    """The driver processes of a worker; used on its main thread only."""

    def __init__(self, app: Any, hostname: str, settings: Settings, marks: dict[str, Mark]) -> None:
        self._marks = marks
        several = settings.drivers > 1
        labels = [f"GpuDriver{number + 1 if several else ''}" for number in range(settings.drivers)]
        self._all = [DriverSupervisor(app, hostname, settings, label) for label in labels]
        self._processes = [each.process for each in self._all]

    def start(self, tasks: Iterable[str]) -> None:
        """See `DriverProcess.start`."""
        names = list(tasks)
        for each in self._processes:
            each.start(names, needs(self._marks.values()).share)

    def wait_until_ready(self, say: Callable[[str], None]) -> None:
        """See `DriverProcess.wait_until_ready`."""
        for each in self._processes:
            each.wait_until_ready(say)

    def register(self, hub: Any) -> None:
        """See `DriverSupervisor.register`."""
        for each in self._all:
            each.register(hub)

    def listen(self, on_report: Callable[[], None]) -> None:
        """Have `on_report` called when `report` is new."""
        for each in self._processes:
            each.on_report = on_report

    def stop(self) -> None:
        """End them; they leave their actors warm."""
        for each in self._processes:
            each.say_stop()
        for each in self._processes:
            each.stop()

    def kill(self) -> None:
        """End them at once."""
        for each in self._processes:
            each.kill()

    def restart(self) -> None:
        """See `DriverSupervisor.restart`."""
        for each in self._all:
            each.restart()

    def restart_actors(self) -> bool:
        """Let a driver restart the actors, one at a time; False while there is no driver."""
        return any(each.restart_actors() for each in self._all)

    def discard(self, refs: tuple[Any, ...]) -> bool:
        """Let a driver delete data by reference; False while there is none, and then they expire."""
        return any(each.discard(refs) for each in self._all)

    def apply(self, run: dict[str, Any], callbacks: dict[str, Any]) -> GpuRequest:
        """Send a request to a driver. Whatever pickling it raises passes through, and nothing is kept."""
        return self._choose(run["task"]).apply(run, callbacks)

    def _choose(self, task: str) -> DriverSupervisor:
        """The one with the fewest tasks; but tasks that share runs of their body must meet in one driver."""
        mark = self._marks.get(task)
        if mark is not None and mark.meets_others:
            return self._all[crc32(task.encode()) % len(self._all)]
        return min(self._all, key=lambda each: each.in_flight)

    def withdraw(self, request: GpuRequest, on_given_back: Callable[[], None]) -> None:
        """See `DriverSupervisor.withdraw`."""
        request.supervisor.withdraw(request, on_given_back)

    def give_back(self) -> None:
        """See `DriverSupervisor.give_back`."""
        for each in self._all:
            each.give_back()

    def flush_requests(self) -> None:
        """See `DriverSupervisor.flush_requests`."""
        for each in self._all:
            each.flush_requests()

    def on_readable(self) -> None:
        """Take what the drivers have sent."""
        for each in self._processes:
            each.on_readable()

    def serve(self, timeout_s: float, also: list[int]) -> list[int]:
        """Outside the event loop: wait for a link or one of `also`; returns which of those can be read."""
        for supervisor in self._all:
            supervisor.restart_if_due()
        links = [each for each in self._processes if each.is_linked]
        readable, _, _ = select.select([*also, *[each.fileno() for each in links]], [], [], timeout_s)
        for each in links:
            if each.fileno() in readable:
                readable.remove(each.fileno())
                each.on_readable()
            each.flush()
        return readable

    @property
    def can_drain(self) -> bool:
        """Whether `serve` may be called here: not from a signal handler that interrupted one of them."""
        return not any(each.is_busy for each in self._processes)

    @property
    def in_flight(self) -> int:
        """Requests not answered yet."""
        return sum(each.in_flight for each in self._all)

    @property
    def running(self) -> int:
        """Requests whose call has left for an actor."""
        return sum(each.running for each in self._all)

    @property
    def pids(self) -> list[int | None]:
        """Their process ids."""
        return [each.pid for each in self._processes]

    @property
    def heard(self) -> tuple[tuple[int | None, float | None], ...]:
        """Process id of each, and when it last said something; see `DriverProcess.heard_at`."""
        return tuple((each.pid, each.heard_at) for each in self._processes)

    @property
    def result_trouble(self) -> str:
        """Why results are not stored now, as one of them has said; "" while they are."""
        return next((each.report["results"] for each in self._processes if each.report.get("results")), "")

    @property
    def report(self) -> dict[str, Any]:
        """The fleet as one of them sees it, the first that sees any actor."""
        return next((each.report for each in self._processes if each.report["actors"]), self._processes[0].report)
