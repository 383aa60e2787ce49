"""What configures one peer and one load balancer: frozen, checked once, secrets hidden.

Every duration is in seconds.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from .exceptions import ConfigError

#: Seconds: the longest OUTCOME_DEADLINE.
_MOST_SECONDS = 600


def number(
    setting: str,
    value: object,
    *,
    minimum: float = 0,
    exclusive: bool = False,
    whole: bool = False,
    optional: bool = False,
) -> Any:
    """Return ``value`` if it is a number that ``setting`` can have.

    :raises ConfigError: it is not; the message names the setting and its range.
    """
    if value is None and optional:
        return None
    kind = "a whole number" if whole else "a number"
    bound = f"greater than {minimum:g}" if exclusive else f"of at least {minimum:g}"
    hint = f"Give {kind} {bound}" + (", or None." if optional else ".")
    # bool is an int to Python, and never what a person means by a duration.
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ConfigError(setting, f"is {value!r}, which is not {kind}", hint)
    # A whole number may be too large for a clock's.
    if not minimum <= value <= sys.float_info.max or (exclusive and value == minimum):
        raise ConfigError(setting, f"is {value!r}", hint)
    return value


#: What a host looks like that is a URL, or a part of one, with a user and a password.
_PASSWORD_IN_HOST = re.compile(r"[^/]*:.*@", re.DOTALL)


def host(setting: str, value: object) -> None:
    """Raise a ConfigError if ``value`` has a password in it, without quoting it.

    A host stands in logs, errors and pages, and drivers quote the one that they cannot find.
    """
    if isinstance(value, str) and _PASSWORD_IN_HOST.match(value):
        hint = "Give the name alone; django_proxysql.from_url() reads a URL."
        raise ConfigError(setting, "has a password in it", hint)


def function(setting: str, value: object, hint: str, *, optional: bool = False) -> Any:
    """Return ``value`` if it can be called; or raise a ConfigError that does not quote it."""
    if callable(value) or (optional and value is None):
        return value
    raise ConfigError(setting, f"is a {type(value).__name__}, which cannot be called", hint)


def _one_of(setting: str, value: object, one: object, other: object) -> None:
    # 1 is True to Python, and no choice here.
    if value not in (one, other) or type(value) in (int, float):
        raise ConfigError(setting, f"is {value!r}", f"Give {one!r} or {other!r}.")


def _deadline(setting: str, value: object) -> None:
    if number(setting, value, exclusive=True) > _MOST_SECONDS:
        hint = f"Give at most {_MOST_SECONDS}: a request waits for it."
        raise ConfigError(setting, f"is {value!r}", hint)


def _setting(default: Any, rule: Callable[..., object], *args: Any, **limits: Any) -> Any:
    """Return a field whose value must pass ``rule(setting, value, *args, **limits)``."""
    return field(default=default, metadata={"rule": (rule, args, limits)})


def check_field(config: type, name: str, value: Any) -> None:
    """Raise a ConfigError if one field of a configuration cannot have that value."""
    given = next(one.metadata.get("rule") for one in fields(config) if one.name == name)
    if given is not None:
        rule, args, limits = given
        setting = f"BREAKER[{name!r}]" if config is BreakerConfig else name.upper()
        rule(setting, value, *args, **limits)


class _Checked:
    """A configuration whose fields have passed their rules."""

    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]
            check_field(type(self), one.name, getattr(self, one.name))


def imported(setting: str, path: str, known: Iterable[str]) -> Any:
    """Return what the dotted ``path`` names; or raise a ConfigError with the ``known`` names."""
    hint = f"Give one of {', '.join(known)}, or a dotted path."
    module, dot, name = path.rpartition(".")
    if not dot:
        raise ConfigError(setting, f"is {path!r}, which is not known", hint)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as exc:
        # TypeError, ValueError: a relative path.
        raise ConfigError(setting, f"is {path!r}, which cannot be imported ({exc})", hint) from exc


@dataclass(frozen=True)
class BreakerConfig(_Checked):
    """Thresholds of a circuit, in pybreaker's words."""

    #: Failed connects in a row after which the circuit opens.
    fail_max: int = _setting(1, number, minimum=1, whole=True)
    #: Good trials in a row after which it closes again.
    success_threshold: int = _setting(1, number, minimum=1, whole=True)

    @classmethod
    def of(cls, value: Mapping[str, Any] | None, over: BreakerConfig) -> BreakerConfig:
        """Read the BREAKER setting; what it leaves out is taken from ``over``.

        :raises ConfigError: an unknown key, or a number out of range.
        """
        if value is None:
            return over
        if not isinstance(value, Mapping):
            raise ConfigError("BREAKER", f"is {value!r}", "Give a dict such as {'fail_max': 3}.")
        known = [f.name for f in fields(cls)]
        for key in value:
            if key not in known:
                raise ConfigError(
                    "BREAKER", f"has the unknown key {key!r}", f"Known are: {', '.join(known)}."
                )
        return replace(over, **value)


