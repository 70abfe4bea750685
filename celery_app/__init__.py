"""The public task API of this project: what producers import. Loads neither ray nor cupy, and no heavy library."""

from celery_app.application import app

__all__ = ["app"]
