"""One GPU task and one CPU task; both find Flask's `current_app`."""

from celery import shared_task
from flask import current_app

from bridge import array_module


@shared_task(gpu=True)
def norm(values: list[float]) -> str:
    xp = array_module()
    return f"{float(xp.linalg.norm(xp.asarray(values))):g} {current_app.config['UNITS']}"


@shared_task
def count(values: list[float]) -> str:
    return f"{len(values)} values in {current_app.config['UNITS']}"
