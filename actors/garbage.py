"""Long pauses of Python's garbage collector, kept out of tasks."""

import gc


def settle() -> None:
    """Never look again at what is there now, which is there for good: modules, mostly.

    A process that has loaded Ray, Celery and an app holds some hundred thousand objects. The first full collection that
    comes by itself looks at all of them, for a tenth of a second in the middle of somebody's task.
    """
    gc.collect()
    gc.freeze()