@dataclass(frozen=True)
class PeerConfig(_Checked):
    """One database endpoint."""

    name: str
    #: Where it is, as people write it: ``10.0.0.1:3306`` or a socket's path.
    address: str = ""
    #: Its share of the connections, relative to its tier's other peers.
    weight: float = _setting(1, number, exclusive=True)
    #: Its tier; lower numbers are used first.
    priority: int = _setting(0, number, whole=True)
    #: Seconds for which its circuit stays open before a trial.
    check_interval: float = _setting(30, number, exclusive=True)
    breaker: BreakerConfig = BreakerConfig()
    #: What a connection to it is made with. May hold a password: never shown.
    params: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class BalancerConfig(_Checked):
    """The peers of one alias and how connections are spread over them."""

    name: str
    peers: tuple[PeerConfig, ...]
    #: A strategy's name, a dotted path to a class, or an instance.
    strategy: Any = "random"
    #: Seconds for one attempt.
    connect_timeout: float = _setting(5, number, exclusive=True)
    #: Seconds for one attempt that is a trial (None: as any other).
    trial_timeout: float | None = _setting(None, number, exclusive=True, optional=True)
    #: Seconds for a whole connect() over all peers.
    connect_deadline: float = _setting(15, number, exclusive=True)
    #: Seconds for which connect() waits for a peer when there is none (0: not at all).
    wait_for_peer: float = _setting(0, number)
    #: Seconds between trials of a peer while no circuit is closed
    #: (None: the peer's full check interval).
    last_resort_interval: float | None = _setting(1, number, optional=True)
    #: A check's name, a dotted path, or a callable.
    ready_check: Any = None
    #: "safe": statements are run again where that cannot do harm; None: never.
    replay: str | None = _setting("safe", _one_of, "safe", None)
    #: Seconds of idleness after which a read, too, looks at the socket (None: no read does).
    idle_check: float | None = _setting(0.5, number, optional=True)
    #: False where one peer may lag behind another.
    synchronous_peers: bool = _setting(True, _one_of, True, False)
    #: "record": what became of a COMMIT whose answer is lost is found out; None: it is not.
    commit_outcome: str | None = _setting(None, _one_of, "record", None)
    #: Seconds for finding that out.
    outcome_deadline: float = _setting(10, _deadline)
    #: Seconds after which a host that no longer acknowledges is given up (None: the kernel's).
    tcp_user_timeout: float | None = _setting(20, number, exclusive=True, optional=True)
    #: URL of the Redis through which processes share what they know. May hold a password.
    shared_state: str | None = field(default=None, repr=False)
    #: "inline": a caller that connects makes the trials; "background": a thread does.
    trials: str = _setting("inline", _one_of, "inline", "background")
    #: Seconds over which kept connections move to a peer that is in use again (None: never).
    rebalance: float | None = _setting(30, number, optional=True)

    def __post_init__(self) -> None:
        if not self.peers:
            raise ConfigError("PEERS", "is empty", "Name at least one peer.")
        seen: set[str] = set()
        for peer in self.peers:
            if not isinstance(peer, PeerConfig):
                kind = type(peer).__name__
                raise ConfigError("PEERS", f"has a {kind} in it", "Give a tuple of PeerConfigs.")
            if peer.name in seen:
                raise ConfigError("PEERS", f"names {peer.name!r} twice", "Name each peer once.")
            seen.add(peer.name)
        super().__post_init__()


