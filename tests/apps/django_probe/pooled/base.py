import os

from django.db.backends.sqlite3 import base


class DatabaseWrapper(base.DatabaseWrapper):
    def get_connection_params(self):
        params = super().get_connection_params()
        del params["pool"]
        return params

    def close_pool(self):
        with open(os.environ["PROBE_LOG"], "a") as log:
            log.write(f"pool closed {os.getpid()}\n")
