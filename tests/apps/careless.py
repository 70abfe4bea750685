"""An app with everything that the doctor warns of and a worker starts with."""

from bridge import Gpu, batched
from tests.apps.base import App

app = App("careless")
app.conf.update(broker_transport_options={"visibility_timeout": 2}, worker_prefetch_multiplier=4)


@app.task(name="careless.early", gpu=True)
def early():
    pass


@app.task(name="careless.long", gpu=Gpu(share=0.5), acks_late=True, time_limit=900)
def long():
    pass


@app.task(name="careless.kept", gpu=False)
def kept():
    pass


@app.task(name="careless.alone")
@batched(max_size=4)
def alone(values: list[int]) -> list[int]:
    return values
