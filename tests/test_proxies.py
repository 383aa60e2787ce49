"""ProxySQL and MaxScale as peers, by scripted servers that do what those were seen to do."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import MySQLdb
import pymysql
import pytest
from django.db import (
    DatabaseError,
    OperationalError,
    close_old_connections,
    connections,
    transaction,
)

from django_proxysql import (
    CommitOutcomeUnknown,
    LoadBalancer,
    NoPeerAvailable,
    NotReady,
    retrying_atomic,
)
from django_proxysql.core import ready
from django_proxysql.core.events import PeersExhausted
from django_proxysql.core.faults import Fault
from django_proxysql.inspection import inspect
from django_proxysql.registry import balancers
from tests.engine import POSTGRESQL, Clock, engine, mysql_peer, postgres_peer
from tests.fakes import until
from tests.servers.faultproxy import FaultProxy
from tests.servers.scripted import NO_SERVER, READ_ONLY, MaxScale, ProxySQL, Refusal, ScriptedServer
from tests.site import with_table

DRIVERS = [MySQLdb, pymysql]
LOCK = "SELECT id FROM app_token FOR UPDATE"
NONE_LEFT = Refusal(9001, NO_SERVER.format(0))
INSERT = "INSERT INTO app_token (value) VALUES ('one')"


def connected(driver: Any, server: Any, **params: Any) -> Any:
    return driver.connect(
        host=server.host, port=server.port, user="app", password="x", database="app", **params
    )


def execute(connection: Any, statement: str) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else None


@contextlib.contextmanager
def started(*classes: type[ScriptedServer], **options: Any) -> Iterator[list[Any]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(cls(**options)) for cls in classes]


def states(alias: str = "balanced") -> list[str]:
    return [peer.breaker.current_state for peer in balancers[alias].peers.values()]


def by_chance() -> MaxScale:
    """Its reader's thread has the number of MaxScale's own."""
    proxy = MaxScale()
    proxy.reader.ids = iter([11])
    return proxy


@pytest.mark.parametrize(
    ("made", "check", "notes"),
    [
        (ScriptedServer, None, ()),
        (ProxySQL, None, ("ProxySQL",)),
        # That the server behind it is read-only is no verdict.
        (MaxScale, None, ("MaxScale",)),
        (by_chance, None, ("MaxScale",)),
        # Asked of the writers.
        (MaxScale, "writable", ("MaxScale",)),
        (lambda: ScriptedServer("8.0.36-router"), None, ("MySQL Router",)),
    ],
)
def test_who_it_is(made: Any, check: str | None, notes: tuple[str, ...]) -> None:
    """``manage.py peers`` names the proxy, and takes no server's word for it."""
    with made() as peer, engine([mysql_peer(peer)], READY_CHECK=check):
        (one,) = inspect(["balanced"])["balanced"]
        assert (one.ready, one.notes, one.error) == (True, notes, "")


@pytest.mark.parametrize("gone", ["writer", "reader"])
def test_one_side_without_servers_is_not_ready(gone: str) -> None:
    """Also the last peer, which is used all the same."""
    with ProxySQL() as peer, engine([mysql_peer(peer)]):
        setattr(peer, gone, None)
        (one,) = inspect(["balanced"])["balanced"]
        assert (one.reachable, one.ready, one.notes) == (True, False, ("ProxySQL",))
        assert "while reaching hostgroup" in one.error


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("is_dict", [False, True], ids=["", "dict"])
@pytest.mark.parametrize("cls", [ScriptedServer, MaxScale, ProxySQL])
def test_writable_asks_what_takes_the_writes(driver: Any, is_dict: bool, cls: Any) -> None:
    """Also by cursors that give dicts."""
    cursors = __import__(f"{driver.__name__}.cursors").cursors
    params = {"cursorclass": cursors.DictCursor} if is_dict else {}
    with cls() as peer, contextlib.closing(connected(driver, peer, **params)) as connection:
        is_server = cls is ScriptedServer
        before = len(peer.said)
        assert ready.writable(connection) == ready.Writer("", is_server)
        # A server is asked once.
        assert not is_server or len(peer.said) == before + 1
        writer = peer if is_server else peer.writer
        writer.read_only = True
        if not is_server:
            peer.reader.read_only = False
        with pytest.raises(NotReady, match="read_only is 1"):
            ready.writable(connection)


