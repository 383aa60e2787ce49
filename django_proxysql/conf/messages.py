"""What is wrong with a balancer's settings, in the words of Django's checks."""

from __future__ import annotations

from django.core.checks import CheckMessage, Error, Warning
from django.db import connections

from .keys import is_balancer
from .reading import problems

__all__ = ["messages"]


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
