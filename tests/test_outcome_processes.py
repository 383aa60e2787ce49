"""A process that loses a COMMIT is killed, or frozen: no other one is misled, on real servers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from django.db import OperationalError

from django_proxysql.backends import outcomes
from django_proxysql.backends.tokens import delete_old
from django_proxysql.core.outcome import Outcome, Tokens
from tests.asking_process import (
    ANSWERED,
    BETWEEN,
    COMMITTING,
    FENCING,
    WRITTEN,
    AskingProcess,
)
from tests.engine import make_outcome_table, mysql_peer
from tests.fakes import running, until
from tests.servers.faultproxy import FaultProxy
from tests.site import Site, site

COMMIT = b"; COMMIT"


class Scene(NamedTuple):
    """What a test works with."""

    here: Site
    #: The asking process' way to the server, and its other one.
    way: FaultProxy
    other: FaultProxy
    token: bytes

    def asking(self, *moments: str, **how: Any) -> AskingProcess:
        peers = [mysql_peer(self.way), mysql_peer(self.other, PRIORITY=1)]
        peer_engine = self.here.plain.settings_dict["ENGINE"]
        return AskingProcess(peers, peer_engine, self.token, *moments, **how)

    def sends_commit(self, process: AskingProcess) -> None:
        """Have the process send COMMIT; return when it has left."""
        process.goes_on()
        until(lambda: any(COMMIT in packet for packet in list(self.way.packets)))

    def holds_commit(self, process: AskingProcess) -> None:
        """Have the process send COMMIT; return when it is in its way, which is frozen."""
        self.way.freeze()
        process.goes_on()
        until(self.way.has_unread)

    def asked_by_another(self) -> Outcome:
        """What this process finds out about that one's COMMIT."""
        db, session = self.here.connection, self.here.session
        sent = time.monotonic(), time.time()
        token = outcomes.Token(self.token, outcomes._table(db, session), sent)
        return outcomes._find_out(db, session, token, OperationalError("lost"))

    def settled(self) -> list[str]:
        """What stands once the server has done all that it was sent."""
        for proxy in (self.way, self.other):
            proxy.wait_until_idle()
        return self.here.written()


@pytest.fixture(params=["mariadb", "postgres"])
def scene(request: pytest.FixtureRequest, fault_proxy: Callable[..., Any]) -> Iterator[Scene]:
    server = request.getfixturevalue(request.param)
    with site(server, fault_proxy, COMMIT_OUTCOME="record", OUTCOME_DEADLINE=60) as here:
        make_outcome_table(here.plain)
        yield Scene(here, fault_proxy(server), fault_proxy(server), Tokens().next())


class TestKilled:
    """By SIGKILL. Its token is kept, and another process that asks agrees with what stands."""

    @pytest.mark.parametrize(
        ("moment", "commit"),
        # A fence is written only where the transaction does not stand.
        [(WRITTEN, "lost"), *itertools.product((FENCING, ANSWERED), ("lost", "answered"))],
    )
    def test_while_it_asks(self, scene: Scene, moment: str, commit: str) -> None:
        if commit == "lost":
            scene.way.cut_before(COMMIT)
        else:
            scene.way.cut_reply(0, COMMIT)
        with scene.asking(moment) as process:
            process.reaches(moment)
            process.kill()
        stands = ["one"] if commit == "answered" else []
        assert delete_old(scene.here.connection, 3600) == 0
        expected = Outcome.COMMITTED if stands else Outcome.ROLLED_BACK
        assert scene.asked_by_another() is expected
        assert delete_old(scene.here.connection, 3600) == 0
        assert scene.asked_by_another() is expected
        assert scene.settled() == stands

    @pytest.mark.parametrize("asks", ["before", "after"])
    def test_while_its_commit_is_under_way(self, scene: Scene, asks: str) -> None:
        """What arrives after another process' fence does nothing; what arrived before stands."""
        with scene.asking(COMMITTING) as process:
            process.reaches(COMMITTING)
            scene.holds_commit(process)
            process.kill()
        if asks == "before":
            assert scene.asked_by_another() is Outcome.ROLLED_BACK
        scene.way.thaw()
        stands = [] if asks == "before" else ["one"]
        assert scene.settled() == stands
        expected = Outcome.COMMITTED if stands else Outcome.ROLLED_BACK
        assert scene.asked_by_another() is expected
        assert scene.settled() == stands


