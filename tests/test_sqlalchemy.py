"""``db.sqlalchemy_engine(url)``: what SQLAlchemy promises of lost connections, and of its ORM.

The promises are those of its documentation, "Dealing with Disconnects". They hold with 1.4, too.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import exc, orm

from django_proxysql import Fault, LoadBalancer, NoPeerAvailable
from django_proxysql.core.exceptions import ConfigError
from tests import test_outside_django as outside
from tests.servers import DATABASE, PASSWORD, USER

DRIVERS = dict(outside.DRIVERS)
if sqlalchemy.__version__.startswith("1."):
    del DRIVERS["psycopg"]
MYSQL_ONLY = pytest.mark.parametrize("driver", ["mysqlclient", "PyMySQL"])


class Site(outside.Site):
    """Two servers, their balancer, and engines over it."""

    def __init__(self, driver: outside.Driver, nodes: Any) -> None:
        super().__init__(driver, nodes)
        self.is_mysql = driver.fixture == "mariadb_pair"
        self.engines: list[Any] = []

    def balancer(self, connect: Any = None, **more: Any) -> LoadBalancer:  # type: ignore[override]
        return super().balancer(more, connect)

    def engine(self, db: LoadBalancer | None = None, url: str = "", **options: Any) -> Any:
        db = self.balancer() if db is None else db
        engine = db.sqlalchemy_engine(url or self.driver.url, **options)
        self.engines.append(engine)
        return engine

    def port_of(self, connection: Any) -> int:
        return int(connection.execute(sqlalchemy.text(self.driver.port)).scalar())

    def end_sessions(self) -> None:
        """Have the servers end all of our sessions."""
        for node in self.nodes.values():
            if self.is_mysql:
                node.kill_connections(USER)
            else:
                node.terminate_connections(USER)

    def close(self) -> None:
        for engine in self.engines:
            engine.dispose()


driver, site = outside.fixtures(Site, DRIVERS)


ONE = sqlalchemy.text("SELECT 1")

Base: Any = orm.declarative_base()


class Thing(Base):
    __tablename__ = "sqlalchemy_thing"
    id = sqlalchemy.Column(sqlalchemy.Integer, primary_key=True, autoincrement=False)
    name = sqlalchemy.Column(sqlalchemy.String(20))


@contextlib.contextmanager
def things(engine: Any) -> Iterator[Any]:
    """A table with one row; yields what makes ORM sessions."""
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    make = orm.sessionmaker(engine)
    with make() as session:
        session.add(Thing(id=1, name="one"))
        session.commit()
    yield make
    Base.metadata.drop_all(engine)


@pytest.mark.server
class TestWhatTheDialectPasses:
    def test_an_update_that_changes_nothing_is_no_stale_row(self, site: Site) -> None:
        """The ORM counts the rows that an UPDATE found, and not those that it changed."""
        del site.nodes["db2"]
        engine = site.engine()
        with things(engine) as make, make() as session:
            thing = session.get(Thing, 1)
            orm.attributes.flag_modified(thing, "name")
            session.commit()
            assert session.get(Thing, 1).name == "one"

    @MYSQL_ONLY
    @pytest.mark.parametrize("given", [True, False])
    def test_client_flags_of_a_peer_are_added(self, site: Site, given: bool) -> None:
        """A peer's own client_flag leaves the dialect its own."""
        seen: list[int] = []

        def connect(**kwargs: Any) -> Any:
            seen.append(kwargs["client_flag"])
            return site.driver.module.connect(**kwargs)

        more = {"client_flag": 1 << 16} if given else {}
        engine = site.engine(site.balancer(connect, **more))
        with engine.connect() as connection:
            assert connection.execute(ONE).scalar() == 1
        assert seen[0] & 2
        assert bool(seen[0] & (1 << 16)) is given

    @MYSQL_ONLY
    def test_the_url_s_own_arguments(self, site: Site) -> None:
        engine = site.engine(url=site.driver.url + "?charset=latin1")
        with engine.connect() as connection:
            asked = connection.execute(sqlalchemy.text("SELECT @@character_set_client"))
            assert asked.scalar() == "latin1"

    def test_connect_args(self, site: Site) -> None:
        """They reach the balancer's own connect function; a partial may hold more."""
        seen: list[Any] = []

        def connect(*args: Any, **kwargs: Any) -> Any:
            seen.append(kwargs)
            return site.driver.module.connect(*args, **kwargs)

        engine = site.engine(site.balancer(connect), connect_args={"connect_timeout": 7})
        with engine.connect() as connection:
            assert connection.execute(ONE).scalar() == 1
        assert [given["connect_timeout"] for given in seen] == [7]

    @pytest.mark.parametrize("names", [("password", "database"), ("passwd", "db")])
    def test_a_peer_s_own_go_first(self, site: Site, names: tuple[str, str]) -> None:
        """Of what both say, by whichever of a driver's names, the peer's is taken."""
        if not site.is_mysql and names[0] == "passwd":
            pytest.skip("libpq has one name for it")
        password, database = names if site.is_mysql else ("password", "dbname")
        node = site.nodes["db1"]
        peer = {"host": node.host, "port": node.port, "user": USER}
        db = LoadBalancer({"db1": {**peer, password: PASSWORD, database: DATABASE}})
        url = site.driver.url + "none:wrong@nowhere.invalid:1/nonesuch"
        with site.engine(db, url=url).connect() as connection:
            assert site.port_of(connection) == node.port

    def test_what_no_peer_says_is_the_url_s(self, site: Site) -> None:
        node = site.nodes["db1"]
        db = LoadBalancer({"db1": {"host": node.host, "port": node.port}})
        url = f"{site.driver.url}{USER}:{PASSWORD}@/{DATABASE}"
        with site.engine(db, url=url).connect() as connection:
            assert site.port_of(connection) == node.port

    def test_a_listener_of_its_own_may_change_them(self, site: Site) -> None:
        """As SQLAlchemy's page on engines says of tokens that are made anew for each connect."""
        node = site.nodes["db1"]
        db = LoadBalancer({"db1": {"host": node.host, "port": node.port}})
        engine = site.engine(db, url=f"{site.driver.url}{USER}@/{DATABASE}")

        @sqlalchemy.event.listens_for(engine, "do_connect")
        def provide_token(dialect: Any, record: Any, args: Any, params: dict[str, Any]) -> None:
            params["password"] = PASSWORD

        with engine.connect() as connection:
            assert site.port_of(connection) == node.port

    def test_trials_that_no_connect_makes_know_what_the_url_says(self, site: Site) -> None:
        """Without it they would be refused, and a peer that is back stay out for good."""
        peers = {name: {"host": node.host, "port": node.port} for name, node in site.nodes.items()}
        db = LoadBalancer(peers, site.driver.module.connect, clock=site.clock)
        engine = site.engine(db, url=f"{site.driver.url}{USER}:{PASSWORD}@/{DATABASE}")
        engine.connect().close()
        # What did not connect is no example.
        wrong = site.engine(db, url=f"{site.driver.url}{USER}:wrong@/{DATABASE}")
        with pytest.raises(exc.DBAPIError):
            wrong.connect()
        db.peers["db1"].breaker.open()
        assert db.try_out("db1", now=True)


