"""Every public constructor and function says which argument is wrong, and what to give instead."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from queue import Queue
from typing import Any, Callable

import pytest

import django_proxysql
from django_proxysql import (
    AsyncLoadBalancer,
    LoadBalancer,
    NoPeerAvailable,
    PeerBreaker,
    balancers,
    retrying_atomic,
)
from django_proxysql.core.config import BalancerConfig, address_in_words, host_and_port
from django_proxysql.core.exceptions import ConfigError, UnknownPeer
from django_proxysql.core.strategies import Random
from django_proxysql.monitoring.metrics import Metrics
from tests.fakes import Driver, peers, raised_by
from tests.test_balancer import World

SECRET = "s3cr3t-in-a-wrong-place"

#: One of each type that somebody may give by mistake. A password may be in any of them.
WRONG: list[Any] = [
    SECRET,
    SECRET.encode(),
    -1,
    0,
    2.5,
    True,
    float("nan"),
    [{"host": "db1", "password": SECRET}],
    (SECRET,),
    {"password": SECRET},
    {SECRET},
    object(),
    lambda: None,
]

#: What an argument may be of these: what is then no error.
NUMBERS = (0, 2.5)
GOOD: dict[str, tuple[Any, ...]] = {
    "connect": (WRONG[-1],),
    "name": (SECRET,),
    "clock": (WRONG[-1],),
    "jitter": (WRONG[-1],),
    "wait": (WRONG[-1],),
    "stop": (WRONG[-1],),
    "sleep": (WRONG[-1],),
    "wait_for_peer": NUMBERS,
    "ready_check": (WRONG[-1],),
    "last_resort_interval": NUMBERS,
    "check_interval": (2.5,),
    "connect_timeout": (2.5,),
    "trial_timeout": (2.5,),
    "connect_deadline": (2.5,),
}


def is_good(argument: str, value: Any) -> bool:
    return any(value is good for good in GOOD.get(argument, ()))


def connects(face: Any) -> Callable[..., Any]:
    """Return a connect function for one of the two faces."""

    async def connect(**_: Any) -> Any:
        raise AssertionError("nothing connects here")

    return connect if face is AsyncLoadBalancer else Driver().connect


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("argument", parameters(LoadBalancer.__init__))
@pytest.mark.parametrize("face", [LoadBalancer, AsyncLoadBalancer])
def test_wrong_argument_names_itself_and_a_remedy(face: Any, argument: str, value: Any) -> None:
    if is_good(argument, value):
        return
    arguments: dict[str, Any] = {"peers": peers("db1"), "connect": connects(face)}
    arguments[argument] = value
    error = raised_by(lambda: face(**arguments))
    assert isinstance(error, ConfigError), error
    assert isinstance(error, ValueError)
    assert argument in re.sub(r"\W", "_", str(error)).lower()
    assert error.hint
    if argument in ("peers", "shared_state", "connect"):
        assert SECRET not in str(error)


@pytest.mark.parametrize(
    "wrong",
    [
        {"db1": "10.0.0.1"},
        {"db1": None},
        {"db1": ["host"]},
        {1: {"host": "db1"}},
        {"db1": {"host": "db1", "weight": "2"}},
        {"db1": {"host": "db1", "weight": 0}},
        {"db1": {"host": "db1", "priority": 1.5}},
        {"db1": {"host": "db1", "priority": -1}},
        {"db1": {"host": "db1", "breaker": 3}},
        {"db1": {"host": "db1", "check_interval": None}},
        {"db1": {"host": f"mysql://shop:{SECRET}@db1/shop"}},
        {},
    ],
    ids=repr,
)
def test_wrong_argument_of_a_peer_is_named(wrong: Any) -> None:
    error = raised_by(lambda: LoadBalancer(wrong, Driver().connect))
    assert isinstance(error, ConfigError)
    assert error.hint
    assert SECRET not in str(error)


@pytest.mark.parametrize("value", [*WRONG, None, "db9"], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("method", ["pinned", "only", "drain", "undrain", "try_out", "next_trial"])
def test_what_is_no_peer_is_answered_with_all_peers(method: str, value: Any) -> None:
    world = World("db1", "db2")
    other = World("db1").db.peers["db1"]

    def call(value: Any) -> None:
        if method == "pinned":
            with world.db.pinned(value):
                pass
        elif method == "only":
            world.db.connect(only=value)
        else:
            getattr(world.db, method)(value)

    if value is None and method in ("pinned", "only"):
        call(value)
        return
    for wrong in (value, other):
        error = raised_by(lambda wrong=wrong: call(wrong))  # type: ignore[misc]
        assert isinstance(error, UnknownPeer)
        assert isinstance(error, (ConfigError, KeyError))
        assert str(error).endswith("Give one of its peers or their names: db1, db2.")
    assert not world.db.peers["db1"].drained


@pytest.mark.parametrize("give", ["name", "peer"])
def test_whatever_takes_a_peer_takes_its_name(give: str) -> None:
    world = World("db1", "db2")
    db1: Any = "db1" if give == "name" else world.db.peers["db1"]
    db2: Any = "db2" if give == "name" else world.db.peers["db2"]
    with world.db.pinned(db2):
        assert world.connect() == "db2"
    assert world.db.connect(only=db2).host == "db2"
    world.db.drain(db1)
    assert world.db.peers["db1"].drained
    world.db.undrain(db1)
    assert not world.db.peers["db1"].drained
    assert world.db.next_trial(db1) is None
    world.open("db1")
    assert world.db.next_trial(db1) == 30
    assert world.db.try_out(db1, now=True)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("open_one", 5), ("open_one", "connect"), ("trials", "sometimes"), ("trials", None)],
)
def test_connect_names_what_it_cannot_use_first(argument: str, value: Any) -> None:
    world = World("db1")
    with pytest.raises(ConfigError, match=f"^{argument} is "):
        world.db.connect(**{argument: value})
    assert world.hosts() == ["db1"]
    assert world.states() == "closed"


@pytest.mark.parametrize("value", [None, 5, "log", ["log"]])
def test_what_cannot_be_called_is_no_listener_and_is_not_added(value: Any) -> None:
    world = World("db1")
    with pytest.raises(ConfigError, match=r"^listener is a "):
        world.db.add_listener(value)
    assert world.connect() == "db1"


@pytest.mark.parametrize("value", [*WRONG, None], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "argument", ["fail_max", "reset_timeout", "success_threshold", "release_interval", "lease"]
)
def test_numbers_of_a_breaker_are_numbers(argument: str, value: Any) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0:
        whole = argument in ("fail_max", "success_threshold")
        if not whole or (isinstance(value, int) and value > 0):
            return
    with pytest.raises(ConfigError, match=f"^{argument} is "):
        PeerBreaker(**{argument: value})


def test_what_takes_changes_hands_them_on_as_well() -> None:
    """A queue has a put(), and no go()."""
    with pytest.raises(ConfigError):
        PeerBreaker(on_transition=Queue())  # type: ignore[arg-type]


@pytest.mark.parametrize("peer", [None, 5, "db1", {"host": "db1"}], ids=repr)
def test_a_finished_configuration_has_peers_configurations(peer: Any) -> None:
    with pytest.raises(ConfigError, match=f"^PEERS has a {type(peer).__name__} in it"):
        BalancerConfig("default", (peer,))


@pytest.mark.parametrize("argument", ["clock", "jitter", "on_transition"])
def test_functions_of_a_breaker_are_functions(argument: str) -> None:
    with pytest.raises(ConfigError, match=f"^{argument} is a int, which cannot be called"):
        PeerBreaker(**{argument: 5})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [5, 2.5, b"default", ["default"], {"default": 1}])
def test_retrying_atomic(value: Any) -> None:
    """It says where it is written that neither an alias nor a function was given."""
    with pytest.raises(TypeError, match="using must be an alias of DATABASES"):
        retrying_atomic(using=value)
    with pytest.raises(TypeError, match="is no function"):
        retrying_atomic(using="default")(value)


@pytest.mark.parametrize("attempts", [0, -1, "3", 2.5, None, True])
def test_attempts_is_looked_at_with_and_without_a_function(attempts: Any) -> None:
    for give in (
        lambda: retrying_atomic(lambda: None, attempts),
        lambda: retrying_atomic(attempts=attempts),
    ):
        assert isinstance(raised_by(give), ValueError)


@pytest.mark.parametrize("value", ["nope", 5, None, ("default",)])
def test_unknown_alias_is_a_key_error_that_says_which_there_are(value: Any) -> None:
    with pytest.raises(KeyError, match=r"is no load balancer\. Load balancers in DATABASES: "):
        balancers[value]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
def test_wrong_argument_of_metrics_is_named(value: Any) -> None:
    with pytest.raises(TypeError, match="Metrics takes load balancers"):
        Metrics(value, registry=None)


def test_strategies() -> None:
    """A strategy's own argument, and a class that takes some."""
    assert "draw is a int" in str(raised_by(lambda: Random(5)))  # type: ignore[arg-type]

    class Nearest:
        def __init__(self, where: str) -> None:
            self.where = where

    with pytest.raises(ConfigError, match="Give a class without arguments"):
        LoadBalancer(peers("db1"), strategy=Nearest)


