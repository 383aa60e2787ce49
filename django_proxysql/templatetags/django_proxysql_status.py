"""``{% add_status_page %}``: the status page among the admin's apps."""

from __future__ import annotations

from typing import Any

from django import template
from django.urls import NoReverseMatch, reverse

register = template.Library()


@register.simple_tag(takes_context=True)
def add_status_page(context: Any) -> str:
    """Add the status page to the ``app_list`` of an admin index, if the site includes its URLs.

    It has no model, and needs none: the list holds what the index shows, as dicts.
    """
    try:
        url = reverse("django_proxysql:status")
    except NoReverseMatch:
        return ""
    entry = {
        "name": "Database load balancer",
        "app_label": "django_proxysql",
        "app_url": url,
        "has_module_perms": True,
        "models": [
            {
                "name": "Status of the peers",
                "object_name": "Status",
                "admin_url": url,
                "add_url": None,
                "view_only": True,
                "perms": {"view": True},
            }
        ],
    }
    context["app_list"] = [*(context.get("app_list") or ()), entry]
    return ""
