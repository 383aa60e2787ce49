"""What happens to a site: each scenario is a function that does it once, and may be repeated."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

from .load import Load, Pace
from .sites import WAY, admin

#: Seconds that a statement may take where a peer hangs.
READ_TIMEOUT = 3


@dataclass
class Fault:
    """One blow, from the moment it began until it had struck everything that it strikes."""

    what: str
    began: float
    over: float = float("inf")
    #: No peer was there meanwhile: nothing could be done.
    outage: bool = False
    #: When the first peer was there again, after an outage.
    returned: float | None = None
    #: How many operations may fail over it; None: one a thread.
    at_most: int | None = None


class Stage:
    """What a scenario works with."""

    def __init__(
        self,
        site: Any,
        loads: Sequence[Load],
        say: Callable[[str], None],
        patience: float,
    ) -> None:
        self.site = site
        self.loads = loads
        #: Seconds after an outage in which work must have gone on.
        self.patience = patience
        self.faults: list[Fault] = []
        self._say = say

    def wait(self, seconds: float) -> None:
        """Let the site work for some time."""
        first, *others = self.loads
        first.wait(seconds)
        for load in others:
            load.check()

    def busiest(self) -> Any:
        """Return the peer with most connections, a moment after it was chosen."""
        peer = self.site.busiest()
        self.wait(0.7)
        return peer

    @contextlib.contextmanager
    def fault(self, what: str, **details: Any) -> Iterator[Fault]:
        """What is done in the block is a blow to the site."""
        self._say(what)
        fault = Fault(what, time.monotonic(), **details)
        self.faults.append(fault)
        yield fault
        if fault.over == float("inf"):
            fault.over = time.monotonic()


class Scenario(NamedTuple):
    name: str
    #: Where it takes place: one of SITES.
    site: str
    what: str
    run: Callable[[Stage], None]
    #: Statements in flight can but time out.
    hangs: bool = False
    #: The only error codes that may be seen; None: whatever a lost connection says.
    codes: frozenset[int] | None = None
    pace: Pace = Pace()
    #: The server's settings meanwhile.
    variables: tuple[tuple[str, int], ...] = (("innodb_flush_log_at_trx_commit", 1),)

    @property
    def options(self) -> dict[str, Any]:
        """OPTIONS of the site's database, for either engine."""
        return {"read_timeout": READ_TIMEOUT} if self.hangs else {}


SCENARIOS: dict[str, Scenario] = {}


def _scenario(site: str, what: str, **details: Any) -> Callable[..., Callable[[Stage], None]]:
    """List a function as a scenario, by its name."""

    def listed(run: Callable[[Stage], None]) -> Callable[[Stage], None]:
        name = run.__name__.replace("_", "-")
        SCENARIOS[name] = Scenario(name, site, what, run, **details)
        return run

    return listed


@_scenario("ways", "a peer's process is killed, and started again")
def peer_killed(stage: Stage) -> None:
    way = stage.busiest()
    with stage.fault(f"{way.name} is killed"):
        way.kill()
    stage.wait(1.5)
    way.start()
    stage.wait(1.5)


@_scenario("ways", "a peer refuses new connections, and cuts the others a second later")
def peer_paused(stage: Stage) -> None:
    way = stage.busiest()
    way.disable(WAY)
    stage.wait(1)
    with stage.fault(f"{way.name}, paused before, is stopped"):
        way.shutdown_sessions(WAY)
    stage.wait(1)
    way.enable(WAY)
    stage.wait(1.5)


@_scenario("ways", "a peer's process is frozen", hangs=True)
def peer_hanging(stage: Stage) -> None:
    way = stage.busiest()
    with stage.fault(f"{way.name} freezes") as fault:
        way.freeze()
        # Before the first statement has timed out the loss is unknown.
        fault.over = time.monotonic() + READ_TIMEOUT
    stage.wait(READ_TIMEOUT + 2)
    way.thaw()
    stage.wait(1.5)


@_scenario("ways", "all peers are restarted in turn")
def rolling_restart(stage: Stage) -> None:
    for way in stage.site.peers:
        stage.wait(0.7)
        with stage.fault(f"{way.name} is stopped"):
            way.stop()
        stage.wait(0.2)
        way.start()
        stage.wait(1.5)