@pytest.mark.parametrize("driver", DRIVERS)
def test_writable_without_a_query_rule_for_update(driver: Any) -> None:
    """ProxySQL keeps to one hostgroup inside a transaction."""
    with ProxySQL() as peer, contextlib.closing(connected(driver, peer)) as connection:
        peer.for_update_rule = False
        ready.writable(connection)
        assert peer.statements()[-1] == "ROLLBACK"


class TestRefusalsOfAProxy:
    """1290, 1836 and 1047 prove that a statement did not run only where a server says so itself."""

    @pytest.fixture
    def pair(self) -> Iterator[list[MaxScale]]:
        with (
            started(MaxScale, MaxScale) as proxies,
            engine(
                [mysql_peer(proxy) for proxy in proxies],
                clock=Clock(),
                READY_CHECK="writable",
                CONN_MAX_AGE=None,
            ),
        ):
            yield proxies

    def test_row_that_stands_is_not_written_twice(self, pair: list[MaxScale]) -> None:
        for proxy in pair:
            proxy.error_on_write = True
        with pytest.raises(OperationalError, match="1290"):
            execute(connections["balanced"], INSERT)
        assert sorted(len(proxy.ran) for proxy in pair) == [0, 1]

    @pytest.mark.parametrize(
        ("code", "text"),
        [
            (1290, READ_ONLY),
            (1836, "Running in read-only mode"),
            (1047, "WSREP has not yet prepared node for application use"),
        ],
    )
    @pytest.mark.parametrize("in_block", [False, True])
    @pytest.mark.parametrize("cls", [ScriptedServer, ProxySQL, MaxScale])
    def test_statement_is_run_again_only_if_a_server_refused_it(
        self, cls: Any, in_block: bool, code: int, text: str
    ) -> None:
        settings = {"READY_CHECK": "writable", "clock": Clock()}
        with (
            started(cls, cls) as pair,
            engine([mysql_peer(one) for one in pair], **settings) as connection,
        ):
            connection.ensure_connection()
            old = current(pair)
            (other,) = [one for one in pair if one is not old]
            old.refusals["INSERT"] = Refusal(code, text)
            # … and for new connections, too.
            for server in (old, getattr(old, "writer", old)):
                server.read_only = True
            block = transaction.atomic("balanced") if in_block else contextlib.nullcontext()
            runs_again = cls is ScriptedServer
            with contextlib.nullcontext() if runs_again else pytest.raises(DatabaseError), block:
                execute(connection, INSERT)
            assert (len(old.ran), len(other.ran)) == (0, int(runs_again))

    def test_commit_that_a_proxy_refuses_is_unknown(self, pair: list[MaxScale]) -> None:
        connection = connections["balanced"]
        with pytest.raises(CommitOutcomeUnknown), transaction.atomic("balanced"):
            execute(connection, INSERT)
            for proxy in pair:
                proxy.refusals["^COMMIT"] = Refusal(1290, READ_ONLY)
        runs: list[int] = []

        @retrying_atomic(using="balanced")
        def work() -> None:
            runs.append(1)
            execute(connection, INSERT)

        with pytest.raises(CommitOutcomeUnknown):
            work()
        assert runs == [1]

    def test_commit_that_a_server_refuses_is_undone(self) -> None:
        """READY_CHECK or not, the server that answers is asked which it is."""
        with ScriptedServer() as peer, engine([mysql_peer(peer)], clock=Clock()) as connection:
            peer.refusals["^COMMIT"] = Refusal(1290, READ_ONLY)
            with (
                pytest.raises(OperationalError, match="1290") as raised,
                transaction.atomic("balanced"),
            ):
                execute(connection, INSERT)
            assert not isinstance(raised.value, CommitOutcomeUnknown)

    def test_chance_does_not_make_a_proxy_a_server(self, pair: list[MaxScale]) -> None:
        """One look that shows a proxy is believed, whatever another shows."""
        connection = connections["balanced"]
        connection.ensure_connection()
        old = current(pair)
        assert connection.peer.is_server is False
        old.by_chance = old.writer.read_only = True
        with pytest.raises(OperationalError, match="1290"):
            execute(connection, INSERT)
        # Not run again on the other.
        assert sum(len(proxy.ran) for proxy in pair) == 0

    @pytest.mark.parametrize(
        ("seen", "known"), [("", None), ("S", True), ("P", False), ("SP", False), ("PS", False)]
    )
    def test_one_look_that_shows_a_proxy_is_believed(self, seen: str, known: Any) -> None:
        peer = LoadBalancer({"one": {}}, connect=MySQLdb.connect).peers["one"]
        for shown in seen:
            peer.note_server(shown == "S")
        assert peer.is_server is known

    def test_what_is_known_is_forgotten_when_the_circuit_opens(self, pair: list[MaxScale]) -> None:
        connections["balanced"].ensure_connection()
        peer = connections["balanced"].peer
        peer.breaker.open()
        assert peer.is_server is None


