"""The app to put into INSTALLED_APPS, for metrics of all load balancers of a Django project."""

from __future__ import annotations

from typing import ClassVar

from django.apps import AppConfig
from django.core.signals import request_finished, request_started

from ...core.logger import logger
from ...registry import balancers
from . import Metrics


class MetricsConfig(AppConfig):
    """Registers the metrics with prometheus_client's own registry, as the process starts."""

    name = "django_proxysql.monitoring.metrics"
    # The last part of the name alone may well be a project's own app.
    label = "django_proxysql_metrics"
    verbose_name = "Database load balancer: metrics"

    #: This process's :class:`Metrics`; None if there is nowhere to write them. Of the class, for
    #: tests that change INSTALLED_APPS make another instance ready.
    metrics: ClassVar[Metrics | None] = None

    def ready(self) -> None:
        """Listen to the balancers, and to requests.

        Nothing is written yet: this may be a process that only forks others.
        """
        if MetricsConfig.metrics is not None:
            return
        try:
            metrics = MetricsConfig.metrics = Metrics(balancers)
        except NotADirectoryError as exc:
            # No reason not to serve requests, or not to run a command.
            logger.error("Nothing is counted for Prometheus: %s", exc)
            return
        # After Django's own receivers, which close connections: those came with django.db.
        for signal in (request_started, request_finished):
            signal.connect(metrics._at_request, dispatch_uid=__name__)
