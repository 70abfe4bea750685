"""Many producers at once: each puts an array, sends one task with the reference and waits for the sum.

`python -m benchmarks.apps.data_producers QUEUE PRODUCERS BYTES`; broker and backend come from the environment. All are
processes forked from this one, which begin together. Prints the seconds until the last has its result.
"""

import os
import sys
import time

import numpy
from celery import Celery

from bridge import data

#: For one result, in seconds.
PATIENCE_S = 180.0


def produce(queue: str, array: "numpy.ndarray") -> None:
    """One producer's whole life."""
    app = Celery(broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_RESULT_BACKEND"])
    app.set_current()
    found = app.send_task("total", (data.put(array, once=True),), queue=queue).get(timeout=PATIENCE_S)
    if found != array.sum():
        raise SystemExit(f"the sum is {found}, not {array.sum()}")


def main() -> int:
    """The number of producers that failed."""
    queue, producers, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    array = numpy.arange(size // 8, dtype=numpy.float64)  # one for all: forked processes share what they only read
    go_on, start = os.pipe()
    children = []
    for _ in range(producers):
        pid = os.fork()
        if not pid:
            os.close(start)
            os.read(go_on, 1)  # ends when the parent closes its end
            produce(queue, array)
            os._exit(0)
        children.append(pid)
    began = time.perf_counter()
    os.close(start)
    failed = sum(bool(os.waitpid(pid, 0)[1]) for pid in children)
    print(time.perf_counter() - began)
    return failed


if __name__ == "__main__":
    sys.exit(main())