@pytest.mark.server
class TestNoPeer:
    def test_is_sqlalchemy_s_own_error(self, site: Site) -> None:
        """Caught as its OperationalError, and as the driver's; what each peer said is in it."""
        engine = site.engine()
        for node in site.nodes.values():
            node.kill()
        with pytest.raises(exc.OperationalError) as caught:
            engine.connect()
        error: Any = caught.value.orig
        assert isinstance(error, NoPeerAvailable)
        assert isinstance(error, site.driver.module.OperationalError)
        assert isinstance(error.__cause__, site.driver.module.Error)
        assert error.balancer == "default"
        assert len(error.peers) == 2
        assert "db1" in str(caught.value)
        assert "db2" in str(caught.value)
        assert PASSWORD not in str(caught.value) + repr(caught.value)
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.peers) == (NoPeerAvailable, error.peers)

    def test_refused_by_all(self, site: Site) -> None:
        """Where every peer refuses the password it is the driver's own error, as ever."""
        engine = site.engine(site.balancer(password="wrong"))
        with pytest.raises(exc.OperationalError) as caught:
            engine.connect()
        assert not isinstance(caught.value.orig, NoPeerAvailable)
        assert isinstance(caught.value.orig, site.driver.module.OperationalError)


@pytest.mark.server
class TestDisconnects:
    def test_pre_ping_replaces_a_lost_connection(self, site: Site) -> None:
        """Pessimistic: the application does not see that the pooled connections were lost."""
        engine = site.engine(pool_pre_ping=True)
        with engine.connect() as one, engine.connect() as other:
            one.execute(ONE)
            other.execute(ONE)
        site.end_sessions()
        for _ in range(3):
            with engine.connect() as connection:
                assert connection.execute(ONE).scalar() == 1

    def test_pre_ping_leads_away_from_a_dead_peer(self, site: Site) -> None:
        db = site.balancer()
        engine = site.engine(db, pool_pre_ping=True)
        with engine.connect() as one, engine.connect() as other:
            ports = {site.port_of(one), site.port_of(other)}
        assert ports == {node.port for node in site.nodes.values()}
        site.nodes["db1"].kill()
        for _ in range(3):
            with engine.connect() as one, engine.connect() as other:
                assert {site.port_of(one), site.port_of(other)} == {site.nodes["db2"].port}
        assert db.peers["db1"].breaker.circuit.fault is Fault.UNREACHABLE

    def test_without_pre_ping_one_error_says_so(self, site: Site) -> None:
        """Optimistic: the error says that the connection is invalidated; the next one is new."""
        engine = site.engine()
        with engine.connect() as first, engine.connect() as second:
            first.execute(ONE)
            second.execute(ONE)
        site.end_sessions()
        with engine.connect() as connection:
            with pytest.raises(exc.DBAPIError) as caught:
                connection.execute(ONE)
            assert caught.value.connection_invalidated
            assert connection.invalidated
        # All that were pooled at that time are given up with it.
        for _ in range(3):
            with engine.connect() as connection:
                assert connection.execute(ONE).scalar() == 1

    def test_a_disconnect_in_a_transaction(self, site: Site) -> None:
        """The transaction is lost, and has to be ended; afterwards the connection works."""
        engine = site.engine()
        with engine.connect() as connection:
            transaction = connection.begin()
            connection.execute(ONE)
            site.end_sessions()
            with pytest.raises(exc.DBAPIError) as caught:
                connection.execute(ONE)
            assert caught.value.connection_invalidated
            assert transaction.is_active
            with pytest.raises(exc.InvalidRequestError):
                connection.execute(ONE)
            transaction.rollback()
            assert connection.execute(ONE).scalar() == 1

    def test_an_orm_session_in_a_transaction(self, site: Site) -> None:
        """Half of a session's work is never committed."""
        del site.nodes["db2"]
        engine = site.engine()
        with things(engine) as make:
            with make() as session:
                session.add(Thing(id=2, name="two"))
                session.flush()
                site.end_sessions()
                session.add(Thing(id=3, name="three"))
                with pytest.raises(exc.DBAPIError):
                    session.commit()
                session.rollback()
                assert session.query(Thing).count() == 1
            with make() as session:
                assert [thing.name for thing in session.query(Thing)] == ["one"]


