"""Asking each peer, now, what it is and whether it can do its work: for operators.

It goes past the circuits and changes nothing in them: what it finds is a
picture of this moment, for a command or a page, and no request's business.
Every peer is asked in a thread of its own, so that one that hangs delays no answer of the others;
one that does not answer in time is left to its thread,
whose socket is shut down, for no driver bounds everything.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from django.core.checks import Warning
from django.db import connections

from .conf.engines import load_wrapper, peer_engine
from .core import drivers, sockets
from .core.balancer import Attempt
from .core.comparison import Ask, Facts, mysql_facts, postgresql_facts, value_of
from .core.faults import Fault
from .core.peer import Peer
from .core.ready import QUESTIONS, backend, galera, greeting_id, plain, rows
from .registry import balancers


@dataclass(frozen=True)
class Inspection:
    """What one peer answered."""

    alias: str
    peer: str
    address: str
    #: Whether it let us in.
    reachable: bool = False
    #: Seconds for connecting and one trivial round trip; None if there was none.
    latency: float | None = None
    #: ``MariaDB 10.11.6``, ``PostgreSQL 15.4``, ``SQLite 3.40.1``; "" if it is not known.
    version: str = ""
    #: Whether it can do its work, as far as is known: it is reachable, passes
    #: READY_CHECK, and, where it is a Galera node, belongs to its cluster.
    ready: bool = False
    #: What it was recognised as: ``Galera: Synced``, ``read-only``, ``standby``,
    #: ``ProxySQL``, ``MaxScale``, ``MySQL Router``.
    notes: tuple[str, ...] = ()
    #: Why it is not reachable or not ready; never a password.
    error: str = ""
    #: What that error says about the peer.
    fault: Fault | None = None
    #: What it says of itself, to be compared with the others; None behind a proxy.
    facts: Facts | None = None


def inspect(
    aliases: Iterable[str], timeout: float | None = None
) -> dict[str, tuple[Inspection, ...]]:
    """Ask all peers of some balancers at once.

    :param timeout: seconds for a peer; None: the balancer's CONNECT_TIMEOUT. A
        second is added, so that a driver, which may count in whole ones, is the
        first to speak.
    :returns: by alias an :class:`Inspection` for each peer, in their order.
    :raises KeyError: an alias is no load balancer's.
    :raises ImproperlyConfigured: a balancer's settings are wrong.
    """
    inquiries = {
        alias: [_Inquiry(alias, peer, timeout) for peer in balancers[alias].peers.values()]
        for alias in aliases
    }
    for each in inquiries.values():
        for inquiry in each:
            inquiry.start()
    return {alias: tuple(inquiry.result() for inquiry in each) for alias, each in inquiries.items()}


def different_versions(alias: str) -> list[Warning]:
    """Return a warning if a balancer's peers that answer are not all of one kind and version.

    Asked by ``check --database``. Minor versions of PostgreSQL and Oracle make no difference.
    """
    found: dict[str, list[str]] = {}
    for one in inspect([alias])[alias]:
        if one.version and not one.version.startswith("SQLite"):
            found.setdefault(_release(one.version), []).append(one.peer)
    if len(found) < 2:
        return []
    servers = "; ".join(f"{', '.join(names)}: {server}" for server, names in found.items())
    return [
        Warning(
            f"DATABASES[{alias!r}]: the peers are different servers ({servers}).",
            hint="Django asks the first that it meets what SQL to write for all of them. "
            "Give all peers one version.",
            id="django_proxysql.W005",
        )
    ]


def _release(version: str) -> str:
    """Return a server's name and version as precisely as Django tells servers apart."""
    name, _, number = version.partition(" ")
    parts = number.split(".")
    return f"{name} {'.'.join(parts[: 2 if name in ('MariaDB', 'MySQL') else 1])}"


