"""The pages that the demo's site serves. For Django that is set up already."""

from __future__ import annotations

import time

from django.db import models
from django.http import HttpRequest, JsonResponse
from django.urls import include, path

#: How many products there are.
PRODUCTS = 50

#: Seconds that a page takes after its query: what a template would.
RENDERING = 0.03


class Product(models.Model):
    """Something to sell; the same everywhere, so that a client can tell a right answer."""

    id: models.IntegerField[int, int] = models.IntegerField(primary_key=True)
    name: models.CharField[str, str] = models.CharField(max_length=100)

    class Meta:
        app_label = "shop"


def name_of(number: int) -> str:
    """Return the name that the product of this number has."""
    return f"Product no. {number}"


def product(request: HttpRequest, number: int) -> JsonResponse:
    """Answer with one product, read from whatever peer the request's connection leads to."""
    found = Product.objects.get(pk=number)
    time.sleep(RENDERING)
    return JsonResponse({"name": found.name})


urlpatterns = [
    path("products/<int:number>/", product),
    path("status/", include("django_proxysql.monitoring.urls")),
]
