"""The tasks of `celery_app` in plain prefork children, on NumPy.

`-P prefork` on the command line would not do: it is Celery's default, so the app's own `worker_pool`, the bridge's,
would win.
"""

from celery_app import app

app.conf.worker_pool = "prefork"
