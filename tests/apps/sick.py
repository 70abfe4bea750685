"""An app whose GPU number N is broken as long as there is a file SICK_FOLDER/N."""

import os
from pathlib import Path

from tests.apps.base import App
from tests.support.sick import break_device, sick_while

app = App("sick")
app.conf.update(task_acks_late=True, task_default_queue="sick")
#: Ray's number of the logical GPU that the actor has reserved.
GPU = os.environ.get("CUDA_VISIBLE_DEVICES", "")
FILE = Path(os.environ.get("SICK_FOLDER", "."), GPU or "none")
FOUND_AT_START = FILE.exists()
if FOUND_AT_START:
    sick_while(str(FILE))


@app.task(name="sick.works", gpu=True)
def works(folder, number):
    """Note the run; the GPU's number."""
    Path(folder, f"{number}-{os.getpid()}").touch()
    if FILE.exists():
        break_device()
    return GPU
