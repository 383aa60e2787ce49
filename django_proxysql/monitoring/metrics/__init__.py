"""What happens to peers, as metrics for Prometheus. Needs the extra ``[prometheus]``.

docs/howto/prometheus.rst says how they are switched on, with Django (:mod:`.apps`) and without.

Everything is counted by the library's own Counter, Histogram and Gauge, so that its multiprocess
mode, in which custom collectors are not asked, knows them as well. There a gauge is whatever its
process has written last: connections end in finalizers and in the middle of anything, where no
lock may be taken, so their count is written after the events, at the beginning and end of a
request, and at :meth:`Metrics.refresh`.
"""

from __future__ import annotations

import atexit
import dataclasses
import glob
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram, multiprocess
except ImportError as exc:
    raise ImportError(
        'Metrics need prometheus_client: pip install "django-proxysql[prometheus]"'
    ) from exc

from ...core import runtime
from ...core.events import Event
from ...core.face import Face
from ...core.logger import logger
from ...core.peer import Peer
from ...core.reports import REPORTS, Count, fits
from .. import check_sources, in_use

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

    from .. import Source

__all__ = ["Metrics", "MultiProcessCollector"]

#: From a connect on the same network to CONNECT_DEADLINE's default, in seconds.
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15)

STATES = ("closed", "open", "half-open")

#: A note among the events that wait: look at the peers.
_LOOK = object()

#: So many events wait only if the thread that was to count them was killed at it.
_STUCK = 10_000


