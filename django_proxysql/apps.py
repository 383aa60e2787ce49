"""The app to put into INSTALLED_APPS, for system checks. The engine works without it."""

from __future__ import annotations

from typing import Any

import django
from django.apps import AppConfig, apps
from django.core import checks
from django.db import connections
from django.db.models.signals import pre_migrate

from .conf.aliases import introduce_peers
from .conf.options import option_problems
from .conf.reading import messages


class DjangoProxySQLConfig(AppConfig):
    """django-proxysql as a Django app."""

    name = "django_proxysql"
    verbose_name = "Database load balancer"

    def ready(self) -> None:
        """Register the system checks; tell test runs what the peers are, and admins of the page."""
        introduce_peers()
        _link_from_admin()
        pre_migrate.connect(_make_table, sender=self)
        checks.register(check_options)
        # So that check --tag database runs it. Django before 3.1 runs what has
        # that tag only when asked to, and so does Django from 6.1 on.
        if (3, 1) <= django.VERSION < (6, 1):
            checks.register(check_settings, checks.Tags.database)
            return
        checks.register(check_settings)
        if django.VERSION >= (6, 1):
            checks.register(check_with_databases, checks.Tags.database)


def _make_table(using: str, **kwargs: Any) -> None:
    # The engine is imported where it is used.
    from .backends.tokens import make_table

    make_table(using)


def _link_from_admin() -> None:
    """Have the admin's index show the status page.

    By the index's template, which works in whatever order the apps are installed. A site that
    has chosen another is left alone.
    """
    if apps.is_installed("django.contrib.admin"):
        from django.contrib import admin

        if admin.site.index_template is None:
            admin.site.index_template = "django_proxysql/admin_index.html"


# What is wrong with a balancer's settings, before anything connects


def check_options(**kwargs: Any) -> list[checks.CheckMessage]:
    return [
        checks.Error(message, hint=hint, id="django_proxysql.E017")
        for message, hint in option_problems()
    ]


def check_settings(databases: Any = None, **kwargs: Any) -> list[checks.CheckMessage]:
    """Check every load balancer in DATABASES."""
    return _unless_said(check_settings, databases)


def check_with_databases(databases: Any = None, **kwargs: Any) -> list[checks.CheckMessage]:
    """Do the same for ``check --tag database``, where a plain check leaves that tag out."""
    return _unless_said(check_with_databases, databases)


#: Which of the two spoke last, and the list of aliases it was called with: in
#: one run of the checks both get the same object.
_spoke: tuple[object, object] | None = None


def _unless_said(check: object, databases: object) -> list[checks.CheckMessage]:
    global _spoke
    if databases is not None and _spoke is not None:
        other, its_databases = _spoke
        if other is not check and its_databases is databases:
            _spoke = None
            return []
    _spoke = check, databases
    return [message for alias in list(connections.databases) for message in messages(alias)]
