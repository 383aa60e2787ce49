"""A Redis that is of no use says what is wrong, in each place, and never the password."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Iterator

import pytest
import redis.exceptions

from django_proxysql.core.sharing.trouble import NO_ANSWER, Trouble, trouble_from
from tests.servers.ports import ports
from tests.servers.redis import RedisServer
from tests.test_sharing import World

SECRET = "s3cr3t-of-redis"


def caused_by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


#: What redis-py raises, with what is known besides, and what is said of it.
CASES: list[tuple[BaseException, dict[str, object], str]] = [
    (
        redis.exceptions.MovedError("3999 10.0.0.2:6379"),
        {},
        "is a Redis Cluster, which SHARED_STATE cannot use",
    ),
    (
        redis.exceptions.ResponseError("unknown command 'EVALSHA', with args beginning with: "),
        {},
        "runs no scripts, as a Redis Sentinel does not; see SHARED_STATE",
    ),
    (
        redis.exceptions.AuthenticationError("invalid username-password pair or user is disabled."),
        {},
        "refused our password; see SHARED_STATE",
    ),
    (
        redis.exceptions.ResponseError("WRONGPASS invalid username-password pair"),
        {},
        "refused our password; see SHARED_STATE",
    ),
    (
        redis.exceptions.AuthenticationError("Authentication required."),
        {"password": None},
        "refused our password, for SHARED_STATE has none; see SHARED_STATE",
    ),
    (
        redis.exceptions.AuthenticationError(
            "HELLO must be called with the client already authenticated"
        ),
        {"password": None},
        "refused our password, for SHARED_STATE has none; see SHARED_STATE",
    ),
    (
        redis.exceptions.NoPermissionError("this user has no permissions to run 'evalsha'"),
        {},
        "does not let our user run its scripts; see SHARED_STATE, and the user's ACL",
    ),
    (
        redis.exceptions.ResponseError("NOPERM this user has no permissions"),
        {},
        "does not let our user run its scripts; see SHARED_STATE, and the user's ACL",
    ),
    (
        redis.exceptions.ResponseError("DB index is out of range"),
        {"db": 99},
        "has no database 99; see SHARED_STATE",
    ),
    (
        redis.exceptions.ResponseError("unknown command 'HELLO', with args beginning with: '3' "),
        {},
        "is older than Redis 6, which protocol=3 takes; see SHARED_STATE: protocol=2 is the "
        "default",
    ),
    (
        caused_by(
            redis.exceptions.ConnectionError("Error 1 connecting to h:1."),
            ssl.SSLCertVerificationError("certificate verify failed"),
        ),
        {"connection_class": redis.SSLConnection},
        "shows a TLS certificate that is not trusted; see ssl_ca_certs in SHARED_STATE",
    ),
    (
        caused_by(
            redis.exceptions.ConnectionError("Error 1 connecting to h:1."),
            ssl.SSLError("[SSL: WRONG_VERSION_NUMBER] wrong version number"),
        ),
        {"connection_class": redis.SSLConnection},
        "does not speak TLS as rediss:// in SHARED_STATE demands",
    ),
    (
        caused_by(
            redis.exceptions.TimeoutError("Timeout connecting to server"),
            TimeoutError("_ssl.c:989: The handshake operation timed out"),
        ),
        {"connection_class": redis.SSLConnection},
        "does not speak TLS as rediss:// in SHARED_STATE demands",
    ),
    (
        redis.exceptions.ConnectionError("Connection closed by server."),
        {},
        "ends connections at once; a port for TLS does so: then SHARED_STATE is rediss://…",
    ),
    (
        redis.exceptions.ConnectionError("Connection closed by server."),
        {"was_answered": True},
        "does not answer",
    ),
    (
        caused_by(
            redis.exceptions.ConnectionError("Error -2 connecting to nowhere:6379."),
            socket.gaierror(-2, "Name or service not known"),
        ),
        {},
        "has a host name that cannot be resolved; see SHARED_STATE",
    ),
    (
        caused_by(redis.exceptions.ConnectionError("Error 2."), FileNotFoundError(2, "No such")),
        {},
        "cannot be connected to: a file that SHARED_STATE names does not exist",
    ),
    (
        caused_by(redis.exceptions.ConnectionError("Error 111."), ConnectionRefusedError(111)),
        {},
        "does not answer",
    ),
    (redis.exceptions.TimeoutError("Timeout reading from socket"), {}, "does not answer"),
    (redis.exceptions.InvalidResponse("Protocol Error: b'J'"), {}, "answers as no Redis does"),
    (redis.exceptions.ResponseError("OOM command not allowed"), {}, "refused a command"),
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
def urls() -> Iterator[dict[str, str]]:
    """One server, with a password, an ACL user and a port for TLS."""
    server = RedisServer(options=["--rename-command", "HELLO", ""], tls=True)
    with server:
        server.ask("ACL", "SETUSER", "weak", "on", ">pw", "~*", "+ping", "+select", "+client")
        server.ask("ACL", "SETUSER", "shop", "on", ">right", "~*", "+@all")
        server.ask("ACL", "SETUSER", "default", "-@all", "+ping", "+acl", "+shutdown")
        host, port, secure = server.host, server.port, server.tls_port
        yield {
            "WRONGPASS": f"redis://shop:{SECRET}@{host}:{port}/0",
            "NOPERM": f"redis://weak:pw@{host}:{port}/0",
            "database": f"redis://shop:right@{host}:{port}/99?protocol=2",
            "HELLO": f"redis://shop:right@{host}:{port}/0?protocol=3",
            "good": f"redis://shop:right@{host}:{port}/0",
            "to TLS": f"redis://shop:{SECRET}@{host}:{secure}/0",
            "untrusted": f"rediss://shop:{SECRET}@{host}:{secure}/0",
            "no TLS": f"rediss://shop:{SECRET}@{host}:{port}/0",
            "no host": f"redis://shop:{SECRET}@no-such-host.invalid/0",
            "no file": f"unix://shop:{SECRET}@/no/such/redis.sock",
            "nothing": f"redis://shop:{SECRET}@{host}:1/0",
        }


class TestRealRedis:
    """What a real server answers, by the real redis-py."""

    @pytest.mark.parametrize(
        ("kind", "says"),
        {
            "WRONGPASS": "refused our password; see SHARED_STATE",
            "NOPERM": "does not let our user run its scripts; see SHARED_STATE",
            "database": "has no database 99; see SHARED_STATE",
            "HELLO": "is older than Redis 6",
            "to TLS": "ends connections at once; a port for TLS does so",
            "untrusted": "shows a TLS certificate that is not trusted",
            "no TLS": "does not speak TLS as rediss:// in SHARED_STATE demands",
            "no host": "has a host name that cannot be resolved; see SHARED_STATE",
            "no file": "cannot be connected to: a file that SHARED_STATE names does not exist",
            "nothing": "does not answer",
        }.items(),
    )
    def test_said(
        self, urls: dict[str, str], kind: str, says: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The line says what is wrong, once, and so does what operators ask; without a secret."""
        world = World(urls[kind])
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

    def test_redis_older_than_6(self, urls: dict[str, str]) -> None:
        """A server that does not know HELLO is used, whatever redis-py speaks by itself."""
        one = World(urls["good"]).process()
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
