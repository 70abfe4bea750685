"""The promise app's shared tasks, in a module that only its worker imports: they join every app of a process."""

from celery import shared_task


def shared(name, **options):
    @shared_task(name=name, bind=True, **options)
    def task(self, first, /, *rest, by="keyword", **more):
        return [self.name, first, list(rest), by, more]


shared("gpu.shared", gpu=True)
shared("cpu.shared")
