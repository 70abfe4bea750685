"""A task module beside the Flask example's: a body that takes many tasks at once and reads Flask's configuration."""

from celery import shared_task
from flask import current_app

from bridge import batched


@shared_task(gpu=True)
@batched(max_size=8)
def label(values: list[float]) -> list[str]:
    return [f"{value:g} {current_app.config['UNITS']}" for value in values]
