"""System checks: what is wrong with a balancer's settings, before anything connects."""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage, Error, Warning
from django.db import connections

from .conf import is_balancer, problems

__all__ = ["check_settings", "messages"]


def messages(alias: str) -> list[CheckMessage]:
    """Return the messages for one alias of DATABASES; none if it is no balancer."""
    databases = connections.databases
    entry = databases.get(alias, {})
    if not is_balancer(entry):
        return []
    return [
        (Error if problem.is_error else Warning)(
            f"DATABASES[{alias!r}]: {problem.message}",
            hint=problem.hint,
            id=f"django_proxysql.{problem.id}",
        )
        for problem in problems(alias, entry, databases)
    ]


def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Check every load balancer in DATABASES."""
    return [message for alias in connections.databases for message in messages(alias)]