class _Inquiry:
    """One peer's questioning: a thread asks, and the thread that waits may give it up."""

    def __init__(self, alias: str, peer: Peer, timeout: float | None) -> None:
        self._alias = alias
        self._registered = balancers.registered(balancers[alias].name)
        self._peer = peer
        config = self._registered.balancer.config
        self._seconds = config.connect_timeout if timeout is None else timeout
        # Django before 4.1 fills in an entry's defaults when its wrapper is made.
        self._own = connections[alias].settings_dict
        self._engine = peer_engine(self._own, connections.databases)
        #: What is known so far; replaced by the thread alone.
        self.found = Inspection(alias, peer.name, peer.address)
        # A daemon: the interpreter's end does not wait for a peer that hangs.
        self._thread = threading.Thread(
            target=self._run, name=f"django-proxysql inspects {peer.name}", daemon=True
        )

    def start(self) -> None:
        self._deadline = time.monotonic() + self._seconds + 1
        self._thread.start()

    def result(self) -> Inspection:
        """Wait for the answer, but not for ever."""
        # In parts: a signal that comes right before a wait for a lock does not end the wait, and
        # Ctrl-C would be heeded after it.
        while self._thread.is_alive() and (left := self._deadline - time.monotonic()) > 0:
            self._thread.join(min(left, 1.0))
        found = self.found
        if found.ready or found.fault:
            return found
        error = f"no answer within {self._seconds:g} s"
        return replace(found, error=error, fault=Fault.UNREACHABLE)

    def _run(self) -> None:
        try:
            self._ask()
            self.note(ready=True)
        except BaseException as exc:
            # SystemExit from somebody's check, too, is an answer, and came at once.
            judgement = drivers.judge(exc, connecting=not self.found.reachable)
            self.note(error=judgement.text, fault=judgement.fault)

    def note(self, *words: str, **known: Any) -> None:
        """Note what the peer was recognised as, and what else is known of it by now."""
        self.found = replace(self.found, notes=(*self.found.notes, *words), **known)

    def note_facts(self, facts: Callable[[str, Ask], Facts], ask: Ask) -> Facts:
        """Ask the server for its facts, to be compared with the other peers'."""
        found = facts(self._peer.name, ask)
        version = {"version": _release(self.found.version)}
        self.note(facts=replace(found, settings={**version, **found.settings}))
        return found

    def _ask(self) -> None:
        settings = self._registered.to_connect_with(self._peer, self._own, self._alias)
        # A connection of its own, past a pool that may hold some from better days.
        settings["OPTIONS"].pop("pool", None)
        wrapper: Any = load_wrapper(self._engine)(settings, self._alias)
        driver = drivers.driver_of_engine(wrapper)
        params = wrapper.get_connection_params()
        params.update(driver.connect_options(params, self._seconds))
        params.update(driver.trial_options(params, self._seconds))
        started = time.monotonic()
        # The driver's connection, as READY_CHECK gets it, and nothing that
        # Django or the application would set up on it.
        connection = wrapper.connection = wrapper.get_new_connection(params)
        connecting = time.monotonic() - started
        # It is shut down once no thread waits for the answer.
        left = self._deadline + 1 - time.monotonic()
        try:
            with sockets.limited(driver.fileno(connection), left):
                self.note(reachable=True)
                # On PostgreSQL a question that is refused would spoil all that follow.
                wrapper._set_autocommit(True)
                ask = functools.partial(rows_or_none, connection)
                if wrapper.vendor == "mysql":
                    # Before anything that must get past a proxy.
                    self.note(*_proxy(connection, ask))
                started = time.monotonic()
                rows(connection, _TRIVIAL.get(wrapper.vendor, "SELECT 1"))
                self.note(latency=connecting + time.monotonic() - started)
                recognise = _BY_VENDOR.get(wrapper.vendor)
                if recognise is not None:
                    recognise(connection, ask, self)
                balancer = self._registered.balancer
                attempt = Attempt(self._peer, balancer.config)
                attempt.timeout = self._seconds
                balancer.check_ready(connection, attempt)
                # What it was taken out for: such a peer connects as well as ever.
                question = QUESTIONS.get(self._peer.breaker.circuit.question)
                if question is not None:
                    question(connection)
        finally:
            # It has served its purpose.
            with contextlib.suppress(Exception):
                connection.close()


# What can be recognised

#: What is asked for the latency: an answer that needs a server, or a file.
_TRIVIAL = {"oracle": "SELECT 1 FROM DUAL", "sqlite": "PRAGMA schema_version"}


