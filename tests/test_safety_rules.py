"""What may be replaced, and what may be run again: the rules, where other tests leave gaps."""

from __future__ import annotations

import contextlib
import functools
import select
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import IntegrityError, OperationalError, close_old_connections, transaction
from django.db.backends.signals import connection_created
from django.db.transaction import TransactionManagementError
from django.db.utils import Error

from django_proxysql import CommitOutcomeUnknown, retrying_atomic
from tests.engine import Clock, engine, mysql_peer
from tests.servers import DATABASE
from tests.site import KINDS, Site, site, until_seen, with_table
from tests.stories import CUTS, WSREP, attempts, no_autocommit, refusing, tell, told

#: Connector/C's 2006: the packet did not leave, and may be sent elsewhere.
RESET = {"reset": True}
DROP = "refusing 1047 { !{ SELECT value FROM app_token FOR UPDATE; write one } }"

STORIES = {
    # Rules 1 and 12: what was written may not be readable elsewhere yet.
    "working peer is left at the end of the request that wrote": (
        "all: request_ends; write one; open; read; idle 100; read; stays; request_ends; read; left"
    ),
    "working peer is left at the end of the request that wrote many": (
        "all: request_ends; many one; open; read; idle 100; read; stays; request_ends; read; left"
    ),
    "request that has written is remembered over a loss": (
        "all: request_ends; write one; kill_idle; read; open; read; stays",
        {"number": 3},
    ),
    # A trial that is due is made by a new connection; a replacement has none to make.
    **{
        f"replacement goes to a closed circuit: {loss}": (
            f"all: request_ends; open_another; idle 100; note; {loss}; read; left; another_is_open",
            {"number": 3},
        )
        for loss in ("kill", "open")
    },
    # It works, and there is no other: it is kept until another comes back.
    "working peer is left for no trial": (
        "all: open_others; open; idle 100; note; read; write one; stays; unconnected; idle; "
        "recover_another; read; left",
        {"number": 3},
    ),
    # The server has answered that it is not ready, where nothing can be mended.
    "dropped connection is left whatever became of its peer": (
        f"mariadb: write zero; {DROP}; circuit open; recover; write two; other; written zero two"
    ),
    "dropped connection is worth a trial": (
        f"mariadb: open_others; idle 100; {DROP}; write one; left; written one"
    ),
    # Rule 2: session state.
    "loss of state is raised, and the next loss mended like any other": (
        "all: HOLD; CUT; !SELECT 42; replayed 0; SELECT 1; CUT; SELECT 42"
    ),
    **{
        f"neither BEGIN nor the first read hides the loss of state: {nth}": (
            f"all: HOLD; CUT {nth}; !{{ read; read }}; replayed 0; replaced 0; {{ write after }}; "
            "written after"
        )
        for nth in (1, 2)
    },
    "block is not begun anew without its state": (
        "all: HOLD; !{ kill_idle; write one }; written; replaced 0"
    ),
    "state made in a block outlives it": "all: { HOLD }; kill; !write one; written",
    "who only asks whether the connection lives is not told of the state's loss": (
        "all: HOLD; kill; unusable; !write one; write two; written two"
    ),
    "block is not begun anew before it asks for what the connection knows": (
        "all: write one; !{ kill_idle; ASK }; replaced 0; SELECT 1"
    ),
    "block is not begun anew before it takes state": (
        "all: write one; !{ kill_idle; LOCK }; replaced 0; SELECT 1"
    ),
    "constraint checks that cannot be switched off are no state": (
        "postgres: unchecked { SELECT 1 }; kill; write one; written one"
    ),
    "block is not begun anew while constraint checks are off": (
        "mariadb: !unchecked { { kill_idle; write one } }; written; replaced 0"
    ),
    "read is not run again while constraint checks are off": (
        "mariadb: !unchecked { CUT; read }; replayed 0"
    ),
    "block is not run again while constraint checks are off": (
        "mariadb: !unchecked { { CUT; read } }; replayed 0"
    ),
    "block is not begun anew while threads share the connection": (
        "all: shared { !{ kill_idle; write one } }; replaced 0; written"
    ),
    "read is not run again while threads share the connection": (
        "all: SELECT 1; shared { CUT; !read }; replayed 0; replaced 0"
    ),
    "block is not run again while threads share the connection": (
        "all: SELECT 1; shared { !{ CUT; read } }; replayed 0; replaced 0"
    ),
    # Rows may lie on the wire.
    "block on an unbuffered connection is not begun anew": (
        "mariadb: !{ kill_idle; write one }; replaced 0; write two; written two",
        {"unbuffered": True},
    ),
    "unbuffered connection is not replaced, and nothing is run again on it": (
        "mariadb: write one; read one; kill_idle; !SELECT 1; SELECT 2; replayed 0",
        {"unbuffered": True},
    ),
    # Rule 3: looks at the socket.
    "executemany finds its connection dead": "all: kill; many one two; written one two",
    "errors that are answers change nothing": (
        "postgres: !SELECT 1 / 0; !SELECT nonesuch; write one; stays; lost 0"
    ),
    # Django's TestCase asks is_usable() after each test; its rollback is then still sent.
    "failed transaction that is asked whether it lives is not lost": (
        "postgres: { write before; undone { !SELECT nonesuch; unusable }; write after }; "
        "written before after"
    ),
    "connection that died after an error that is no answer is replaced": (
        "all: !misuse; kill; write one; written one; replayed 0"
    ),
    # Not looked at, it may have idled until it was cut: no failed connect.
    "connection lost on its first use and not looked at makes its peer suspect": (
        "all: connect; unlooked; cut before; SELECT 1; circuit suspect"
    ),
    "connection found lost before its first use makes its peer suspect": (
        "all: connect; kill; write one; left; circuit suspect"
    ),
    "nothing is sent on a connection that is known to be dead": (
        "all: { kill; unusable; write one; write two }; written one two; replayed 0"
    ),
    "connection that is asked, and well, stays": (
        "all: SELECT 1; usable; circuit closed; write one; stays"
    ),
    "connection that idled in a block, and is well, stays": (
        "all: { idle; write one }; stays; written one"
    ),
    "nothing is lost with an empty block": (
        "all: { hook one; kill }; ran one; write one; written one"
    ),
    # Rule 4: the server answers that it does not serve; one plain statement is run elsewhere.
    "refused statement is run elsewhere": (
        "mysql: SELECT 1; refusing 1047 { write one; write two }; written one two; replayed 1; "
        "circuit open galera"
    ),
    "refused first statement is run elsewhere": (
        "mysql: SELECT 1; refusing 1047 { { write one; write two } }; written one two; "
        "replayed 1; circuit open galera"
    ),
    "refused second statement is raised": (
        "mysql: refusing 1047 { !{ write well; write one }; write two }; written two; replayed 0"
    ),
    # Good connects would reset any count.
    "refusal opens the circuit at once, whatever fail_max says": (
        "mariadb: refusing 1047 { write one }; circuit open; written one",
        {"BREAKER": {"fail_max": 5}},
    ),
    "1180 proves nothing": (
        "mysql: refusing 1180 { !write one; circuit open; write two }; left; written two; "
        "replayed 0"
    ),
    "1180 proves nothing in a block": (
        "mysql: refusing 1180 { !{ write one }; circuit open; write two }; left; written two; "
        "replayed 0"
    ),
    # Its rows are sent one by one, and some of them stand.
    "refused executemany is raised": (
        "mysql: refusing 1047 { !one_by_one well one }; written well; replayed 0"
    ),
    # One 2006 can be a packet over max_allowed_packet: nothing so large is sent twice.
    "refused statement that is too large is raised": (
        "mysql: refusing 1047 { !large }; written; replayed 0"
    ),
    "refused statement is raised with REPLAY None": (
        "mariadb: refusing 1047 { !write one; write two }; written two",
        {"REPLAY": None},
    ),
    "refused block is raised with REPLAY None": (
        "mariadb: refusing 1047 { !{ write one }; write two }; written two",
        {"REPLAY": None},
    ),
    # What was ended on purpose, what met another, what was too much: no peer's fault.
    **{
        f"{errno} says nothing of the peer": (
            f"mysql: refusing {errno} {{ !write one }}; circuit closed; write two; {after}; "
            "written two; replayed 0"
        )
        for errno, after in ((1927, "other"), (1317, "stays"), (1205, "stays"), (1226, "stays"))
    },
    "first write that was never sent is sent elsewhere": (
        "mysql: SELECT 1; { cut_idle; write one; write two }; written one two; replayed 1",
        RESET,
    ),
    "second write that was never sent is raised": (
        "mysql: SELECT 1; !{ write one; cut_idle; write two }; written; replayed 0",
        RESET,
    ),
    **{
        f"of what was never sent one plain statement alone is sent again: {statement}": (
            f"mysql: SELECT 1; unlooked; cut_idle; {statement}",
            RESET,
        )
        for statement in (
            "write one; written one; replayed 1",
            "!call nonesuch; written; replayed 0",
            "!many one two; written; replayed 0",
        )
    },
    # Rule 7: the first statement of a transaction.
    "loss is raised once where no peer is left to begin a block anew": (
        "all: SELECT 1; CUT 2; !{ refuse; read }; replayed 0; forward; idle 100; { write one }; "
        "written one"
    ),
    "block that a peer which is not ready does not begin is begun elsewhere": (
        "mariadb: no_autocommit 0 1047 { { write one } }; left; written one"
    ),
    "block that a server does not begin is raised": (
        "mariadb: no_autocommit 0 1105 { !{ write one } }; stays; written"
    ),
    # The connection lives, and would go on without autocommit.
    "block that is not left on a connection that lives is raised": (
        "mariadb: no_autocommit 1 1105 { !{ write one } }; connect; written one"
    ),
    # Found dead before its DECLARE is sent.
    "block is begun anew before a named cursor": (
        "postgres: write one; { kill_idle; named; write two }; written one two; replaced 1; "
        "replayed 0"
    ),
    "named cursor is a block's first statement": (
        "postgres: write one; !{ named FOR UPDATE; cut after; read }; replayed 0"
    ),
    "named cursor is opened on a new connection": (
        "postgres: write one; kill_idle; named; replaced 1; replayed 0"
    ),
    # Django's way out of a block would connect anew, to raise another error than the first.
    "leaving a lost block connects nowhere": (
        "all: SELECT 1; CUT 3; note; refuse; !{ write one; write two }; unconnected; forward; "
        "write three; written three"
    ),
    "read that locks is run again as a block's first": (
        "all: write one; CUT 2; { SELECT value FROM app_token FOR UPDATE; write two }; "
        "written one two; replayed 1"
    ),
    # What an unknown function did outside of the transaction is not taken back.
    "first write of an unknown function is raised": (
        "postgres: SELECT 1; !{ CUT; INSERT INTO app_token (value) VALUES (quote_literal('a')) }; "
        "written; replayed 0"
    ),
    "first write that is too large is raised": (
        "postgres: SELECT 1; !{ CUT; large }; written; replayed 0"
    ),
    "savepoints of a block begun anew are kept apart": (
        "all: SELECT 1; CUT 3; { { read; write one; undone { hook never; write never }; "
        "hook once }; undone { write nor } }; replayed 1; written one; ran once"
    ),
    "nothing is run again in a block that has seen an error": (
        "all: write one; !{ !{ SELECT nonesuch FROM app_token }; CUT; read }; replayed 0; "
        "replaced 0; read one"
    ),
    "block that has seen an error is not begun anew": (
        "all: write one; !{ !{ SELECT nonesuch FROM app_token }; kill_idle; read }; replayed 0; "
        "replaced 0; read one"
    ),
    **{
        f"block begun anew can be rolled back: {loss} {then}": (
            f"all: SELECT 1; {loss}; undone {{ {then}; write one; replaced 1 }}; written; "
            "write two; written two"
        )
        for loss, then in (("CUT 1", "read"), ("CUT 2", "read"), ("idle 0", "kill_idle"))
    },
}


