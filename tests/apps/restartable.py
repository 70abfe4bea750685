"""The shop with `worker_pool_restarts`, which `control pool_restart` needs."""

from tests.apps.shop import app

app.conf.worker_pool_restarts = True
