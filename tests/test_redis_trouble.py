"""A Redis that is of no use says what is wrong, in each place, and never the password."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Iterator

import pytest
import redis.exceptions

from django_proxysql.core import sharing
from django_proxysql.core.sharing.link import NO_ANSWER, Trouble, trouble_from
from tests.servers.ports import ports
from tests.servers.redis import RedisServer
from tests.test_sharing import World

pytestmark = pytest.mark.usefixtures("patient_with_redis")

SECRET = "s3cr3t-of-redis"

errors = redis.exceptions
NO_PASSWORD: dict[str, object] = {"password": None}
TLS: dict[str, object] = {"connection_class": redis.SSLConnection}


def connecting(cause: BaseException) -> BaseException:
    """Return what redis-py raises where it cannot connect."""
    error = errors.ConnectionError("Error 1 connecting to h:1.")
    error.__cause__ = cause
    return error


#: What redis-py raises, with what is known besides, and what is said of it.
CASES: list[tuple[BaseException, dict[str, object], str]] = [
    (errors.MovedError("3999 10.0.0.2:6379"), {}, "is a Redis Cluster, which"),
    (errors.ResponseError("unknown command 'EVALSHA', with args"), {}, "runs no scripts, as a"),
    (errors.AuthenticationError("user is disabled."), {}, "refused our password; see SHARED_STATE"),
    (errors.ResponseError("WRONGPASS pair"), {}, "refused our password; see SHARED_STATE"),
    (errors.AuthenticationError("Required."), NO_PASSWORD, "refused our password, for SHARED_"),
    (errors.AuthenticationError("HELLO must be"), NO_PASSWORD, "refused our password, for SHARED_"),
    (errors.NoPermissionError("to run 'evalsha'"), {}, "does not let our user run its scripts"),
    (errors.ResponseError("NOPERM this user"), {}, "does not let our user run its scripts"),
    (errors.ResponseError("DB index is out of range"), {"db": 99}, "has no database 99; see"),
    (errors.ResponseError("unknown command 'HELLO', with"), {}, "is older than Redis 6, which"),
    (connecting(ssl.SSLCertVerificationError("failed")), TLS, "shows a TLS certificate that"),
    (connecting(ssl.SSLError("[SSL: WRONG_VERSION_NUMBER]")), TLS, "does not speak TLS as rediss"),
    (connecting(TimeoutError("The handshake operation")), TLS, "does not speak TLS as rediss"),
    (errors.ConnectionError("Connection closed by server."), {}, "ends connections at once; a"),
    (errors.ConnectionError("Connection closed by server."), TLS, "does not answer"),
    (
        errors.ConnectionError("Connection closed by server."),
        {"was_answered": True},
        "does not answer",
    ),
    (connecting(socket.gaierror(-2, "not known")), {}, "has a host name that cannot be resolved"),
    (connecting(FileNotFoundError(2, "No such")), {}, "cannot be connected to: a file that"),
    (connecting(ConnectionRefusedError(111)), {}, "does not answer"),
    (errors.TimeoutError("Timeout reading from socket"), {}, "does not answer"),
    (errors.InvalidResponse("Protocol Error: b'J'"), {}, "answers as no Redis does"),
    (errors.ResponseError("OOM command not allowed"), {}, "refused a command"),
    (ValueError("what no one thought of"), {}, "does not answer"),
]


@pytest.mark.parametrize(("error", "known", "says"), CASES, ids=[case[2] for case in CASES])
def test_what_an_error_says(error: BaseException, known: dict[str, object], says: str) -> None:
    """Each error of redis-py's is said in words that name the setting, with its own text."""
    options = {"password": SECRET, **known}
    was_answered = bool(options.pop("was_answered", False))
    trouble = trouble_from(error, options, was_answered=was_answered)
    assert trouble.says.startswith(says)
    assert str(error).strip() in str(trouble)
    assert str(trouble).startswith(f"it {says}")


