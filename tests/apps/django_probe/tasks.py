import os

from celery import shared_task
from celery.signals import task_success, worker_before_create_process
from django.db import connection
from products.models import Product


def look():
    """(process, whether a connection was open, rows)"""
    was_open = connection.connection is not None
    return [os.getpid(), was_open, Product.objects.count()]


@shared_task(gpu=True)
def gpu_look():
    return look()


@shared_task
def cpu_look():
    return look()


@shared_task(gpu=True)
def environment():
    return [os.environ.get(name) for name in ("DJANGO_COLOUR", "SHOP_SIZE", "SHOE_SIZE")]


@worker_before_create_process.connect
def use_database_in_the_parent(**_):
    Product.objects.count()


@task_success.connect(sender=gpu_look)
def use_database_in_the_driver(**_):
    with open(os.environ["PROBE_LOG"], "a") as log:
        pid, was_open, _ = look()
        log.write(f"driver {pid} {was_open}\n")