class Metrics:
    """Counts the events of load balancers; a collector of prometheus_client's.

    Its labels are the balancer's alias, the peer's name, and words of a fixed set: never an
    address, an error's text or anything else that grows.

    :param sources: the :class:`LoadBalancer` s and :class:`AsyncLoadBalancer` s, each with a name
        of its own, or Django's ``balancers``: all of them, present and future.
    :param registry: where it is registered; None: nowhere.
    :raises TypeError: a source is neither.
    :raises ValueError: the registry has it, or another of the same names, already; or two balancers
        have one name.
    :raises NotADirectoryError: ``PROMETHEUS_MULTIPROC_DIR`` names no directory.
    """

    #: The database is not touched: see Listeners.add().
    _counts_only = True

    def __init__(self, *sources: Source, registry: CollectorRegistry | None = REGISTRY) -> None:
        check_sources("Metrics", sources)
        names = [source.name for source in sources if isinstance(source, Face)]
        if len(set(names)) < len(names):
            raise ValueError(f"Balancers need different names: {names}")
        directory = _multiprocess_directory()
        if directory is not None and not os.path.isdir(directory):
            raise NotADirectoryError(f"PROMETHEUS_MULTIPROC_DIR={directory!r} is no directory")
        self._sources = sources
        #: What the table's metrics are here, by their names there.
        self._counted = {
            count.name: _made(row.event, count) for row in REPORTS.values() for count in row.counts
        }
        self._connections = _gauge("connections", "Open connections.")
        self._circuits = _gauge(
            "circuit_state", "How many processes have the peer's circuit in this state.", "state"
        )
        self._drains = _gauge("peer_drained", "How many processes have the peer drained.")
        self._metrics: tuple[Any, ...] = (
            *self._counted.values(),
            self._connections,
            self._circuits,
            self._drains,
        )
        #: What labels() has made, for it takes a lock, which a fork may leave held, and its time.
        self._children: dict[tuple[Any, ...], Any] = {}
        #: The peers that are known, and what their gauges say.
        self._peers: dict[tuple[str, ...], Peer] = {}
        self._shown: dict[tuple[str, ...], tuple[int, str, bool]] = {}
        #: Whether all balancers that there are have been made, and their peers are known.
        self._knows_all = False
        # prometheus_client's locks are plain ones: a thread that comes by here again while it
        # counts (a signal handler, a finalizer) would wait for itself. So no thread waits: an
        # event is put down, and the thread that is counting already takes it along.
        self._pending: deque[Any] = deque()
        self._counting = threading.Lock()
        if registry is not None:
            registry.register(self)
        _all.add(self)
        for source in sources:
            source.add_listener(self)

    def __call__(self, event: Event, /) -> None:
        """Count ``event``; a :class:`~django_proxysql.core.events.Listener`."""
        self._pending.append(event)
        self._count_pending()

    def refresh(self) -> None:
        """Have the gauges say what is so now.

        Done by itself at each scrape, and with Django at a request's beginning and end. In
        multiprocess mode, where a scrape reads what the processes wrote last, a process that
        serves no requests may call it: a task queue's after each task, say.
        """
        self._knows_all = False
        self._at_request()

    def _at_request(self, **kwargs: Any) -> None:
        """Write down which connections are there; a receiver of Django's request signals."""
        self._pending.append(_LOOK)
        self._count_pending()

    # A collector

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics' names and types: a registry refuses what it has already."""
        for metric in self._metrics:
            yield from metric.describe()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now."""
        self.refresh()
        for metric in self._metrics:
            yield from metric.collect()

    # Counting

    def _count_pending(self) -> None:
        pending = self._pending
        # Asked again after the release: an event may have been put down in between.
        while pending:
            counting = self._counting
            if not counting.acquire(blocking=False):
                if len(pending) > _STUCK:
                    self._counting = threading.Lock()
                return
            try:
                while pending:
                    self._take(pending.popleft())
            finally:
                counting.release()

    def _take(self, item: Any) -> None:
        if item is not _LOOK:
            self._count(item)
            return
        if not self._knows_all:
            for source in self._sources:
                for alias in () if isinstance(source, Face) else source:
                    # Its settings may be wrong, as checks and connects say.
                    with suppress(Exception):
                        source[alias]  # type: ignore[index]
            for balancer in in_use(self._sources):
                self._introduce(balancer)
            self._knows_all = True
        for key in list(self._peers):
            self._show(key)

    def _count(self, event: Any) -> None:
        peer = getattr(event, "peer", None)
        key = (event.balancer,) if peer is None else (event.balancer, peer)
        if peer is not None and key not in self._peers:
            for balancer in in_use(self._sources):
                if balancer.name == event.balancer:
                    self._introduce(balancer)
        for count in REPORTS[type(event)].counts:
            if fits(event, count.when):
                child = self._child(self._counted[count.name], *key, *count.label_of(event))
                if count.is_duration:
                    child.observe(event.seconds)
                else:
                    child.inc()
        if peer is not None:
            self._show(key)

    def _child(self, metric: Any, *labels: str) -> Any:
        key = (metric, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child

    # Showing

    def _introduce(self, balancer: Face) -> None:
        """Have a balancer's series begin at 0: increase() overlooks one that begins at 1."""
        alias = balancer.name
        self._begin_at_zero((alias,))
        for name, peer in balancer.peers.items():
            if (alias, name) not in self._peers:
                self._begin_at_zero((alias, name))
            # In tests a balancer may be forgotten, and another have its name.
            self._peers[alias, name] = peer

    def _begin_at_zero(self, key: tuple[str, ...]) -> None:
        for row in REPORTS.values():
            for count in row.counts:
                if len(key) == len(_keys(row.event)) and not count.is_duration:
                    for label in count.labels():
                        self._child(self._counted[count.name], *key, *label)

    def _show(self, key: tuple[str, ...]) -> None:
        """Have the gauges of one peer say what is so now; those that say it are left alone."""
        peer = self._peers.get(key)
        if peer is None:
            return
        connections, state, drained = now = (
            peer.connections,
            peer.breaker.circuit.state,
            peer.drained,
        )
        shown = self._shown.get(key)
        if now == shown:
            return
        if shown is None or shown[0] != connections:
            self._child(self._connections, *key).set(connections)
        if shown is None or shown[1] != state:
            for other in STATES:
                self._child(self._circuits, *key, other).set(other == state)
        if shown is None or shown[2] != drained:
            self._child(self._drains, *key).set(drained)
        self._shown[key] = now

    # Processes

    def _hold_for_fork(self) -> threading.Lock | None:
        # So that no child inherits a lock of prometheus_client's that some thread held to count
        # this. A thread that forks in the middle of counting waits in vain.
        counting = self._counting
        return counting if counting.acquire(timeout=1) else None

    def _after_fork_in_child(self) -> None:
        self._counting = threading.Lock()
        self._pending.clear()
        self._shown.clear()
        self._knows_all = False

    def _leave(self) -> None:
        """Write that this process has nothing, for nothing else may remove what it wrote.

        What another thread has begun to write is written first, and nothing after this: the
        process's end would cut it off, and leave half a file.
        """
        self._counting.acquire(timeout=1)
        for key in list(self._shown):
            self._child(self._connections, *key).set(0)
            self._child(self._drains, *key).set(0)
            for state in STATES:
                self._child(self._circuits, *key, state).set(0)


