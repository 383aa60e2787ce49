"""System checks: what is wrong with a balancer's settings, before anything connects."""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage, Error
from django.db import connections

from .conf.options import option_problems
from .conf.reading import messages


def check_options(**kwargs: Any) -> list[CheckMessage]:
    """Check the setting DJANGO_PROXYSQL."""
    return [
        Error(message, hint=hint, id="django_proxysql.E017") for message, hint in option_problems()
    ]


def check_settings(databases: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """Check every load balancer in DATABASES."""
    return _unless_said(check_settings, databases)


def check_with_databases(databases: Any = None, **kwargs: Any) -> list[CheckMessage]:
    """Do the same for ``check --tag database``, where a plain check leaves that tag out."""
    return _unless_said(check_with_databases, databases)


#: Which of the two spoke last, and the list of aliases it was called with: in
#: one run of the checks both get the same object.
_spoke: tuple[object, object] | None = None


def _unless_said(check: object, databases: object) -> list[CheckMessage]:
    global _spoke
    if databases is not None and _spoke is not None:
        other, its_databases = _spoke
        if other is not check and its_databases is databases:
            _spoke = None
            return []
    _spoke = check, databases
    return [message for alias in list(connections.databases) for message in messages(alias)]
