"""An asynchronous exception at each line of the engine in turn.

Ctrl-C, Celery's and gevent's time-outs strike between any two lines. Whatever
was under way, no transaction is halved, no write doubled, no connection left
behind, and the next one works.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from django.db import close_old_connections, connections, transaction
from django.db.utils import Error

import django_proxysql
from django_proxysql.backends import replays
from tests.site import Site, site

#: The balancer and the breakers are struck in the tests of the core.
PACKAGE = os.path.join(os.path.dirname(django_proxysql.__file__), "backends")


class Interrupt(BaseException):
    """What strikes."""


class Striking:
    """Notes the lines of the engine that are run, or raises :class:`Interrupt` at one of them."""

    def __init__(self, at: tuple[str, int] | None = None) -> None:
        self.at = at
        self.lines: dict[tuple[str, int], None] = {}
        self.struck = False

    def __enter__(self) -> Striking:
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.settrace(None)

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE) or self.struck:
            return None
        if event == "line":
            here = (os.path.basename(frame.f_code.co_filename), frame.f_lineno)
            self.lines[here] = None
            if here == self.at:
                self.struck = True
                raise Interrupt(here)
        return self.trace


def write_after_a_kill(here: Site) -> None:
    here.write("one")


def transaction_after_a_kill(here: Site) -> None:
    with transaction.atomic(here.connection.alias):
        here.write("one")
        here.write("two")


def transaction_whose_first_read_is_lost(here: Site) -> None:
    with transaction.atomic(here.connection.alias):
        with transaction.atomic(here.connection.alias):
            here.read()
            here.write("one")
        here.write("two")


def read_that_is_lost(here: Site) -> None:
    here.read()


SCENES: list[tuple[Callable[[Site], None], str, int]] = [
    (write_after_a_kill, "kill", 0),
    (transaction_after_a_kill, "kill", 0),
    (transaction_whose_first_read_is_lost, "cut", 3),
    (read_that_is_lost, "cut", 1),
    (transaction_after_a_kill, "leave", 0),
]


# Struck between two lines, a connection may be left to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
@pytest.mark.parametrize("server", ["mariadb", "postgres"])
@pytest.mark.parametrize(
    ("work", "what", "nth"), SCENES, ids=[f"{work.__name__}-{what}" for work, what, _ in SCENES]
)
def test_at_every_line(
    request: Any,
    fault_proxy: Any,
    server: str,
    work: Callable[[Site], None],
    what: str,
    nth: int,
) -> None:
    with site(request.getfixturevalue(server), fault_proxy) as here:
        gc.collect()
        gc.freeze()
        try:
            prepare(here, what, nth)
            with Striking() as noting:
                work(here)
            assert len(noting.lines) > 20
            for at in noting.lines:
                prepare(here, what, nth)
                with Striking(at) as striking, contextlib.suppress(Interrupt, Error):
                    work(here)
                if striking.struck:
                    stands(here, f"{at[0]}:{at[1]}", work)
        finally:
            gc.unfreeze()


def prepare(here: Site, what: str, nth: int) -> None:
    with here.plain.cursor() as cursor:
        cursor.execute("DELETE FROM app_token")
    for peer in here.balancer.peers.values():
        peer.breaker.close()
    for proxy in here.proxies:
        proxy.disarm()
    # A minute and more: the budget of replays is another test's.
    here.idle(100)
    close_old_connections()
    here.sql("SELECT 1")
    close_old_connections()
    if what == "kill":
        here.kill()
    elif what == "cut":
        here.cut("after", nth)
    else:
        here.connection.peer.breaker.open()


def stands(here: Site, where: str, work: Callable[[Site], None]) -> None:
    """Hold what is there after an interrupt against what must be."""
    connection = here.connection
    assert not connection.in_atomic_block, where
    for proxy in here.proxies:
        proxy.disarm()
    gc.collect()
    # As the next request or task begins.
    close_old_connections()
    assert connection._attempt is None, where
    assert connection._session is not None, where
    assert not connection._of_ours, where
    assert connection.settings_dict is connections.databases[connection.alias], where
    try:
        here.write("after")
    except Error:
        # The connection was lost, and no error raised so far.
        here.write("after")
    gc.collect()
    rows = here.written()
    whole = [[], ["one"]] if "transaction" not in work.__name__ else [[], ["one", "two"]]
    assert rows[-1:] == ["after"], where
    rows.pop()
    assert rows in whole, where
    assert connection.autocommit, where
    counts = {name: peer.connections for name, peer in here.balancer.peers.items()}
    assert sum(counts.values()) == 1, (where, counts)
    assert here.sessions() == 1, where


@pytest.mark.parametrize("in_block", [False, True])
def test_interrupted_replay_is_no_silence(
    here: Site, monkeypatch: pytest.MonkeyPatch, in_block: bool
) -> None:
    """The loss counts as raised: nothing is mended behind it before the block ends."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise Interrupt

    monkeypatch.setattr(replays, "replace", interrupted)
    block = transaction.atomic(here.connection.alias) if in_block else contextlib.nullcontext()
    with contextlib.suppress(Error), block:
        here.cut("after")
        with pytest.raises(Interrupt):
            here.read()
        assert here.session.error_raised
        if in_block:
            monkeypatch.undo()
            with pytest.raises(Error):
                here.read()
    monkeypatch.undo()
    assert here.read() == []
