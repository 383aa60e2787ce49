"""The app to put into INSTALLED_APPS, for system checks. The engine works without it."""

from __future__ import annotations

import django
from django.apps import AppConfig
from django.core import checks

from .checks import check_settings, check_with_databases
from .registry import introduce_peers

__all__ = ["DjangoProxySQLConfig"]


class DjangoProxySQLConfig(AppConfig):
    """django-proxysql as a Django app."""

    name = "django_proxysql"
    verbose_name = "Database load balancer"

    def ready(self) -> None:
        """Register the system checks; tell test runs what the peers are."""
        introduce_peers()
        # So that check --tag database runs it. Django before 3.1 runs what has
        # that tag only when asked to, and so does Django from 6.1 on.
        if (3, 1) <= django.VERSION < (6, 1):
            checks.register(check_settings, checks.Tags.database)
            return
        checks.register(check_settings)
        if django.VERSION >= (6, 1):
            checks.register(check_with_databases, checks.Tags.database)
