"""What runs beside and on a GPU: the Ray actor, its executor process, and what crosses between processes.

`actor` and `executor` are those two, `data` is large data in all processes; what crosses lies beside these folders.
Never imports `bridge` or `celery_app`; dependencies point the other way.
"""
