"""Builds the Celery app. Task modules are loaded by workers; producers import the ones whose tasks they send."""

from celery import Celery

#: Modules that a worker (and an executor) loads, so that every task is registered there.
TASK_MODULES = (
    "celery_app.tasks.arrays",
    "celery_app.tasks.linalg",
    "celery_app.tasks.images",
    "celery_app.tasks.vectors",
    "celery_app.tasks.reports",
)

app = Celery("celery_app", include=TASK_MODULES)
app.config_from_object("celery_app.config")
