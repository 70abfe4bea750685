"""The bridge on arrays: one signature takes lists, envelopes, references and what stays on the device."""

from typing import Any, get_args

from celery import Celery

from bridge import Gpu
from bridge.data import Array

app = Celery("bridge_data")

Floats = Array["float64"]
#: The ways a result may travel.
RESULTS = get_args(Gpu.model_fields["result"].annotation)


@app.task(shared=False, name="total", gpu=True)
def total(values: Floats) -> float:
    """The sum, of an array in whatever form."""
    return float(values.sum())


@app.task(shared=False, name="doubled_ref", gpu=Gpu(result="ref"))
def doubled_ref(values: Floats) -> Any:
    """Twice the numbers, by reference."""
    return values * 2


if "device" in RESULTS:

    @app.task(shared=False, name="doubled_device", gpu=Gpu(result="device"))
    def doubled_device(values: Floats) -> Any:
        """Twice the numbers, which stay on the device."""
        return values * 2