def test_ring_of_causes() -> None:
    """Errors that are each other's causes are looked at once."""
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert trouble_from(one, {}, was_answered=False).says == NO_ANSWER.says


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """One server, with a password, ACL users and a port for TLS."""
    with RedisServer(options=["--rename-command", "HELLO", ""], tls=True) as server:
        server.ask("ACL", "SETUSER", "weak", "on", ">pw", "~*", "+ping", "+select", "+client")
        server.ask("ACL", "SETUSER", "shop", "on", ">right", "~*", "+@all")
        server.ask("ACL", "SETUSER", "default", "-@all", "+ping", "+acl", "+shutdown")
        yield server


class TestRealRedis:
    """What a real server answers, by the real redis-py."""

    @pytest.mark.parametrize(
        ("url", "says"),
        [
            ("redis://shop:{secret}@{host}:{port}/0", "refused our password; see SHARED_STATE"),
            ("redis://weak:pw@{host}:{port}/0", "does not let our user run its scripts; see"),
            ("redis://shop:right@{host}:{port}/99?protocol=2", "has no database 99; see SHARED_"),
            ("redis://shop:right@{host}:{port}/0?protocol=3", "is older than Redis 6"),
            ("redis://shop:{secret}@{host}:{tls}/0", "ends connections at once; a port for TLS"),
            ("rediss://shop:{secret}@{host}:{tls}/0", "shows a TLS certificate that is not trus"),
            ("rediss://shop:{secret}@{host}:{port}/0", "does not speak TLS as rediss:// in SHAR"),
            ("redis://shop:{secret}@no-such-host.invalid/0", "has a host name that cannot be re"),
            ("unix://shop:{secret}@/no/such/redis.sock", "cannot be connected to: a file that SH"),
            ("redis://shop:{secret}@{host}:1/0", "does not answer"),
        ],
    )
    def test_said(
        self,
        server: RedisServer,
        url: str,
        says: str,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The line says what is wrong, once, and so does what operators ask; without a secret."""
        if says.startswith("does not speak TLS"):
            # It waits for an answer that does not come.
            monkeypatch.setattr(sharing.url, "TIMEOUT", 0.25)
        where = {"host": server.host, "port": server.port, "tls": server.tls_port}
        world = World(url.format(secret=SECRET, **where))
        one = world.process()
        for _ in range(3):
            world.clock.advance(2)
            one.step()
        (line,) = caplog.messages
        assert f"is of no use: it {says}" in line
        assert one.sharing.trouble.startswith(says)
        assert one.connect() == "db1"
        for text in (line, one.sharing.trouble, repr(one.link.trouble)):
            assert SECRET not in text

    def test_redis_older_than_6(self, server: RedisServer) -> None:
        """A server that does not know HELLO is used, whatever redis-py speaks by itself."""
        one = World(f"redis://shop:right@{server.host}:{server.port}/0").process()
        assert one.sharing.is_answered
        assert one.link.trouble is None


def test_redis_cluster_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """A node of a Redis Cluster looks like a Redis until it answers."""
    server = RedisServer()
    # Redis would take the port 10,000 above its own, which may be anyone's.
    bus = ports.reserve()
    server.options += ["--cluster-enabled", "yes", "--cluster-port", str(bus)]
    try:
        with server:
            one = World(server.url).process()
            trouble = one.sharing.trouble
            assert trouble.startswith("is a Redis Cluster, which SHARED_STATE cannot use")
            assert one.connect() == "db1"
    finally:
        ports.release(bus)


def test_another_trouble_is_said_too(caplog: pytest.LogCaptureFixture) -> None:
    """What is wrong next is said although the first trouble has not ended; each kind once."""
    caplog.set_level(logging.INFO, "django_proxysql")
    world = World("redis://127.0.0.1:1/0")
    link = world.process().link
    caplog.clear()
    for says in ("does not answer", "refused our password", "does not answer", "has no database"):
        link._of_no_use(world.clock(), Trouble(says))
    assert [line.partition("of no use: it ")[2].partition(".")[0] for line in caplog.messages] == [
        "refused our password",
        "has no database",
    ]


def test_password_in_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """Should an error quote the password, it stays hidden."""
    world = World(f"redis://:{SECRET}@127.0.0.1:1/0")
    link = world.process().link
    link._of_no_use(world.clock(), Trouble("refused a command", f"AUTH {SECRET} is wrong"))
    assert "AUTH … is wrong" in caplog.messages[-1]
    assert SECRET not in caplog.text + repr(link.trouble)
