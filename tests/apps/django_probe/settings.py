"""The example's settings with the probe app, and a database with a connection pool, as PostgreSQL's may have."""

from django_shop.settings import *  # noqa: F403
from django_shop.settings import DATABASES, INSTALLED_APPS

INSTALLED_APPS = [*INSTALLED_APPS, "tests.apps.django_probe"]
DATABASES["default"]["ENGINE"] = "tests.apps.django_probe.pooled"
DATABASES["default"]["OPTIONS"]["pool"] = True
CELERY_TASK_DEFAULT_QUEUE = "probe"
