"""The Celery class of the tests' apps."""

from celery import Celery


class App(Celery):
    """Keeps its tasks to itself: Celery gives each app those of all others in a process, and pytest imports many."""

    def task(self, *args, **options):
        return super().task(*args, **{"shared": False, **options})
