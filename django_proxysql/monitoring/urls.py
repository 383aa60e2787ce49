"""Status page and health endpoint.

``path("status/", include("django_proxysql.monitoring.urls"))``
"""

from __future__ import annotations

from django.urls import path

from . import views
from .history import watch

app_name = "django_proxysql"

urlpatterns = [
    path("", views.page, name="status"),
    path("peer/", views.operate, name="operate"),
    path("healthz", views.healthz, name="healthz"),
    *(path(name, views.asset, {"name": name}, name=name) for name in views.ASSETS),
]

# Where the page is served the timeline is kept, and nowhere else.
watch()
