"""What the demo's site serves. For Django that is set up already."""

from __future__ import annotations

import time

from django.db import connection
from django.http import HttpRequest, JsonResponse
from django.urls import include, path

#: Seconds that a page takes after its query: what a template would.
RENDERING = 0.03


def product(request: HttpRequest, number: int) -> JsonResponse:
    """Answer with one product, read from whatever peer the request's connection leads to."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT name FROM product WHERE id = %s", [number])
        (name,) = cursor.fetchone()
    time.sleep(RENDERING)
    return JsonResponse({"name": name})


urlpatterns = [
    path("products/<int:number>/", product),
    path("status/", include("django_proxysql.monitoring.urls")),
]
