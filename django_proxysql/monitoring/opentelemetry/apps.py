"""The app to put into INSTALLED_APPS, for telemetry of all load balancers of a Django project."""

from __future__ import annotations

from typing import ClassVar

from django.apps import AppConfig

from ...registry import balancers
from . import Telemetry


class TelemetryConfig(AppConfig):
    """Listens to the balancers, as the process starts."""

    name = "django_proxysql.monitoring.opentelemetry"
    # The last part of the name alone may well be a project's own app.
    label = "django_proxysql_opentelemetry"
    verbose_name = "Database load balancer: OpenTelemetry"

    #: This process's :class:`Telemetry`. Of the class, for tests that change INSTALLED_APPS make
    #: another instance ready.
    telemetry: ClassVar[Telemetry | None] = None

    def ready(self) -> None:
        """Listen to the balancers. The global providers may be set before or after."""
        if TelemetryConfig.telemetry is None:
            TelemetryConfig.telemetry = Telemetry(balancers)
