from django.core.management.base import BaseCommand
from django.db import transaction

from products.models import Product
from products.tasks import histogram, norm, similar, store_norm


class Command(BaseCommand):
    """``manage.py add_product teapot 3 4``: store a product, have tasks describe it, print what they found."""

    def add_arguments(self, parser):
        parser.add_argument("name")
        parser.add_argument("features", nargs="+", type=float)

    def handle(self, *, name, features, **options):
        sent = {}
        with transaction.atomic():
            product = Product.objects.create(name=name, features=features)
            # sent when the row can be read by others: GPU task, then the CPU task that writes its result
            described = norm.s(features) | store_norm.s(product.pk)
            transaction.on_commit(lambda: sent.update(norm=described.delay(), similar=similar.delay(product.pk)))
        sent["norm"].get(timeout=60)
        product.refresh_from_db()
        self.stdout.write(f"norm: {product.norm:g}")
        self.stdout.write(f"similar: {', '.join(sent['similar'].get(timeout=60)) or 'nothing yet'}")
        self.stdout.write(f"histogram: {histogram.delay(features).get(timeout=60)}")
