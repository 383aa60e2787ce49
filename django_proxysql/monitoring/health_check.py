"""A check for `django-health-check`_, version 4 or later: does a load balancer have a database?

.. _django-health-check: https://codingjoe.dev/django-health-check/
"""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import Error, connections

from ..registry import balancers

try:
    from health_check.base import HealthCheck
    from health_check.exceptions import ServiceUnavailable, ServiceWarning
except ImportError as exc:
    raise ImportError(
        "django_proxysql.monitoring.health_check needs django-health-check 4 or later: "
        'pip install "django-health-check>=4"'
    ) from exc


@dataclasses.dataclass
class Peers(HealthCheck):  # type: ignore[misc]
    """Ask the database a question through its load balancer.

    It is unavailable if no peer is, and well if one is available. It asks over the
    connection that its thread has open; where there is none it makes one, even if no
    circuit is closed, and closes it again: in a process that serves nothing while its
    checks fail, nothing else would find out that a peer has recovered. What it says
    names peers, and never an address, a user or an error's text.

    :param alias: the balancer's.
    :param strict: fail with a warning, too, when a peer is out of use. For a
        monitor; where a failed check takes the process out of use, one dead
        peer would take all of them out.
    :param timeout: how long it may take.
    """

    alias: str = "default"
    strict: bool = dataclasses.field(default=False, repr=False)
    timeout: datetime.timedelta = dataclasses.field(
        default=datetime.timedelta(seconds=5), repr=False
    )

    def run(self) -> None:
        """Make the check.

        :raises ServiceUnavailable: no peer is available.
        :raises ServiceWarning: with ``strict``, a peer is out of use.
        """
        try:
            balancers[self.alias]
        except KeyError:
            raise ServiceUnavailable(f"{self.alias!r} is no load balancer") from None
        except ImproperlyConfigured as exc:
            raise ServiceUnavailable("the load balancer's settings are wrong") from exc
        connection: Any = connections[self.alias]
        try:
            with connection.temporary_connection() as cursor:
                cursor.execute(f"SELECT 1{connection.features.bare_select_suffix}")
                cursor.fetchone()
        except Error as exc:
            raise ServiceUnavailable(f"no peer can be used{self._out()}") from exc
        if self.strict and self._out():
            raise ServiceWarning(f"some peers cannot be used{self._out()}")

    def pretty_status(self) -> str:
        """Return ``OK``, and which peers are out of use."""
        return f"OK{self._out()}"

    def _out(self) -> str:
        """Return the peers whose circuits this process knows to be open, and why."""
        out = [
            f"{peer.name} {peer.state}" + (f" ({peer.fault.value})" if peer.fault else "")
            for peer in balancers[self.alias].snapshot()
            if peer.state != "closed"
        ]
        return f": {', '.join(out)}" if out else ""