@pytest.mark.server
class TestTheBalancer:
    def test_counts_its_connections(self, site: Site) -> None:
        db = site.balancer()
        engine = site.engine(db)
        with engine.connect(), engine.connect():
            assert [state.connections for state in db.snapshot()] == [1, 1]
        engine.dispose()
        assert [state.connections for state in db.snapshot()] == [0, 0]


class TestArguments:
    @pytest.fixture
    def db(self) -> LoadBalancer:
        return LoadBalancer({"db1": {"host": "db1"}})

    @pytest.mark.parametrize("name", ["creator", "pool"])
    def test_that_would_go_past_the_balancer(self, db: LoadBalancer, name: str) -> None:
        with pytest.raises(ConfigError, match=name):
            db.sqlalchemy_engine("mysql+pymysql://", **{name: lambda: None})

    def test_a_driver_for_asyncio(self, db: LoadBalancer) -> None:
        if "psycopg" not in DRIVERS:
            pytest.skip("SQLAlchemy 1.4 has none of those that are installed")
        with pytest.raises(ConfigError, match="asyncio"):
            db.sqlalchemy_engine("postgresql+psycopg_async://")

    def test_others_are_sqlalchemy_s(self, db: LoadBalancer) -> None:
        engine = db.sqlalchemy_engine("mysql+pymysql://", pool_size=3, echo=False)
        assert engine.pool.size() == 3  # type: ignore[attr-defined]