#: Fields that no setting sets by itself.
_NO_SETTINGS = frozenset({"name", "peers", "address", "breaker", "params"})


def settings_of(config: Any) -> dict[str, Field[Any]]:
    """Return the fields of a configuration by the names that they have as settings."""
    return {field.name.upper(): field for field in fields(config) if field.name not in _NO_SETTINGS}


_PEERS_HINT = (
    "Give a dict of names and of what connect() takes, such as {'db1': {'host': '10.0.0.1'}}."
)


def config_from(
    peers: Mapping[str, Mapping[str, Any]] | BalancerConfig,
    *,
    name: str = "default",
    check_interval: float = 30,
    breaker: Mapping[str, Any] | None = None,
    **settings: Any,
) -> BalancerConfig:
    """Return the config of a balancer that is made from arguments.

    :param peers: names and what ``connect`` is called with for each; a finished config is
        returned as it is.
    :param settings: the other fields of :class:`BalancerConfig`.
    :raises ConfigError: a wrong argument; the message names it.
    """
    if isinstance(peers, BalancerConfig):
        return peers
    if not isinstance(name, str):
        raise ConfigError("name", f"is a {type(name).__name__}", "Give a str.")
    if not isinstance(peers, Mapping):
        raise ConfigError("peers", f"is a {type(peers).__name__}", _PEERS_HINT)
    thresholds = BreakerConfig.of(breaker, over=BreakerConfig())
    return BalancerConfig(
        name=name,
        peers=tuple(
            _peer_config(peer, params, check_interval, thresholds) for peer, params in peers.items()
        ),
        **settings,
    )


def _peer_config(
    name: str, params: Mapping[str, Any], check_interval: float, thresholds: BreakerConfig
) -> PeerConfig:
    if not isinstance(name, str):
        raise ConfigError("peers", f"has a name that is a {type(name).__name__}", _PEERS_HINT)
    if not isinstance(params, Mapping):
        raise ConfigError(f"peers[{name!r}]", f"is a {type(params).__name__}", _PEERS_HINT)
    rest = dict(params)
    host(f"peers[{name!r}]['host']", rest.get("host"))
    return PeerConfig(
        name=name,
        weight=rest.pop("weight", 1),
        priority=rest.pop("priority", 0),
        check_interval=rest.pop("check_interval", check_interval),
        breaker=BreakerConfig.of(rest.pop("breaker", None), over=thresholds),
        address=address_in_words(
            # PyMySQL takes the socket, whatever the host is.
            "" if rest.get("unix_socket") else rest.get("host"),
            rest.get("port"),
            rest.get("unix_socket"),
            rest.get("database"),
        ),
        params=rest,
    )


def address_in_words(host: Any, port: Any, socket: Any = None, database: Any = None) -> str:
    """Return where a connection leads, as people write it: a host and port, or a path.

    :param socket: the path of a unix socket, which serves this host alone.
    :param database: stands for the rest where there is neither host nor port: SQLite's file.
    """
    where = str(host or "")
    if socket and where in ("", "localhost"):
        return str(socket)
    if where.startswith("/"):
        return where
    if where or port:
        # An IPv6 address has colons of its own.
        before_port = f"[{where}]" if ":" in where else where or "localhost"
        return f"{before_port}:{port}" if port else where
    return str(database or "")


_HOST_AND_PORT = re.compile(r"(?:\[(?P<ipv6>[^]]*)]|(?P<name>[^:/]+)):(?P<port>\d+)")


def host_and_port(address: str) -> tuple[str, int | None]:
    """Return the host and port of an address in words; a path or a host alone has no port."""
    match = _HOST_AND_PORT.fullmatch(address)
    return (match["ipv6"] or match["name"] or "", int(match["port"])) if match else (address, None)