@_scenario("ways", "all peers are killed; one comes back")
def all_down(stage: Stage) -> None:
    first, *others = stage.site.peers
    stage.wait(0.7)
    with stage.fault("all peers are killed", outage=True) as fault:
        for way in stage.site.peers:
            way.kill()
        stage.wait(3 - (time.monotonic() - fault.began))
        first.start(wait=False)
        while not first.ready():
            stage.wait(0.01)
        fault.returned = time.monotonic()
        fault.over = fault.returned + stage.patience
    stage.wait(2)
    for way in others:
        way.start()
    stage.wait(1.5)


@_scenario("ways", "a peer cuts its connections, and closes new ones at once")
def backend_gone(stage: Stage) -> None:
    way = stage.busiest()
    with stage.fault(f"{way.name} loses its backend"):
        # From now on it accepts connections, and closes them.
        way.ask(f"disable server {WAY}-servers/s0")
        way.shutdown_sessions(WAY)
    stage.wait(2.5)
    way.ask(f"enable server {WAY}-servers/s0")
    stage.wait(1.5)


@_scenario(
    "ways",
    "the server closes connections idle for 1 s",
    pace=Pace(idle_every=5, idle=1.6),
    variables=(("wait_timeout", 1),),
)
def idle_killed(stage: Stage) -> None:
    stage.wait(5)


@_scenario("ways", "the server kills connections at work")
def one_killed(stage: Stage) -> None:
    with admin(stage.site.server) as cursor:
        for _ in range(5):
            stage.wait(0.4)
            with stage.fault("a connection is killed in the middle of a statement", at_most=1):
                while not _kill_one_at_work(cursor):
                    stage.wait(0.001)


def _kill_one_at_work(cursor: Any) -> bool:
    cursor.execute(
        "SELECT id FROM information_schema.processlist WHERE user = 'app' AND command = 'Query'"
    )
    for (number,) in cursor.fetchall():
        with contextlib.suppress(cursor.connection.OperationalError):
            cursor.execute(f"KILL {number}")
            return True
    return False


@_scenario(
    "galera",
    "a node loses its cluster, and goes on accepting connections",
    codes=frozenset({1180, 1213}),
)
def galera_cut_off(stage: Stage) -> None:
    node = stage.busiest()
    with stage.fault(f"{node.name} is cut off from the cluster"):
        stage.site.server.isolate(node)
        stage.site.server.wait_without(node)
    stage.wait(2)
    with stage.fault(f"{node.name} is let back"):
        # Galera certifies anew what was under way when a node joins.
        stage.site.server.rejoin(node)
    stage.wait(1.5)


@_scenario("galera", "a node's process is killed")
def galera_killed(stage: Stage) -> None:
    node = stage.busiest()
    with stage.fault(f"{node.name} is killed"):
        node.kill()
        # What the others commit as they part from it may fail to be certified.
        stage.site.server.wait_without(node)
    stage.wait(2)
    with stage.fault(f"{node.name} is started again"):
        node.start()
    stage.wait(1.5)


#: Where a connection is cut, at a COMMIT, and how many of its or its answer's bytes may pass.
_POINTS = [("before", ()), ("after", ())] + [
    (where, (passed,)) for where in ("within", "reply") for passed in (0, 1, 4, 5, 9)
]

#: COMMIT alone, a fence's too, and COMMIT with a token. READ COMMITTED is neither.
_COMMITS = (b"\x03COMMIT", b"; COMMIT")


@_scenario("cuts", "connections are cut at a COMMIT")
def commit_cut(stage: Stage) -> None:
    for _ in range(10):
        stage.wait(0.1)
        where, passed = random.choice(_POINTS)
        proxies = stage.site.peers
        before = sum(proxy.cuts for proxy in proxies)
        with stage.fault(f"connections are cut at a COMMIT: {where} it", at_most=2 * len(proxies)):
            # Whichever has one first; the others a moment later.
            for proxy in proxies:
                for matching in _COMMITS:
                    getattr(proxy, f"cut_{where}")(*passed, matching=matching)
            while sum(proxy.cuts for proxy in proxies) == before:
                stage.wait(0.002)
            stage.wait(0.05)
            for proxy in proxies:
                proxy.disarm()


@_scenario("stack", "each node, and each proxy in front of it, is restarted in turn")
def all_restarted(stage: Stage) -> None:
    for way, node in zip(stage.site.peers, stage.site.server):
        stage.wait(0.7)
        with stage.fault(f"{way.name} is stopped"):
            way.stop()
        stage.wait(0.2)
        way.start()
        stage.wait(1.5)
        with stage.fault(f"{node.name} is stopped"):
            node.stop()
        stage.wait(0.2)
        with stage.fault(f"{node.name} is started again"):
            node.start()
        stage.wait(1.5)