@pytest.mark.parametrize("struck", [KeyboardInterrupt(), RuntimeError("a time limit")])
def test_connection_whose_question_was_interrupted_is_not_used_again(
    struck: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer that comes next may be the question's."""

    def writer_of(connection: Any) -> ready.Writer:
        connection.query("SELECT CONNECTION_ID()")
        raise struck

    with ScriptedServer() as peer, engine([mysql_peer(peer)], CONN_MAX_AGE=None) as one:
        one.ensure_connection()
        first = one.connection
        peer.refusals["INSERT"] = Refusal(1047, "WSREP has not yet prepared node")
        with monkeypatch.context() as patched:
            patched.setattr(ready, "writer_of", writer_of)
            with pytest.raises((DatabaseError, KeyboardInterrupt)):
                execute(one, INSERT)
        del peer.refusals["INSERT"]
        close_old_connections()
        assert execute(one, "SELECT 1") == ((1,),)
        assert one.connection is not first


@pytest.mark.parametrize(
    "check", ["writable", "django_proxysql.core.ready.writable", ready.writable]
)
def test_kept_connection_that_refuses_is_dropped(check: Any) -> None:
    """Its error is raised, and the next write goes by a new one. The check has any of its names."""
    with (
        started(MaxScale, MaxScale) as pair,
        engine([mysql_peer(o) for o in pair], READY_CHECK=check, CONN_MAX_AGE=None) as connection,
    ):
        connection.ensure_connection()
        first = connection.connection
        old = current(pair)
        old.error_on_write = True
        with pytest.raises(OperationalError, match="1290"):
            execute(connection, INSERT)
        old.error_on_write = False
        execute(connection, INSERT)
        assert connection.connection is not first
        # New connections there take writes.
        assert states() == ["closed", "closed"]


def current(pair: list[Any]) -> Any:
    """Return the one of the proxies that this thread's connection leads to."""
    return pair[int(connections["balanced"].peer.name[-1])]


class TestBusyProxySQL:
    """9001 may say that all servers are gone, or that all connections to them are in use."""

    @pytest.fixture
    def pair(self) -> Iterator[list[ProxySQL]]:
        with started(ProxySQL, ProxySQL) as proxies:
            yield proxies

    @contextlib.contextmanager
    def site(self, pair: list[ProxySQL], **settings: Any) -> Iterator[Any]:
        settings = {"CONN_MAX_AGE": None, "TRIAL_TIMEOUT": 1, **settings}
        with engine([mysql_peer(one) for one in pair], clock=Clock(), **settings) as connection:
            connection.ensure_connection()
            yield connection

    def fails(self) -> Any:
        """Write in vain; return the error."""
        with pytest.raises(DatabaseError, match="9001") as raised:
            execute(connections["balanced"], INSERT)
        return raised.value

    @pytest.mark.parametrize(
        "refusal",
        [NONE_LEFT, Refusal(9002, "Max connect failure while reaching hostgroup 0")],
    )
    @pytest.mark.parametrize("in_block", [False, True])
    def test_answered_question_leaves_the_circuit_closed(
        self, pair: list[ProxySQL], refusal: Refusal, in_block: bool
    ) -> None:
        """The statement is not run again: its error is no proof that it did not run."""
        with self.site(pair) as connection:
            old = current(pair)
            old.refusals["INSERT"] = refusal
            first = connection.connection
            for _ in range(3):
                block = transaction.atomic("balanced") if in_block else contextlib.nullcontext()
                with pytest.raises(DatabaseError, match=f"{refusal.code}"), block:
                    execute(connection, INSERT)
            assert not [proxy.ran for proxy in pair if proxy.ran]
            assert states() == ["closed", "closed"]
            assert connection.connection is first
            assert connection.peer.unanswered == 0
            assert "DO 1" in old.statements()

    @pytest.mark.parametrize("gone", ["writer", "reader"])
    def test_unanswered_question_opens_the_circuit(self, pair: list[ProxySQL], gone: str) -> None:
        """What was served before proves nothing."""
        with self.site(pair) as connection:
            peer = connection.peer
            old = current(pair)
            execute(connection, INSERT)
            assert peer.served == balancers["balanced"].clock()
            setattr(old, gone, None)
            statement = INSERT if gone == "writer" else "SELECT @@version"
            raises = (
                pytest.raises(DatabaseError, match="9001")
                if gone == "writer"
                # A read is run again on the other.
                else contextlib.nullcontext()
            )
            with raises:
                execute(connection, statement)
            assert peer.breaker.current_state == "open"
            assert peer.breaker.circuit.question == "backend"
            execute(connection, statement)
            assert connection.peer is not peer

    def test_fail_max_questions_in_a_row(self, pair: list[ProxySQL]) -> None:
        with self.site(pair, BREAKER={"fail_max": 3}) as connection:
            peer = connection.peer
            old = current(pair)
            for number, state in [(1, "closed"), (2, "closed"), (0, "closed"), (1, "closed")]:
                if number:
                    old.writer.up = False
                    self.fails()
                    old.writer.up = True
                else:
                    old.refusals["INSERT"] = NONE_LEFT
                    self.fails()
                    del old.refusals["INSERT"]
                assert (peer.unanswered, peer.breaker.current_state) == (number, state)
            old.writer.up = False
            for _ in range(2):
                self.fails()
            assert peer.breaker.current_state == "open"
            assert peer.breaker.circuit.failures == 3

    def test_last_peer_is_kept_and_its_errors_are_plain(self, pair: list[ProxySQL]) -> None:
        with self.site(pair, CONN_MAX_AGE=0) as connection:
            for proxy in pair:
                proxy.writer.busy = proxy.reader.busy = True
            events: list[Any] = []
            balancers["balanced"].add_listener(events.append)
            for _ in range(6):
                assert not isinstance(self.fails(), NoPeerAvailable)
                connection.close()
            assert sorted(states()) == ["closed", "open"]
            assert not [event for event in events if isinstance(event, PeersExhausted)]
            for proxy in pair:
                proxy.writer.busy = proxy.reader.busy = False
            execute(connection, INSERT)

    @pytest.mark.parametrize("before", [True, False])
    def test_peer_that_serves_others_is_not_given_up(
        self, pair: list[ProxySQL], before: bool
    ) -> None:
        """A statement that was begun later was answered: the servers are there."""
        with self.site(pair) as connection:
            peer, clock = connection.peer, balancers["balanced"].clock
            old = current(pair)
            old.writer.up = False
            if before:
                peer.served = clock() + 1
            else:
                # While the question is waiting.
                old.on_question = lambda: setattr(peer, "served", clock() + 1)
            peer.unanswered = 5
            self.fails()
            assert (peer.breaker.current_state, peer.unanswered) == ("closed", 0)
            assert ("DO 1" in old.statements()) is not before

    def test_last_peer_is_not_asked(self, pair: list[ProxySQL]) -> None:
        with self.site(pair[:1]):
            pair[0].writer.busy = True
            before = pair[0].connections
            self.fails()
            assert pair[0].connections == before
            assert "DO 1" not in pair[0].statements()

    def test_two_threads_do_not_give_up_the_last_two(
        self, pair: list[ProxySQL], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with self.site(pair):
            balancer = balancers["balanced"]
            one, other = balancer.peers.values()
            exc = MySQLdb.OperationalError(*NONE_LEFT.args)
            overtaking = threading.Thread(target=balancer.group.count_unanswered, args=(other, exc))
            trip = one.breaker.trip

            def slowly(*args: Any, **how: Any) -> Any:
                overtaking.start()
                # It looks now, if it can.
                overtaking.join(0.3)
                return trip(*args, **how)

            monkeypatch.setattr(one.breaker, "trip", slowly)
            assert balancer.group.count_unanswered(one, exc)
            overtaking.join(60)
            assert states() == ["open", "closed"]

    def test_one_thread_asks_at_a_time(self, pair: list[ProxySQL]) -> None:
        with self.site(pair) as connection:
            peer = connection.peer
            old = current(pair)
            old.refusals["INSERT"] = NONE_LEFT
            peer.asked_until = balancers["balanced"].clock() + 1
            self.fails()
            assert "DO 1" not in old.statements()
            peer.asked_until = balancers["balanced"].clock()
            self.fails()
            assert "DO 1" in old.statements()

    def test_9001_in_the_middle_of_a_connect(self, pair: list[ProxySQL]) -> None:
        """Django asks the server something as it connects: the same rules hold there."""
        check = "tests.test_proxies.reaches_a_server"
        with self.site(pair, READY_CHECK=check) as connection:
            connection.close()
            for proxy in pair:
                proxy.writer.busy = True
            for _ in range(8):
                with pytest.raises(OperationalError, match="9001") as raised:
                    connection.ensure_connection()
                assert not isinstance(raised.value, NoPeerAvailable)
                assert sorted(states()) == ["closed", "open"]
                # The other's trial is due, and fails.
                balancers["balanced"].clock.advance(20)
            for proxy in pair:
                proxy.writer.busy = False
            connection.ensure_connection()

    def test_full_frontend_is_no_answer(self, pair: list[ProxySQL]) -> None:
        """A question that cannot be put counts for nothing."""
        with self.site(pair) as connection:
            peer = connection.peer
            old = current(pair)
            old.writer.up = False
            old.limit = 1
            self.fails()
            assert (peer.breaker.current_state, peer.unanswered) == ("closed", 0)


def reaches_a_server(connection: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("DO 1")
    cursor.close()


def test_waiting_for_a_peer_waits_for_a_server_behind_a_proxy() -> None:
    with ProxySQL() as peer:
        waited: list[float] = []

        def sleep(seconds: float) -> None:
            waited.append(seconds)
            peer.writer.busy = False

        db = LoadBalancer(
            {"proxy": {"host": peer.host, "port": peer.port, "user": "app", "password": "x"}},
            connect=MySQLdb.connect,
            ready_check=reaches_a_server,
            wait_for_peer=60,
            sleep=sleep,
        )
        peer.writer.busy = True
        db.connect().close()
        assert len(waited) == 1


class TestTrial:
    """What a trial asks it asks on its throw-away connection."""

    @contextlib.contextmanager
    def open_one(self, **settings: Any) -> Iterator[tuple[Any, ProxySQL, ProxySQL, Clock]]:
        """A balancer whose peer0, a ProxySQL, was taken out for having no server."""
        with started(ProxySQL, ProxySQL, patience=30) as (bad, good):
            clock = Clock()
            settings = {"TRIAL_TIMEOUT": 1, "CHECK_INTERVAL": 30, **settings}
            peers = [mysql_peer(bad), mysql_peer(good)]
            with engine(peers, clock=clock, **settings) as connection:
                exc = MySQLdb.OperationalError(*NONE_LEFT.args)
                assert balancers["balanced"].group.count_unanswered(
                    balancers["balanced"].peers["peer0"], exc
                )
                clock.advance(60)
                yield connection, bad, good, clock

    @pytest.mark.parametrize("gone", ["writer", "reader"])
    @pytest.mark.parametrize("check", [None, "writable"])
    def test_no_server_on_one_side(self, gone: str, check: str | None) -> None:
        with self.open_one(READY_CHECK=check) as (connection, bad, _, _):
            setattr(bad, gone, None)
            began = time.monotonic()
            connection.ensure_connection()
            # Bounded by TRIAL_TIMEOUT: the proxy would have kept it for 30 s.
            assert time.monotonic() - began < 15
            assert connection.peer.name == "peer1"
            assert states() == ["open", "closed"]
            # Nothing else was asked, and no other connection made.
            assert len({number for number, _ in bad.said}) <= 1

    def test_both_sides_answer(self) -> None:
        with self.open_one(TRIAL_TIMEOUT=60) as (connection, bad, _, _):
            connection.ensure_connection()
            assert connection.peer.name == "peer0"
            assert states() == ["closed", "closed"]
            asked = [number for number, said in bad.said if said in ("SELECT 1", "DO 1")]
            # On the throw-away connection, and on that alone.
            assert len(asked) == 2
            assert set(asked) == {min(number for number, _ in bad.said)}
            assert connection.connection.thread_id() not in asked

    def test_last_peer_passes_though_it_may_be_busy(self) -> None:
        with self.open_one() as (connection, bad, good, clock):
            bad.writer = None
            balancers["balanced"].peers["peer1"].breaker.open()
            good.close()
            clock.advance(1)
            connection.ensure_connection()
            assert connection.peer.name == "peer0"

    def test_outside_django(self) -> None:
        with started(ProxySQL, ProxySQL, patience=30) as (bad, good):
            clock = Clock()
            db = LoadBalancer(
                {
                    name: {"host": one.host, "port": one.port, "user": "app", "password": "x"}
                    for name, one in (("bad", bad), ("good", good))
                },
                connect=MySQLdb.connect,
                trial_timeout=1,
                clock=clock,
            )
            assert db.group.count_unanswered(
                db.peers["bad"], MySQLdb.OperationalError(*NONE_LEFT.args)
            )
            bad.reader = None
            clock.advance(60)
            db.connect().close()
            assert db.peers["bad"].breaker.current_state == "open"
            assert (
                "no server behind the proxy answers SELECT 1"
                in db.peers["bad"].breaker.circuit.error
            )


@pytest.mark.parametrize("kind", ["mariadb", "postgres"])
def test_question_of_a_trial_is_bounded(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the driver has for time-outs, and however many answers come in time."""
    server = request.getfixturevalue(kind)
    asked: list[Any] = []

    def sleep(connection: Any) -> None:
        asked.append(connection)
        statement = "SELECT SLEEP(0.4)" if kind == "mariadb" else "SELECT pg_sleep(0.4)"
        for _ in range(100):
            ready.rows(connection, statement)

    monkeypatch.setitem(ready.QUESTIONS, "writable", sleep)
    settings: dict[str, Any] = {} if kind == "mariadb" else {"PEER_ENGINE": POSTGRESQL}
    peers = [mysql_peer(server), mysql_peer(server)]
    clock = Clock()
    with engine(peers, TRIAL_TIMEOUT=1, clock=clock, **settings) as connection:
        breaker = balancers["balanced"].peers["peer0"].breaker
        breaker.trip(NotReady("read-only"), Fault.NOT_READY, "writable")
        clock.advance(60)
        began = time.monotonic()
        connection.ensure_connection()
        assert time.monotonic() - began < 20
        assert connection.peer.name == "peer1"
        assert breaker.current_state == "open"
        # Once, and not on the connection that the caller gets.
        assert len(asked) == 1


class TestDemotedPrimary:
    """Two proxies that lead to a server; it is made read-only, and they lead to another then."""

    @pytest.fixture(params=["mariadb_pair", "postgres_pair"])
    def moved(self, request: Any, fault_proxy: Callable[..., FaultProxy]) -> Iterator[Any]:
        old, new = request.getfixturevalue(request.param)
        is_mysql = request.param == "mariadb_pair"
        proxies = [fault_proxy(old), fault_proxy(old)]
        settings: dict[str, Any] = {} if is_mysql else {"PEER_ENGINE": POSTGRESQL}
        peers = [postgres_peer(proxy) for proxy in proxies]
        for node in (new, old):
            with engine([postgres_peer(node)], alias="straight", **settings) as straight:
                with_table(straight)
        with engine(
            peers, READY_CHECK="writable", CONN_MAX_AGE=None, clock=Clock(), **settings
        ) as connection:
            connection.ensure_connection()

            def move() -> None:
                if is_mysql:
                    old.set_global("read_only", 1)
                else:
                    old.set_global("default_transaction_read_only = on")
                    driver = connection.connection
                    said = "SHOW default_transaction_read_only"
                    until(lambda: driver.execute(said).fetchone()[0] == "on")
                for proxy in proxies:
                    proxy._ask(lambda proxy=proxy: setattr(proxy, "target", new))

            yield connection, move

    @staticmethod
    def settle(connection: Any) -> None:
        """What PostgreSQL's transaction may do is settled as it begins."""
        if connection.vendor == "postgresql":
            connection.connection.execute("SET TRANSACTION READ ONLY")

    def test_write_in_autocommit_goes_to_the_new_one(self, moved: Any) -> None:
        connection, move = moved
        move()
        execute(connection, INSERT)
        assert execute(connection, "SELECT count(*) FROM app_token") in [((1,),), [(1,)]]
        assert states() == ["closed", "closed"]

    def test_kept_connection_fails_once_at_most(self, moved: Any) -> None:
        """Inside a block PostgreSQL cannot be asked: then once the block has ended."""
        connection, move = moved
        first = connection.connection
        with pytest.raises(DatabaseError), transaction.atomic("balanced"):
            # After a lock the block is not begun again elsewhere.
            execute(connection, LOCK)
            move()
            self.settle(connection)
            execute(connection, INSERT)
        close_old_connections()
        with transaction.atomic("balanced"):
            execute(connection, INSERT)
        assert connection.connection is not first
        assert states() == ["closed", "closed"]

    def test_block_that_only_read_is_begun_again_on_the_new_one(self, moved: Any) -> None:
        """PostgreSQL's refusal fails the transaction: there the error is raised."""
        connection, move = moved
        is_postgresql = connection.vendor == "postgresql"
        ends = pytest.raises(DatabaseError) if is_postgresql else contextlib.nullcontext()
        with ends, transaction.atomic("balanced"):
            execute(connection, "SELECT 1")
            move()
            self.settle(connection)
            execute(connection, INSERT)
        close_old_connections()
        ((count,),) = execute(connection, "SELECT count(*) FROM app_token")
        assert count == (0 if is_postgresql else 1)
        assert states() == ["closed", "closed"]

    def test_block_is_run_again(self, moved: Any) -> None:
        connection, move = moved
        runs: list[int] = []

        @retrying_atomic(using="balanced")
        def work() -> None:
            runs.append(1)
            execute(connection, LOCK)
            if len(runs) == 1:
                move()
                self.settle(connection)
            execute(connection, INSERT)

        work()
        assert runs == [1, 1]


def test_what_the_application_has_set_is_its_own(postgres: Any) -> None:
    """No server's doing: the connection stays. (On MySQL it is another error, 1792.)"""
    peers = [postgres_peer(postgres)]
    settings: dict[str, Any] = {"PEER_ENGINE": POSTGRESQL, "READY_CHECK": "writable"}
    with engine(peers, **settings) as connection:
        with_table(connection)
        first = connection.connection
        execute(connection, "SET default_transaction_read_only = on")
        for _ in range(2):
            with pytest.raises(DatabaseError):
                execute(connection, INSERT)
        assert connection.connection is first
        assert not connection._session.is_leaving
        assert not connection._session.doubted
