from django.db import models


class Product(models.Model):
    """What the shop sells; `features` are numbers that describe it, `norm` is computed by a task."""

    name = models.CharField(max_length=100, unique=True)
    features = models.JSONField()
    norm = models.FloatField(null=True)

    def __str__(self):
        return self.name
