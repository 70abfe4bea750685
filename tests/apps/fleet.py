"""An app whose marks ask for what the test of the fleet wants: FLEET_SHARE of a GPU for each actor."""

import os
import time
from pathlib import Path

from bridge import Gpu
from tests.apps.base import App

app = App("fleet")
app.conf.update(broker_connection_retry_on_startup=True, task_acks_late=True)
SHARE = float(os.environ.get("FLEET_SHARE", "1"))


@app.task(name="fleet.where", gpu=Gpu(share=SHARE))
def where():
    return os.getpid()


@app.task(name="fleet.meet", gpu=Gpu(share=SHARE))
def meet(folder, name, others):
    """Return when as many bodies have come to the folder."""
    Path(folder, name).touch()
    deadline = time.monotonic() + 60
    while len(list(Path(folder).iterdir())) < others and time.monotonic() < deadline:
        time.sleep(0.02)
    return os.getpid(), len(list(Path(folder).iterdir()))


if os.environ.get("FLEET_ACCELERATOR"):

    @app.task(name="fleet.picky", gpu=Gpu(share=SHARE, accelerator=os.environ["FLEET_ACCELERATOR"]))
    def picky():
        return os.getpid()
