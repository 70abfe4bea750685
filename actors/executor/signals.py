"""The executor's own signal; all of Celery's signals are sent by producers, the worker and the driver, never here."""

from celery.utils.dispatch import Signal

#: Sent once in each executor, when the app is imported and the device is warm, before residents are loaded: the place
#: for what a process needs before its first GPU body (tracing, random seeds, connections). As with all of Celery's
#: signals, a receiver that raises is logged and stops nothing.
#:
#: Sender: the Celery app. Arguments: `device`, a dict (``kind`` "cuda" or "cpu", ``name``, ``memory_bytes``, ...).
executor_init = Signal(name="executor_init", providing_args={"device"})
