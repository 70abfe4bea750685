"""What runs beside and on a GPU: the Ray actor, its executor process, and what crosses between processes.

Never imports `bridge` or `celery_app`; dependencies point the other way.
"""
