"""An app with a mark that means nothing."""

from celery import Celery

app = Celery("mismarked")
app.conf.broker_connection_retry_on_startup = True


@app.task(gpu="yes")
def marked():
    """Never runs."""
