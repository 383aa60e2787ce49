"""What metrics add to a connect, and to a request."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from unittest import mock

from . import project
from .figures import Figure, in_cpu_time

#: The most CPU that may be added to a connect, in microseconds.
LIMIT = 20


def run(quick: bool = False) -> list[Figure]:
    """Compare connects of balancers that are watched to those of one that is not."""
    return list(_figures(20 if quick else 400))


def _figures(rounds: int) -> Iterator[Figure]:
    from prometheus_client import values

    from django_proxysql import balancers
    from django_proxysql.monitoring.metrics import Metrics

    wrappers = [project.wrapper(**project.null(2)) for _ in range(4)]
    _, listened, counted, written = wrappers
    balancers[listened.alias].add_listener(lambda event: None)
    single = Metrics(balancers[counted.alias], registry=None)
    with tempfile.TemporaryDirectory() as directory:
        # As prometheus_client sets itself up when it is imported with that variable set.
        with mock.patch.dict("os.environ", PROMETHEUS_MULTIPROC_DIR=directory):
            value_class = values.MultiProcessValue()  # type: ignore[no-untyped-call]
            with mock.patch.object(values, "ValueClass", value_class):
                several = Metrics(balancers[written.alias], registry=None)
                several.refresh()
                project.connect_and_close(written)
        works = [functools.partial(project.connect_and_close, one) for one in wrappers]
        cpu = in_cpu_time(*works, rounds=rounds, batch=50)
        yield Figure("no server: a connect and close()", cpu.median(0) * 1e6, "us")
        yield Figure("CPU added, a listener that does nothing", cpu.added(0, 1) * 1e6, "us")
        yield Figure("CPU added, metrics", cpu.added(0, 2) * 1e6, "us", LIMIT)
        yield Figure("CPU added, multiprocess mode", cpu.added(0, 3) * 1e6, "us", LIMIT)
        ends = single._at_request, several._at_request
        requests = in_cpu_time(*ends, rounds=rounds, batch=200)
        yield Figure("a request's beginning or end", requests.median(0) * 1e6, "us")
        counted.connect()
        written.connect()
        requests = in_cpu_time(*ends, rounds=rounds, batch=200)
        yield Figure("the same, with a connection that is kept", requests.median(0) * 1e6, "us")