def test_no_peer_available_takes_one_line_for_one_peer() -> None:
    assert str(NoPeerAvailable("default", "db1: refused")).endswith("reached. db1: refused.")


def test_every_public_callable_is_here() -> None:
    public = {
        name
        for name in django_proxysql.__all__
        if callable(getattr(django_proxysql, name)) and name not in ("balancers", "signals")
    }
    assert public - {"from_url"} == {
        "AsyncLoadBalancer",
        "CommitOutcomeUnknown",
        "Fault",
        "LoadBalancer",
        "NoPeerAvailable",
        "NotReady",
        # Made by its balancer only.
        "Peer",
        "PeerBreaker",
        "retrying_atomic",
        "retrying_request",
    }


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("10.0.0.1", 3306), "10.0.0.1:3306"),
        (("10.0.0.1", None), "10.0.0.1"),
        (("2001:db8::7", 3306), "[2001:db8::7]:3306"),
        (("::1", None), "::1"),
        (("", 3307), "localhost:3307"),
        (("", "", "/run/s", "shop"), "/run/s"),
        (("localhost", 3306, "/run/s"), "/run/s"),
        (("10.0.0.1", 3306, "/run/s"), "10.0.0.1:3306"),
        (("/run/postgresql", 5432), "/run/postgresql"),
        ((Path("/run/postgresql"), 5432), "/run/postgresql"),
        ((None, None, None, "/srv/shop.sqlite3"), "/srv/shop.sqlite3"),
        ((None, None), ""),
    ],
    ids=str,
)
def test_an_address_is_put_into_words_in_one_way(parts: Any, words: str) -> None:
    assert address_in_words(*parts) == words


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("10.0.0.1:3306", ("10.0.0.1", 3306)),
        ("db1", ("db1", None)),
        ("[2001:db8::7]:3306", ("2001:db8::7", 3306)),
        ("2001:db8::7", ("2001:db8::7", None)),
        ("/run/s:1", ("/run/s:1", None)),
        (":memory:", (":memory:", None)),
        ("", ("", None)),
    ],
)
def test_an_address_in_words_is_taken_apart_in_one_way(words: str, parts: Any) -> None:
    assert host_and_port(words) == parts
