"""The app to put into INSTALLED_APPS, for system checks. The engine works without it."""

from __future__ import annotations

import django
from django.apps import AppConfig
from django.core import checks

from .checks import check_settings

__all__ = ["DjangoProxySQLConfig"]


class DjangoProxySQLConfig(AppConfig):
    """django-proxysql as a Django app."""

    name = "django_proxysql"
    verbose_name = "Database load balancer"

    def ready(self) -> None:
        """Register the system checks."""
        # So that check --tag database runs it. Django before 3.1 runs what has
        # that tag only when asked to.
        tags = (checks.Tags.database,) if django.VERSION >= (3, 1) else ()
        checks.register(check_settings, *tags)
