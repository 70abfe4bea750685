"""Two GPU tasks, one CPU task, and one that BRIDGE_GPU_TASKS moves to the GPU without a change here."""

import numpy
from celery import shared_task

from bridge import array_module
from products.models import Product


@shared_task(gpu=True)
def norm(features: list[float]) -> float:
    xp = array_module()
    return float(xp.linalg.norm(xp.asarray(features)))


@shared_task(gpu=True)
def similar(product_id: int, count: int = 3) -> list[str]:
    """Names of the products most like this one, best first; the GPU process reads them from the database."""
    product = Product.objects.get(pk=product_id)
    others = list(Product.objects.exclude(pk=product_id).order_by("pk"))
    if not others:
        return []
    xp = array_module()
    table, wanted = xp.asarray([other.features for other in others]), xp.asarray(product.features)
    scores = table @ wanted / (xp.linalg.norm(table, axis=1) * xp.linalg.norm(wanted))
    return [others[index].name for index in xp.argsort(-scores)[:count].tolist()]


@shared_task
def store_norm(norm: float, product_id: int) -> None:
    Product.objects.filter(pk=product_id).update(norm=norm)


@shared_task
def histogram(values, bins=4):
    return numpy.histogram(values, bins=bins)[0].tolist()
