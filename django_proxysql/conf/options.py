"""The setting DJANGO_PROXYSQL: what holds for the whole site, not for one balancer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from django.conf import settings

from .entry import did_you_mean

SETTING = "DJANGO_PROXYSQL"

#: What it may say, and what holds where it does not.
OPTIONS: Mapping[str, Any] = {"HEALTHZ": False, "OPERATE_PERMISSION": None}


def healthz_is_on() -> bool:
    """Return whether the health endpoint answers."""
    return _option("HEALTHZ") is True


def operate_permission() -> str | None:
    """Return the permission that draining a peer takes; None: to be a superuser."""
    permission = _option("OPERATE_PERMISSION")
    return permission if isinstance(permission, str) and permission else None


def option_problems() -> Iterator[tuple[str, str]]:
    """Yield what is wrong with the setting: a message, and a hint."""
    given = getattr(settings, SETTING, {})
    if not isinstance(given, Mapping):
        yield f"{SETTING} is a {type(given).__name__}.", "Give a dict."
        return
    for key, value in given.items():
        if key not in OPTIONS:
            hint = did_you_mean(str(key).upper(), OPTIONS)
            yield (
                f"{SETTING} has {key!r}, which is no option.",
                hint or f"It may have {', '.join(OPTIONS)}.",
            )
        elif key == "HEALTHZ" and not isinstance(value, bool):
            yield f"{SETTING}['HEALTHZ'] is {value!r}.", "Give True or False."
        elif key == "OPERATE_PERMISSION" and not (
            value is None or (isinstance(value, str) and "." in value)
        ):
            yield (
                f"{SETTING}['OPERATE_PERMISSION'] is {value!r}.",
                "Give a permission's name, such as 'shop.operate_databases', or None.",
            )


def _option(name: str) -> Any:
    given = getattr(settings, SETTING, {})
    return given.get(name, OPTIONS[name]) if isinstance(given, Mapping) else OPTIONS[name]
