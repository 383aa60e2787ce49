"""What metrics add to a connect, and to a request."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from unittest import mock

from . import project
from .connect import _connect_and_close
from .figures import Figure, interleaved

#: The most CPU that may be added to a connect, in microseconds.
LIMIT = 20


def run(quick: bool = False) -> list[Figure]:
    """Compare connects of balancers that are watched to those of one that is not."""
    return list(_figures(20 if quick else 400))


def _figures(rounds: int) -> Iterator[Figure]:
    from prometheus_client import values

    from django_proxysql import balancers
    from django_proxysql.monitoring.metrics import Metrics

    alone, listened, counted, written = (
        project.wrapper(f"metrics_{name}", **project.null(2))
        for name in ("alone", "listened", "counted", "written")
    )
    balancers[listened.alias].add_listener(lambda event: None)
    single = Metrics(balancers[counted.alias], registry=None)
    with tempfile.TemporaryDirectory() as directory:
        # As prometheus_client sets itself up when it is imported with that variable set.
        with mock.patch.dict("os.environ", PROMETHEUS_MULTIPROC_DIR=directory):
            value_class = values.MultiProcessValue()  # type: ignore[no-untyped-call]
            with mock.patch.object(values, "ValueClass", value_class):
                several = Metrics(balancers[written.alias], registry=None)
                several.refresh()
                _connect_and_close(written)()
        cpu = interleaved(
            *map(_connect_and_close, (alone, listened, counted, written)),
            rounds=rounds,
            batch=50,
            clock=time.process_time,
        )
        yield Figure("no server: a connect and close()", cpu.median(0) * 1e6, "us")
        yield Figure("CPU added, a listener that does nothing", cpu.added(0, 1) * 1e6, "us")
        yield Figure("CPU added, metrics", cpu.added(0, 2) * 1e6, "us", LIMIT)
        yield Figure("CPU added, multiprocess mode", cpu.added(0, 3) * 1e6, "us", LIMIT)
        requests = interleaved(
            single._at_request,
            several._at_request,
            rounds=rounds,
            batch=200,
            clock=time.process_time,
        )
        yield Figure("a request's beginning or end", requests.median(0) * 1e6, "us")
        for connection in (counted, written):
            connection.connect()
        requests = interleaved(
            single._at_request,
            several._at_request,
            rounds=rounds,
            batch=200,
            clock=time.process_time,
        )
        yield Figure("the same, with a connection that is kept", requests.median(0) * 1e6, "us")