def _keys(event: type) -> tuple[str, ...]:
    """Return the labels that each metric of an event has."""
    of_peer = any(field.name == "peer" for field in dataclasses.fields(event))
    return ("alias", "peer") if of_peer else ("alias",)


def _made(event: type, count: Count) -> Any:
    """Return prometheus_client's metric for one of the table."""
    labels = (*_keys(event), *([count.label] if count.label else ()))
    name = f"django_proxysql_{count.name}"
    if count.is_duration:
        return Histogram(name, count.about, labels, buckets=BUCKETS, registry=None)
    return Counter(f"{name}_total", count.about, labels, registry=None)


def _gauge(name: str, about: str, *labels: str) -> Any:
    """Return a gauge of each peer, summed over the processes that are alive."""
    labels = ("alias", "peer", *labels)
    name = f"django_proxysql_{name}"
    return Gauge(name, about, labels, registry=None, multiprocess_mode="livesum")


def _multiprocess_directory() -> str | None:
    """Return where prometheus_client's processes write, if there are several."""
    name = "PROMETHEUS_MULTIPROC_DIR"
    return os.environ.get(name, os.environ.get(name.lower()))


#: The broken files that the log has named.
_named: set[str] = set()


class MultiProcessCollector(multiprocess.MultiProcessCollector):
    """prometheus_client's collector of the same name, which leaves out broken files.

    A process that is killed while it makes a file leaves it empty; a disk that is full cuts one
    off. prometheus_client's own collector then raises at each scrape, until the file is removed.
    Here the log names it once, as a ``WARNING``.
    """

    def collect(self) -> Iterable[Metric]:
        """Return the metrics of all processes."""
        files = glob.glob(os.path.join(self._path, "*.db"))
        try:
            return self._merged(files)
        except Exception:
            return self._merged([file for file in files if self._is_whole(file)])

    def _merged(self, files: list[str]) -> list[Any]:
        merge: Any = self.merge
        return list(merge(files, accumulate=True))

    def _is_whole(self, file: str) -> bool:
        try:
            self._merged([file])
        except FileNotFoundError:
            # Its process has ended, or was marked dead.
            return False
        except Exception as exc:
            if file not in _named:
                _named.add(file)
                logger.warning(
                    "The metrics leave out a broken file of Prometheus's multiprocess mode: %s "
                    "(%s: %s). A process was killed while it made the file, or the disk was full. "
                    "Remove the file.",
                    file,
                    type(exc).__name__,
                    exc,
                )
            return False
        return True


_all: runtime.Living[Metrics] = runtime.Living()
#: The locks that the thread holds which is about to fork.
_forking = threading.local()


def _before_fork() -> None:
    _forking.held = [metrics._hold_for_fork() for metrics in _all.all()]


def _after_fork_in_parent() -> None:
    for lock in _forking.held:
        if lock is not None:
            lock.release()


def _after_fork_in_child() -> None:
    for metrics in _all.all():
        metrics._after_fork_in_child()


runtime.at_fork(_after_fork_in_child, before=_before_fork, after_in_parent=_after_fork_in_parent)


@atexit.register
def _at_exit() -> None:
    if _multiprocess_directory() is not None:
        runtime.finish()
        for metrics in _all.all():
            metrics._leave()


def __getattr__(name: str) -> str:
    # As in the package's own __init__.
    if name == "default_app_config" and import_module("django").VERSION < (3, 2):
        return f"{__name__}.apps.MetricsConfig"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
