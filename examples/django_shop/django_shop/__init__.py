"""The app is imported with Django, so that `@shared_task` uses it."""

from django_shop.celery import app as celery_app

__all__ = ["celery_app"]