@told(STORIES)
def test_story(request: Any, server: str, settings: dict[str, Any], text: str) -> None:
    tell(request, server, settings, text)


@pytest.fixture(params=KINDS)
def three(request: Any, fault_proxy: Any) -> Iterator[Site]:
    """A balancer with a third peer."""
    with site(request.getfixturevalue(request.param), fault_proxy, number=3) as made:
        yield made


def others(here: Site) -> list[Any]:
    return [peer for peer in here.balancer.peers.values() if peer is not here.connection.peer]


class TestReplacements:
    def test_makes_a_trial_when_nothing_else_is_left(self, three: Site) -> None:
        due, closed = others(three)
        due.breaker.open()
        three.idle(100)
        closed.breaker.open()
        three.kill()
        three.connection.peer.breaker.open()
        three.write("one")
        assert three.connection.peer is due
        assert due.breaker.current_state == "closed"

    def test_optional_one_connects_before_it_closes(self, here: Site, receive: Any) -> None:
        old = here.connection.connection
        answers: list[Any] = []

        def ask(connection: Any, **_: Any) -> None:
            if connection is here.connection:
                with contextlib.closing(old.cursor()) as cursor:
                    cursor.execute("SELECT 7")
                    answers.append(cursor.fetchone()[0])

        receive(connection_created, ask)
        here.connection.peer.breaker.open()
        here.read()
        assert here.connection.connection is not old
        assert answers == [7]
        here.settle()
        assert here.sessions() == 1

    def test_optional_one_is_tried_once(self, here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where it fails the old connection is kept, and asked no more until a circuit changes."""
        before, (other,) = here.connection.connection, others(here)
        connect, tries = here.connection.Database.connect, []

        def full(**params: Any) -> Any:
            tries.append(params)
            raise here.connection.Database.OperationalError(
                *((1040, "Too many connections") if here.is_mysql else ("sorry, too many clients",))
            )

        monkeypatch.setattr(here.connection.Database, "connect", full)
        here.connection.peer.breaker.open()
        for _ in range(3):
            here.read()
        assert len(tries) == 1
        assert here.connection.connection is before
        monkeypatch.setattr(here.connection.Database, "connect", connect)
        other.breaker.open()
        other.breaker.close()
        here.read()
        assert here.connection.peer is other

    def test_cursors_follow(self, here: Site) -> None:
        """Another cursor's replacement takes this one along: it sends nothing to a dead server."""
        with here.connection.cursor() as first, here.connection.cursor() as second:
            first.execute("SELECT 1")
            here.kill()
            second.execute("INSERT INTO app_token (value) VALUES ('one')")
            first.execute("SELECT value FROM app_token")
            assert [row[0] for row in first.fetchall()] == ["one"]
        assert len(here.replaced()) == 1
        assert not here.replayed()


class TestSessionState:
    def test_open_named_cursor(self, on_postgres: Site) -> None:
        """What it has still to read is lost: nothing else may hide that."""
        here = on_postgres
        for value in ("one", "two"):
            here.write(value)
        close_old_connections()
        with here.connection.chunked_cursor() as rows:
            rows.execute("SELECT value FROM app_token ORDER BY id")
            here.cut("after")
            with pytest.raises(OperationalError):
                here.sql("SELECT 42")
            assert not here.replayed()


class TestLooks:
    def test_no_descriptor_after_an_error(
        self, here: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It goes on being a number, and the next connection's, perhaps."""
        driver = here.connection._driver
        asked: list[Any] = []
        fileno = driver.fileno

        def noted(connection: Any) -> Any:
            asked.append(connection)
            return fileno(connection)

        monkeypatch.setattr(driver, "fileno", noted)
        for lose in (here.write, here.read):
            here.sql("SELECT 1")
            lost, session = here.connection.connection, here.session
            here.cut("after")
            asked.clear()
            with contextlib.suppress(OperationalError):
                lose(*(["one"] if lose == here.write else []))
            here.write(f"after {lose.__name__}")
            here.idle()
            here.read()
            assert session.poll is None
            assert lost not in asked

    def test_error_that_is_no_answer(self, here: Site) -> None:
        """The driver complains of its own: the next look is a ping, and then all is as before."""
        before = here.connection.connection
        with pytest.raises(Error):
            here.sql("SELECT %s, %s", [1])
        assert here.session.unsure
        assert here.session.poll is None
        here.write("one")
        assert here.connection.connection is before
        assert not here.session.unsure
        assert here.session.poll is not None
        assert not here.losses()

    @pytest.mark.parametrize("code", [2014, 1105])
    def test_ping_that_fails_on_a_connection_that_lives(
        self, on_mariadb: Site, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        """Unread results, or an answer: no loss."""
        here = on_mariadb
        before = here.connection.connection
        error = here.connection.Database.ProgrammingError(code, "as the driver says")
        here.session.poll = lambda timeout: [(before.fileno(), select.POLLIN)]
        with monkeypatch.context() as patched:
            patched.setattr(here.connection._driver, "ping", raising(error))
            here.write("one")
        assert here.connection.connection is before
        assert bool(here.session.holds) is (code == 2014)
        assert not here.losses()


class TestProvenNotToHaveRun:
    """The server answers that it does not serve; it takes one plain statement to believe it."""

    @pytest.fixture(params=["mariadb", "mariadb_tls"])
    def mysql(self, request: Any, fault_proxy: Any) -> Iterator[Site]:
        with site(request.getfixturevalue(request.param), fault_proxy) as made:
            made.sql("SELECT 1")
            yield made

    @pytest.mark.parametrize(
        "statement",
        [
            "CALL write_two()",
            "INSERT INTO app_token (value) VALUES ('well'); INSERT INTO app_token (value)"
            " VALUES ('one')",
            "INSERT INTO app_token (value) VALUES (refused('one'))",
            "SELECT refused('one')",
        ],
    )
    def test_not_plain(self, mysql: Site, statement: str) -> None:
        """A part of it may stand: with CALL, and with more than one statement, it did."""
        run = functools.partial(mysql.server.sql, database=DATABASE)
        run(
            "CREATE OR REPLACE PROCEDURE write_two() BEGIN"
            " INSERT INTO app_token (value) VALUES ('well');"
            " INSERT INTO app_token (value) VALUES ('one'); END"
        )
        run(
            "CREATE OR REPLACE FUNCTION refused(v VARCHAR(20)) RETURNS VARCHAR(20) BEGIN"
            f" SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1047, MESSAGE_TEXT = '{WSREP}';"
            " RETURN v; END"
        )
        mysql.server.sql("GRANT EXECUTE ON *.* TO 'app'@'%'")
        old = mysql.connection.peer
        with refusing(mysql, 1047, WSREP):
            with pytest.raises(Error), mysql.connection.cursor() as cursor:
                cursor.execute(statement)
                while cursor.nextset():
                    pass
            stood = mysql.plain_rows()
            assert old.breaker.current_state == "open"
            assert not mysql.replayed()
            # Whatever it left in the session has gone: that was said by the error.
            close_old_connections()
            mysql.write("after")
        assert mysql.written() == [*stood, "after"]
        assert "one" not in stood


class TestTransactions:
    @pytest.mark.parametrize("kind", CUTS)
    def test_restart_keeps_the_block(self, here: Site, kind: str) -> None:
        """Django's connect() clears what a block is made of; a restart has it stand."""
        connection = here.connection
        ran: list[str] = []
        here.sql("SELECT 1")
        here.cut(kind, 2)
        with transaction.atomic(connection.alias):
            transaction.on_commit(lambda: ran.append("outer"), connection.alias)
            with transaction.atomic(connection.alias, savepoint=False):
                transaction.on_commit(lambda: ran.append("inner"), connection.alias)
                blocks = list(getattr(connection, "atomic_blocks", ()))
                assert here.read() == []
                assert here.replayed()
                assert connection.in_atomic_block
                assert not connection.commit_on_exit or connection.savepoint_ids
                assert list(getattr(connection, "atomic_blocks", ())) == blocks
                here.write("one")
            assert ran == []
        assert ran == ["outer", "inner"]
        assert here.written() == ["one"]
        assert connection.get_autocommit()
        assert connection.run_on_commit == []

    @pytest.mark.parametrize("number", [1, 2])
    def test_leaving_is_refused(self, mariadb: Any, fault_proxy: Any, number: int) -> None:
        """COMMIT was answered: no error. But that connection stays without autocommit."""
        with site(mariadb, fault_proxy, number=number) as here:
            ran: list[int] = []
            here.sql("SELECT 1")
            with no_autocommit(here, 1, 1053):
                with transaction.atomic(here.connection.alias):
                    transaction.on_commit(lambda: ran.append(1), here.connection.alias)
                    here.write("one")
                assert ran == [1]
            done = []
            with contextlib.suppress(OperationalError):
                here.write("two")
                done.append("two")
            here.connection.close()
            here.idle(100)
            here.write("three")
            assert here.written() == ["one", *done, "three"]
            assert done == ["two"] * (number - 1)


class TestCommit:
    """What the answer to COMMIT leaves open, and what it does not."""

    @pytest.mark.parametrize(
        ("errno", "text", "unknown"),
        [
            (1180, "Got error 6 during COMMIT: Not connected to Primary Component", True),
            (1180, "Got error 28 during COMMIT", True),
            (9001, "Max connect timeout reached while reaching hostgroup 0", True),
            (1047, WSREP, False),
            (1290, "running with the --read-only option", False),
            (1836, "Running in read-only mode", False),
            (1213, "Deadlock found", False),
            (2006, "Server has gone away", False),
            (2013, "Lost connection", True),
        ],
    )
    def test_on_mysql(
        self,
        on_mariadb: Site,
        monkeypatch: pytest.MonkeyPatch,
        errno: int,
        text: str,
        unknown: bool,
    ) -> None:
        here = on_mariadb
        runs: list[int] = []
        here.sql("SELECT 1")

        def work() -> None:
            runs.append(1)
            here.write("one")
            error = here.connection.Database.OperationalError(errno, text)
            # The server undoes what is not known to be done: here, all of it.
            monkeypatch.setattr(type(here.connection.connection), "commit", raising(error))

        with pytest.raises(OperationalError) as caught:
            retrying_atomic(here.connection.alias, attempts=2)(work)()
        assert isinstance(caught.value, CommitOutcomeUnknown) is unknown
        assert caught.value.args == (errno, text)
        assert len(runs) == (2 if errno in (1213, 1047, 2006) else 1)

    def test_constraint(self, on_postgres: Site) -> None:
        """A deferred constraint fails at COMMIT: an answer, and a plain one."""
        here = on_postgres
        here.server.sql(
            "CREATE TABLE IF NOT EXISTS deferred (id int UNIQUE DEFERRABLE INITIALLY DEFERRED);"
            "GRANT ALL ON deferred TO app",
            database=DATABASE,
        )
        with pytest.raises(IntegrityError), transaction.atomic(here.connection.alias):
            here.write("one")
            here.sql("INSERT INTO deferred VALUES (1), (1)")
        assert here.written() == []


def raising(error: BaseException) -> Any:
    def method(*args: Any) -> None:
        raise error

    return method


class TestRetryingAtomic:
    def test_a_peer_that_is_not_ready(self, on_mariadb: Site) -> None:
        """Its answer came before COMMIT: nothing stands, and another peer may do it."""
        with refusing(on_mariadb, 1047, WSREP):
            assert attempts(on_mariadb, *["write well; write one"] * 2) == 2
        assert on_mariadb.written() == ["well", "one"]

    def test_found_lost_after_a_long_time(self, here: Site) -> None:
        """What is found before COMMIT is no time-out, however long the function took."""
        assert attempts(here, "write one; idle 1000; kill", "write one") == 2
        assert here.written() == ["one"]

    def test_after_a_time_out(self, mariadb: Any, fault_proxy: Any) -> None:
        """The server may be at it still: the block is not run again."""
        with site(mariadb, fault_proxy, OPTIONS={"read_timeout": 1}) as here:
            here.sql("SELECT 1")
            proxy = here.here
            with pytest.raises(OperationalError):
                attempts(here, "write one; freeze; running { write two }")
            proxy.thaw()
            assert not here.replayed()
            assert here.written() == []

    def test_a_hook_after_nothing(self, here: Site) -> None:
        """The transaction of a hook is its own, where the function's had nothing in it, too."""
        runs: list[int] = []
        alias = here.connection.alias

        def hook() -> None:
            raise OperationalError from here.connection.Database.OperationalError(
                *((1213, "Deadlock") if here.is_mysql else ())
            )

        def work() -> None:
            runs.append(1)
            transaction.on_commit(hook, alias)
            here.kill()

        with pytest.raises(OperationalError):
            retrying_atomic(alias)(work)()
        assert runs == [1]

    def test_while_autocommit_is_off(self, here: Site) -> None:
        """What was done before it in a transaction by hand would be lost without a word."""
        runs: list[int] = []
        here.connection.set_autocommit(False)
        here.write("one")
        with pytest.raises(TransactionManagementError, match="autocommit is off"):
            retrying_atomic(here.connection.alias)(lambda: runs.append(1))()
        assert runs == []
        here.connection.commit()
        here.connection.set_autocommit(True)
        assert here.written() == ["one"]

    def test_another_exception(self, here: Site) -> None:
        """Not the database's any longer: the function has dealt with it."""
        runs: list[int] = []

        def work() -> None:
            runs.append(1)
            code = (1213,) if here.is_mysql else ()
            raise KeyError from here.connection.Database.OperationalError(*code)

        with pytest.raises(KeyError):
            retrying_atomic(here.connection.alias)(work)()
        assert runs == [1]


class TestOwnWritesOnGalera:
    @pytest.mark.parametrize("wrote", [True, False])
    def test_forced_replacement(self, galera: Any, fault_proxy: Any, wrote: bool) -> None:
        """After a write the next node catches up first, and has its setting back."""
        proxies = {proxy.port: proxy for proxy in map(fault_proxy, galera)}
        with engine(
            [mysql_peer(proxy) for proxy in proxies.values()],
            clock=Clock(),
            CONN_MAX_AGE=None,
            OPTIONS={"init_command": "SET SESSION wsrep_sync_wait = 6"},
        ) as connection:
            with_table(connection)
            close_old_connections()
            with connection.cursor() as cursor:
                if wrote:
                    cursor.execute("INSERT INTO app_token (value) VALUES ('one')")
                old = connection.peer
                proxies[int(old.address.rpartition(":")[2])].drop_connections()
                until_seen(connection.connection)
                cursor.execute("UPDATE app_token SET value = 'two'")
                assert cursor.rowcount == wrote
                assert connection.peer is not old
                packets = proxies[int(connection.peer.address.rpartition(":")[2])].packets
                waits = [packet for packet in packets if b"wsrep_sync_wait = 1" in packet]
                assert len(waits) == wrote
                cursor.execute("SELECT @@wsrep_sync_wait")
                assert cursor.fetchone() == (6,)