def test_two_that_fence_at_once_agree(scene: Scene) -> None:
    """The other process' fence waits for the first one's, which is not committed yet."""
    scene.way.cut_before(COMMIT)
    with scene.asking(WRITTEN) as process:
        process.reaches(WRITTEN)
        assert asked_until_it_goes_on(scene, process) is Outcome.ROLLED_BACK
        assert process.line() == "rolled back, 0"
    assert scene.settled() == []


class TestTwoPackets:
    """The token goes ahead of COMMIT. Between them the transaction is open, and has its lock."""

    def asking(self, scene: Scene) -> AskingProcess:
        if scene.here.is_mysql:
            return scene.asking(BETWEEN, options={"multi_statements": False})
        pytest.importorskip("psycopg2")
        return scene.asking(BETWEEN, driver="psycopg2")

    def test_a_process_that_is_killed_between_them_has_committed_nothing(
        self, scene: Scene
    ) -> None:
        with self.asking(scene) as process:
            process.reaches(BETWEEN)
            process.kill()
        assert scene.asked_by_another() is Outcome.ROLLED_BACK
        assert scene.settled() == []

    def test_another_that_asks_between_them_waits_for_the_end(self, scene: Scene) -> None:
        with self.asking(scene) as process:
            process.reaches(BETWEEN)
            assert asked_until_it_goes_on(scene, process) is Outcome.COMMITTED
            assert process.line() == "well, 1"
        assert scene.settled() == ["one"]


def asked_until_it_goes_on(scene: Scene, process: AskingProcess) -> Outcome:
    """Have another process ask while this one has its lock; let it go on; return what was found."""
    found: list[Outcome] = []
    with running(lambda: found.append(scene.asked_by_another())):
        until(lambda: waits_for_a_lock(scene.here))
        process.goes_on()
    return found[0]


def waits_for_a_lock(here: Site) -> bool:
    """Whether a session of the server's is writing a fence, and waits for another's."""
    ((number,),) = here.plainly(
        # InnoDB's own table of waits is not read anew while it is read often.
        "SELECT count(*) FROM information_schema.processlist"
        " WHERE id <> CONNECTION_ID() AND info LIKE 'INSERT%'"
        if here.is_mysql
        else "SELECT count(*) FROM pg_locks WHERE NOT granted"
    )
    return bool(number)


class TestFrozen:
    """The process and the server, with a COMMIT between them. Either may go on first."""

    def test_the_server_goes_on_first(self, scene: Scene) -> None:
        with scene.asking(COMMITTING) as process:
            process.reaches(COMMITTING)
            scene.here.server.freeze()
            scene.sends_commit(process)
            process.freeze()
            scene.here.server.thaw()
            until(lambda: scene.here.plain_rows() == ["one"])
            process.thaw()
            assert process.line() == "well, 1"
        assert scene.settled() == ["one"]

    @pytest.mark.parametrize("drops", [False, True], ids=["", "the way is gone"])
    def test_the_process_goes_on_first(self, scene: Scene, drops: bool) -> None:
        """It asks a server that is frozen still, with its COMMIT in the server's socket."""
        with scene.asking(COMMITTING) as process:
            process.reaches(COMMITTING)
            scene.here.server.freeze()
            scene.sends_commit(process)
            process.freeze()
            if drops:
                scene.way.drop_connections()
                asked = scene.way.accepted + scene.other.accepted
            process.thaw()
            if drops:
                until(lambda: scene.way.accepted + scene.other.accepted > asked)
            scene.here.server.thaw()
            end = process.line()
        stands = scene.settled()
        assert end == ("well, 1" if stands else "rolled back, 0")
        if not drops:
            assert stands == ["one"]

    def test_another_process_asks_meanwhile(self, scene: Scene) -> None:
        """COMMIT arrives after that one's fence: both say the same."""
        with scene.asking(COMMITTING) as process:
            process.reaches(COMMITTING)
            scene.holds_commit(process)
            process.freeze()
            assert scene.asked_by_another() is Outcome.ROLLED_BACK
            scene.way.thaw()
            process.thaw()
            assert process.line() == "rolled back, 0"
        assert scene.settled() == []
