"""The producer: a process of its own and a plain Celery client, which knows task names and nothing of the bridge.

Writes one line for each task before it is sent, and another when the broker has taken it; `tries` above 1 means that
an earlier attempt may have reached the broker, too.
"""

import sys
import time
from pathlib import Path

from celery import Celery, chain, chord, group, signature
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from tests.chaos import plan
from tests.chaos.ledger import note

#: Pause before a message that the broker did not take is sent again, in seconds.
AGAIN_S = 0.2
ERRORS = (OperationalError, RedisError, ConnectionError, OSError)


class Producer:
    """Sends units and keeps the ledger."""

    def __init__(self, url, ledger):
        self.app = Celery("producer", broker=url, backend=url, set_as_current=False)
        self.app.conf.update(
            task_publish_retry=False,
            broker_transport_options={"socket_timeout": 10, "socket_connect_timeout": 5},
            redis_socket_timeout=10,
        )
        self.ledger = ledger

    def send(self, unit):
        """Send a unit until the broker has taken it."""
        tries = 0
        while True:
            tries += 1
            ids = unit.ids if tries == 1 or unit.kind not in ("group", "chord") else [f"{i}-{tries}" for i in unit.ids]
            for each in ids:
                note(self.ledger, what="sends", id=each, kind=unit.kind, tries=tries)
            try:
                self._send(unit, ids)
            except ERRORS:
                time.sleep(AGAIN_S)
                continue
            for each in ids:
                note(self.ledger, what="sent", id=each, kind=unit.kind, tries=tries)
            return

    def _send(self, unit, ids):
        kind, number, first = unit.kind, unit.number, ids[0]
        name = f"chaos.{kind}"
        if kind.startswith(("noop", "batch")) or kind in ("poison", "once", "large", "cpu"):
            self.one(name, first, [first])
        elif kind.startswith("nap"):
            self.one(name, first, [first, 0.02 + 0.25 * number])
        elif kind.startswith("long"):
            self.one(name, first, [first, 1 + 1.5 * number])
        elif kind.startswith("retry"):
            self.one(name, first, [first, 1 + int(3 * number)])
        elif kind == "invalid":
            self.one("chaos.nap_late", first, [first, "soon" if number < 0.5 else None])
        elif kind == "expired":
            self.one("chaos.noop_late", first, [first], expires=-1)
        elif kind == "eta":
            self.one("chaos.noop_late", first, [first], countdown=0.2 + number)
        elif kind == "revoked":
            self.one("chaos.noop_late", first, [first], countdown=1)
            self.app.control.revoke(first)
        else:
            getattr(self, kind)(ids, int(100 * number))

    def one(self, name, task_id, args, **options):
        self.app.send_task(name, args, task_id=task_id, retry=False, **options)

    def part(self, name, task_id, *args):
        return signature(f"chaos.{name}", args, app=self.app).set(task_id=task_id)

    def chain(self, ids, number):
        chain(
            self.part("add", ids[0], 0, ids[0], number),
            self.part("cpu_add", ids[1], ids[1], 1),
            self.part("add", ids[2], ids[2], 2),
            app=self.app,
        ).apply_async(retry=False)

    def group(self, ids, number):
        group([self.part("add", each, n, each, number) for n, each in enumerate(ids)], app=self.app).apply_async()

    def chord(self, ids, number):
        *header, callback = ids
        parts = [self.part("add", each, n, each, number) for n, each in enumerate(header)]
        chord(parts, app=self.app)(self.part("total", callback, callback))


def main(url, folder, seed, seconds):
    """Send everything, each unit at its time."""
    producer = Producer(url, Path(folder) / "sent")
    started = time.monotonic()
    for unit in plan.units(seed, seconds):
        time.sleep(max(0.0, started + unit.at - time.monotonic()))
        producer.send(unit)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