def _proxy(connection: Any, ask: Ask) -> list[str]:
    """Return which proxy answers on the MySQL protocol, if one can be recognised.

    ProxySQL answers the mysql client's first question by itself, by its exact
    words (``SELECT_VERSION_COMMENT`` in its ``MySQL_Session.cpp``). MySQL Router
    adds its name to the version of its greeting. Old versions of MaxScale do so,
    too, or have a variable of their own. 24.02 greets with its server's version
    and knows no such variable (seen); but the thread id of its greeting is its
    own, and ``CONNECTION_ID()`` is answered by a server. That holds for every
    proxy that makes connections of its own: MaxScale is the one that is meant.
    """
    if value_of(ask, "select @@version_comment limit 1") == "(ProxySQL)":
        return ["ProxySQL"]
    greeting = str(getattr(connection, "get_server_info", lambda: "")()).lower()
    if "-router" in greeting:
        return ["MySQL Router"]
    if "maxscale" in greeting or value_of(ask, "SELECT @@maxscale_version"):
        return ["MaxScale"]
    greeted = greeting_id(connection)
    for question in ("SELECT CONNECTION_ID()", "SELECT CONNECTION_ID() FOR UPDATE"):
        # The one is a read, and the other goes where writes go.
        answered = value_of(ask, question)
        if greeted is not None and answered and int(answered) % 2**32 != greeted % 2**32:
            return ["MaxScale"]
    return []


def _mysql(connection: Any, ask: Ask, inquiry: _Inquiry) -> None:
    version = value_of(ask, "SELECT VERSION()")
    number = re.match(r"(?:5\.5\.5-)?([\d.]+)", version)
    name = "MariaDB" if "mariadb" in version.lower() else "MySQL"
    inquiry.note(version=f"{name} {number[1]}" if number else version)
    if inquiry.found.notes:
        # A proxy: what one of the servers behind it says of itself is no verdict on it.
        backend(connection)
        return
    if inquiry.note_facts(mysql_facts, ask).is_read_only:
        inquiry.note("read-only")
    names = "('wsrep_on', 'wsrep_provider')"
    variables = {
        row["variable_name"]: row["value"]
        for row in ask(f"SHOW VARIABLES WHERE Variable_name IN {names}") or ()
    }
    # MariaDB knows these variables even where no library of Galera's is loaded.
    if variables.get("wsrep_on") == "ON" and variables.get("wsrep_provider") != "none":
        state = ask("SHOW GLOBAL STATUS LIKE 'wsrep_local_state_comment'")
        inquiry.note(f"Galera: {state[0]['value']}" if state else "Galera")
        # Whatever READY_CHECK is: a node without its cluster answers everything with 1047.
        galera(connection)


def _postgresql(connection: Any, ask: Ask, inquiry: _Inquiry) -> None:
    version = value_of(ask, "SHOW server_version").partition(" ")[0]
    inquiry.note(version=f"PostgreSQL {version}" if version else "")
    if inquiry.note_facts(postgresql_facts, ask).is_read_only:
        inquiry.note("standby")
    elif value_of(ask, "SHOW default_transaction_read_only") == "on":
        inquiry.note("read-only")


def _sqlite(connection: Any, ask: Ask, inquiry: _Inquiry) -> None:
    inquiry.note(version=f"SQLite {value_of(ask, 'SELECT sqlite_version()')}")


def _oracle(connection: Any, ask: Ask, inquiry: _Inquiry) -> None:
    version = str(getattr(connection, "version", ""))
    inquiry.note(version=f"Oracle {version}" if version else "")


_BY_VENDOR: dict[str, Callable[[Any, Ask, _Inquiry], None]] = {
    "mysql": _mysql,
    "postgresql": _postgresql,
    "sqlite": _sqlite,
    "oracle": _oracle,
}

#: What no other question would get a better answer after.
_IN_EARNEST = (Fault.LOST, Fault.KILLED, Fault.NOT_READY)


def rows_or_none(connection: Any, statement: str) -> list[dict[str, Any]] | None:
    """Return a statement's rows by their columns' names; None if the server will not say.

    A user may lack the right, and a proxy or an old server not know the words.
    """
    try:
        with contextlib.closing(connection.cursor()) as cursor:
            cursor.execute(statement)
            names = [column[0].lower() for column in cursor.description]
            return [dict(zip(names, row)) for row in plain(cursor.fetchall())]
    except Exception as exc:
        if not drivers.is_driver_error(exc) or drivers.judgement_of(exc).fault in _IN_EARNEST:
            raise
        return None
