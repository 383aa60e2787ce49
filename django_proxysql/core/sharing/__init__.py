"""What one process finds out, the others know: circuits, trials and drains through Redis.

Each process keeps its own circuits, and its connects and statements look at nothing else. One
thread a process (:mod:`.link`) compares them with what Redis knows, in one round trip a
second, and at once when a circuit has changed here. What the others have found out
is applied to the local circuit (:mod:`.applying`).

How it holds
------------

* **Redis decides, in one script** (:mod:`.scripts`), which is atomic there
  and keeps the time: hosts' clocks are never compared, only durations travel.
* **Versions.** Each record in Redis has one, and whoever reports a change says which version it
  knew. A change that was made in ignorance of another one is dropped, and the other one
  adopted: a late word changes nothing. A record that is older than what a process knows of it,
  or gone, was lost (FLUSHALL, a failover), and is written again.
* **Wishes have an age.** Of two operators' wishes the younger one counts, also where the older one
  reaches Redis last. Of two that drain the last two peers at once Redis refuses one.
* **State, not messages.** What is reported is the difference between the circuit and what was
  last agreed on. A round trip that failed, a thread that was killed anywhere, a fork: the next
  round trip finds the same difference.
* **One trial at a time** is a lease in the peer's record. Whoever's trial is due asks for it, and
  the thread renews it while the trial is under way. It runs out by itself where its holder dies.
* **Redis is believed in so far only.** Durations are bounded by this process's own settings;
  what cannot be read is left out; a process that has no other peer left connects whatever the
  others say; and one that has lost all its peers keeps that to itself, for it may be the one
  that is cut off (its openings that nobody has confirmed are withdrawn).
* **Some hosts only.** A host that opens a circuit anew after another host's trial has closed it may
  be the only one that cannot reach the peer: from the second time on it keeps that to itself, as
  long as no other host says the same.
* **Redis away** costs a thread that waits for nothing else. Who asks it for a lease waits
  50 ms at most, and nobody waits again within a second.
* **Redis slow**: an answer that comes later than that is not lost. A lease is kept for whoever
  asks next, and a trial is put off for an answer that is late no more than once: a circuit never
  stays open because Redis takes its time.

No lock is held while anything waits, and nobody but the thread uses the connection to Redis.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import socket
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..circuit import CLOSED, Circuit, trial_of
from ..faults import Fault
from ..logger import complain
from .applying import apply_closed, apply_open, put_off
from .link import INTERVAL, PATIENCE, Link, Question, _log, checked_url, link_to, refusal
from .trouble import NO_ANSWER

if TYPE_CHECKING:
    from ..group import PeerGroup
    from ..peer import Peer

__all__ = ["Fleet", "Link", "Moment", "Sharing", "checked_url"]

#: The longest that an operator waits for Redis, in seconds.
OPERATOR_WAITS = 1.0

#: Seconds for which the fleet's record of what happened goes back.
HISTORY = 3600

#: How many moments of the fleet's history are kept.
_MOMENTS = 500

#: Seconds for which an operator's wish is remembered while nobody shares it.
_WISHES = 7 * 86400


@dataclass(frozen=True)
class Moment:
    """Something that happened to a peer, as one of the processes found it."""

    peer: str
    #: ``open``, ``closed``, ``drained`` or ``undrained``.
    state: str
    #: When, in seconds since 1970, on Redis's clock.
    when: float
    #: Why a circuit opened, and "" otherwise; never a password.
    error: str


@dataclass(frozen=True)
class Fleet:
    """What all processes that share this balancer's state know together."""

    #: How many of them were heard of within the last five seconds, this one included.
    processes: int
    #: The connections that they hold, by the peer's name.
    connections: Mapping[str, int]
    #: What has happened within the last hour, the oldest first; 500 moments at most.
    timeline: tuple[Moment, ...]
    #: The peers whose circuits are open, and those that are drained, as all know it. What one
    #: process keeps to itself is not in it.
    out: frozenset[str] = frozenset()
    drained: frozenset[str] = frozenset()
    #: When this was so, in seconds since 1970, on Redis's clock.
    now: float = 0.0


class _Agreed(NamedTuple):
    """What was last agreed on with Redis about a peer's circuit."""

    #: The record's version; 0: there is none.
    version: int = 0
    #: Whether it says that the circuit is open.
    is_open: bool = False
    #: The local circuit's generation at that time.
    generation: int = 0


class _Grant(NamedTuple):
    """A lease that this process holds in Redis, and has not used yet."""

    #: Who it was granted to: not the child of a fork.
    me: str
    #: Until when on the balancer's clock, at least.
    until: float


class Wish:
    """What an operator has said of a peer."""

    __slots__ = ("drained", "forced", "made", "was_refused")

    def __init__(self, drained: bool, forced: bool, made: float) -> None:
        self.drained = drained
        #: Whether it holds even if it leaves no peer undrained.
        self.forced = forced
        #: When, on the balancer's clock.
        self.made = made
        #: Whether Redis has refused it: the others have drained all other peers.
        self.was_refused = False


class _Shared:
    """One peer's part. All but the wishes is the thread's own, and replaced by one assignment."""

    __slots__ = (
        "agreed",
        "drain_at",
        "drain_forced",
        "drain_on",
        "drain_version",
        "grant",
        "left_to_others",
        "waited",
        "wishes",
    )

    def __init__(self) -> None:
        self.agreed = _Agreed()
        #: Seconds for which a trial that was asked for is to be left to others.
        self.left_to_others = 0.0
        #: The lease that was granted to somebody here who may not have waited for the answer.
        self.grant: _Grant | None = None
        #: By whom a trial was put off for an answer that was late, and has not come as a no.
        self.waited = ""
        self.drain_version = 0
        #: Whether Redis says that it is drained.
        self.drain_on = False
        #: Whether an operator forced that, and it leaves no peer undrained.
        self.drain_forced = False
        #: When what Redis says of the drain was wished for, on the balancer's clock.
        self.drain_at = float("-inf")
        #: Operators' wishes that Redis has not heard of. Others add, the thread removes.
        self.wishes: deque[Wish] = deque()


@dataclass
class _Request:
    """What one balancer tells Redis in one round trip, and what that was made from."""

    circuits: dict[str, dict[str, Any]]
    drains: dict[str, dict[str, Any]]
    #: By peer: the record that was looked at.
    seen: dict[str, Circuit]
    #: By peer: the wishes that are told; the last one counts.
    wishes: dict[str, list[Wish]]
    beat: dict[str, int]
    #: What was stored when everything was agreed on last; None: not everything is.
    stamp: str | None
    #: When it was made, on the balancer's clock.
    at: float = 0.0
    #: The peers whose trial is asked for.
    bids: frozenset[str] = frozenset()
    #: Whether it is enough to ask if that is as it was: there is nothing to tell.
    is_quiet: bool = False

    def text(self, link: Link) -> str:
        """Return what the script BEAT is given, or SYNC if there is more to it."""
        short = {
            "me": link.me,
            "now": link.now_us(),
            "beat": json.dumps(self.beat),
            "history": HISTORY,
            "wishes": _WISHES,
        }
        if self.is_quiet:
            return json.dumps({**short, "stamp": self.stamp})
        return json.dumps(
            {
                **short,
                "host": link.host,
                "serial": link.serial(),
                "circuits": self.circuits,
                "drains": self.drains,
                "moments": _MOMENTS,
            }
        )


class Sharing:
    """What one balancer shares with the same balancer in other processes.

    It is ``balancer.sharing`` where the balancer has ``SHARED_STATE``.

    :param balancer: whose circuits and drains they are.
    :param link: for tests, in place of the process's own.
    :raises ConfigError: see :func:`checked_url`.
    """

    def __init__(self, balancer: PeerGroup, link: Link | None = None) -> None:
        # The balancer has this; it is not to be kept alive by the thread.
        self._balancer = weakref.ref(balancer)
        self.link = link or link_to(balancer.config.shared_state or "")
        config = balancer.config
        trial = config.connect_timeout if config.trial_timeout is None else config.trial_timeout
        #: A trial is one attempt, and at most one throw-away connection before it.
        self._lease = int((2 * trial + 1) * 1000)
        self._fields = _fields(balancer.peers.values())
        self._names = {field: name for name, field in self._fields.items()}
        self._shared = {name: _Shared() for name in balancer.peers}
        self._stamp: str | None = None
        base = f"{self.link.prefix}:{{{balancer.name}}}"
        addresses = "\n".join(sorted(peer.address for peer in balancer.peers.values()))
        # Others that have this alias and other peers are counted by themselves.
        digest = hashlib.sha256(addresses.encode()).hexdigest()[:8]
        #: The keys in Redis.
        self.keys = [
            f"{base}:circuits",
            f"{base}:drains",
            f"{base}:processes:{digest}",
            f"{base}:connections:{digest}",
            f"{base}:timeline",
        ]
        for name, peer in balancer.peers.items():
            peer.breaker.gate = _Gate(self, name)

    def __repr__(self) -> str:
        return f"<Sharing by Redis at {self.link.address}>"

    def start(self) -> None:
        """Begin to share. Costs nothing where that has begun, and waits for nothing."""
        self.link.join(self)

    def has_news(self) -> None:
        """Tell the others at once what has changed here."""
        self.link.wake()

    # What operators ask

    @property
    def is_heard(self) -> bool:
        """Whether the last round trip to Redis, at most a second ago, went well."""
        return self.link.heard

    @property
    def trouble(self) -> str:
        """What is wrong with Redis, as a sentence without its subject; holds no secret.

        ``does not answer`` where nothing is known but that.
        """
        trouble = self.link.trouble
        return (NO_ANSWER if trouble is None else trouble).says

    def settle(self, seconds: float = OPERATOR_WAITS) -> bool:
        """Wait until Redis knows what this process knows, and this process what Redis does.

        :param seconds: how long to wait at most.
        :returns: whether it does. If not, drains and circuits of this process are its own until
            Redis is back, which it tells then, if it still runs.
        """
        self.start()
        return bool(self.link.ask(Question(self), seconds))

    @property
    def has_told_all(self) -> bool:
        """Whether Redis has heard of all wishes of this process."""
        return not any(shared.wishes for shared in self._shared.values())

    def wish(self, peer: Peer, drained: bool, *, forced: bool = False) -> Wish:
        """Have all processes drain or undrain a peer.

        :param peer: one of the balancer's.
        :param drained: what is wished. The last wish counts, of whichever process, however
            late Redis hears of it.
        :param forced: drain it even if that leaves no peer undrained.
        :returns: the wish, which says whether it was refused, once Redis has heard of it.
        """
        balancer = self._balancer()
        made = float("-inf") if balancer is None else balancer.clock()
        wish = Wish(drained, forced, made)
        self._shared[peer.name].wishes.append(wish)
        return wish

    def fleet(self, seconds: float = PATIENCE) -> Fleet | None:
        """Ask what all processes know together.

        :param seconds: how long to wait at most.
        :returns: None where Redis does not say.
        """
        self.start()
        answer = self.link.ask(Question(self, fleet=True), seconds)
        try:
            return None if answer is None else self._fleet_from(answer)
        except Exception:
            complain("What Redis at %s says of the other processes is garbage", self.link.address)
            return None

    def _fleet_from(self, answer: list[bytes]) -> Fleet:
        processes, sums, now, *moments = answer
        held = json.loads(sums)
        since = float(now) / 1000 - HISTORY
        timeline = []
        for text in moments:
            try:
                said = json.loads(text)
                moment = Moment(
                    self._names[said["p"]],
                    str(said["s"]),
                    float(said["t"]) / 1000,
                    str(said["e"])[:500],
                )
            except (KeyError, TypeError, ValueError):
                # Of a peer that this process does not have; or garbage.
                continue
            if moment.when >= since:
                timeline.append(moment)
        connections = {name: int(held.get(field, 0)) for name, field in self._fields.items()}
        shared = self._shared.items()
        return Fleet(
            int(processes),
            connections,
            tuple(timeline),
            frozenset(name for name, known in shared if known.agreed.is_open),
            frozenset(name for name, known in shared if known.drain_on),
            float(now) / 1000,
        )

    # What the thread does

    def compose(self, bids: Sequence[Question]) -> _Request:
        """Return what to tell Redis.

        :param bids: whose trials somebody here is ready to make.
        """
        request = _Request({}, {}, {}, {}, {}, self._stamp)
        balancer = self._balancer()
        if balancer is None:
            return request
        now = request.at = balancer.clock()
        request.bids = frozenset(bid.peer for bid in bids)
        by_hand = {bid.peer for bid in bids if bid.by_hand}
        # One that has lost all of its peers may be what is wrong itself.
        cut_off = not any(peer.breaker.circuit.state == CLOSED for peer in balancer.peers.values())
        for name, peer in balancer.peers.items():
            field, shared = self._fields[name], self._shared[name]
            circuit = request.seen[name] = peer.breaker.circuit
            is_open = circuit.state != CLOSED
            told: dict[str, Any] = {
                "v": str(shared.agreed.version),
                # As it was agreed on: what this process has kept to itself, it keeps.
                "s": "open" if shared.agreed.is_open and is_open else "closed",
                "op": _what_to_say(circuit, shared.agreed, cut_off),
                "lease": self._lease,
                # Whatever lies further ahead is no time that anybody has set.
                "longest": _ms(2 * peer.breaker.reset_timeout),
            }
            if is_open:
                since = now if circuit.out_since is None else circuit.out_since
                told.update(
                    due=_ms(circuit.due - now),
                    out=_ms(now - since),
                    # An error's text may have bytes in it that are no text.
                    err=circuit.error[:500].encode(errors="replace").decode(),
                    fault=circuit.fault.value if circuit.fault else "",
                    q=circuit.question,
                    hold=trial_of(circuit, now) is not None,
                    bid=name in request.bids,
                    by_hand=name in by_hand,
                    keep=self._is_kept(shared, now),
                )
            request.circuits[field] = told
            wishes = request.wishes[name] = list(shared.wishes.copy())
            request.drains[field] = {
                "v": str(shared.drain_version),
                # As it is stored: what this process refuses is not taken back for the others.
                "on": wishes[-1].drained if wishes else shared.drain_on,
                "wish": bool(wishes),
                "force": bool(wishes) and wishes[-1].forced,
                "forced": shared.drain_forced,
                "age": _ms(now - (wishes[-1].made if wishes else shared.drain_at), _WISHES),
            }
            request.beat[field] = peer.connections
            if told["op"] or any(map(told.get, ("hold", "bid", "keep"))) or wishes:
                # A lease that is held has to be given back, whatever comes: in full once more.
                self._stamp = request.stamp = None
        request.is_quiet = request.stamp is not None
        return request

    def apply(self, request: _Request, answer: Any) -> str:
        """Take over what the others have found out.

        :returns: what is wrong with Redis, although it answers.
        :raises Exception: the answer is none.
        """
        said = json.loads(bytes(answer).decode(errors="replace"))
        balancer = self._balancer()
        if balancer is None:
            return ""
        agreed = True
        for name, seen in request.seen.items():
            peer, field = balancer.peers[name], self._fields[name]
            told = said["circuits"][field]
            if name in request.bids:
                self._apply_bid(self._shared[name], request.at, told)
                # Whatever becomes of a lease, it has to be given back.
                agreed = False
            # A lease that is held has to be given back.
            is_held = bool(request.circuits[field].get("hold"))
            agreed &= self._apply_circuit(peer, seen, told) and not is_held
        drains = [
            (balancer.peers[name], said["drains"].get(self._fields[name])) for name in request.seen
        ]
        # An operator who has forced one drain has wished for all of them together.
        forced = any(drain and drain.get("forced") is True for _, drain in drains)
        # Those that take connections again come first: at no moment is everything drained.
        for peer, drain in sorted(drains, key=lambda one: one[1] is None or one[1]["on"] is True):
            self._apply_drain(balancer, peer, request.wishes[peer.name], drain, forced)
        wrong = refusal(said)
        if said.get("garbage"):
            wrong = wrong or "holds what no process of ours has written"
        # While somebody holds a trial, or this process does, each round trip is one in full.
        self._stamp = str(said["stamp"]) if agreed and not wrong and said["stamp"] else None
        return wrong

    def _apply_bid(self, shared: _Shared, asked: float, said: Mapping[str, Any]) -> None:
        # Before anybody is answered: who has the answer takes this away.
        if not said["granted"]:
            shared.grant, shared.waited = None, ""
        elif said["s"] == "open":
            shared.grant = _Grant(self.link.me, asked + self._lease / 1000)

    def _is_kept(self, shared: _Shared, now: float) -> bool:
        """Return whether a lease is kept for the next who asks, and forget one that has run out."""
        grant = shared.grant
        if grant is None:
            return False
        if grant.me != self.link.me or now >= grant.until:
            shared.grant = None
            return False
        return True

    def _apply_circuit(self, peer: Peer, seen: Circuit, said: Mapping[str, Any]) -> bool:
        """Return whether there is nothing more to be said of it, as long as nothing happens."""
        shared, breaker = self._shared[peer.name], peer.breaker
        version, is_open = int(said["v"]), said["s"] == "open"
        due_in = _bounded(said.get("due"), 2 * breaker.reset_timeout)
        held_for = min(_bounded(said.get("held"), self._lease / 1000), INTERVAL)
        shared.left_to_others = 0.0 if said["granted"] else max(due_in, held_for, 0.001)
        if said["done"]:
            # What was said here.
            shared.agreed = _Agreed(version, is_open, seen.generation)
            return not held_for
        if version <= shared.agreed.version:
            if is_open and held_for:
                # Somebody is at it: to ask for the trial would be of no use.
                put_off(breaker, seen.generation, held_for)
            return not held_for
        after: Circuit | None = seen
        if is_open:
            after = apply_open(
                breaker,
                seen.generation,
                due_in=due_in,
                out_for=_bounded(said.get("out"), 365 * 86400),
                error=str(said.get("err") or "")[:500],
                fault=_fault(said.get("fault")),
                question=str(said.get("q") or "")[:50],
            )
        elif seen.state != CLOSED:
            after = apply_closed(breaker, seen.generation)
        # Otherwise it has changed meanwhile, or is being tried: the next round trip sees to it.
        if after is not None:
            shared.agreed = _Agreed(version, is_open, after.generation)
        return after is not None and not held_for

    def _apply_drain(
        self,
        balancer: PeerGroup,
        peer: Peer,
        told: list[Wish],
        said: Mapping[str, Any] | None,
        forced: bool,
    ) -> None:
        if said is None:
            return
        shared, version = self._shared[peer.name], int(said["v"])
        was_heard = said["done"] is True
        was_refused = was_heard and said.get("refused") is True
        if version > shared.drain_version or was_heard:
            shared.drain_version = max(version, shared.drain_version)
            shared.drain_on = said["on"] is True
            shared.drain_forced = shared.drain_on and said.get("forced") is True
            shared.drain_at = balancer.clock() - _bounded(said.get("age"), _WISHES)
            # A wish that has come meanwhile is younger. And first this: a wish that was heard is
            # told again, if this is broken off.
            if len(shared.wishes) <= len(told):
                learnt = said.get("taken") is not True
                refused = balancer.apply_drained(
                    peer, shared.drain_on, learnt=learnt, forced=forced
                )
                if refused:
                    _log(
                        logging.WARNING,
                        "%s: another process drained %s (%s), this one does not: it is the last "
                        "peer here that is not drained. It is drained as soon as another is not.",
                        balancer.name,
                        peer.name,
                        peer.address,
                    )
        if was_refused:
            _log(
                logging.WARNING,
                "%s: %s is not drained: others have drained all other peers",
                balancer.name,
                peer.name,
            )
        for wish in told if was_heard else ():
            wish.was_refused = was_refused and wish.drained
            with contextlib.suppress(ValueError):
                shared.wishes.remove(wish)

    # What a breaker asks

    def answer_for(self, name: str) -> float:
        """Return for how many seconds a trial that was asked for is to be left to others."""
        return self._shared[name].left_to_others

    def may_try(self, name: str, by_hand: bool = False) -> float:
        """Return for how many seconds a trial that is due is to be left to others; 0: go ahead.

        Waits 50 ms at most.

        :param by_hand: an operator wishes for it, due or not, and waits for a second.
        """
        balancer, shared = self._balancer(), self._shared[name]
        # What the others do not know of is nobody else's trial; and one that has no other peer
        # left connects, whatever is said.
        if balancer is None or not shared.agreed.is_open or not balancer.has_usable():
            return 0.0
        self.start()
        if self._is_kept(shared, balancer.clock()):
            shared.grant, shared.waited = None, ""
            # It goes on from now on, by the trial that is under way.
            self.link.wake()
            return 0.0
        if by_hand:
            answer = self.link.ask(Question(self, peer=name, by_hand=True), OPERATOR_WAITS)
            shared.grant, shared.waited = None, ""
            return float(answer or 0.0)
        # First: a no that comes right after we have given up is to be seen.
        waited, shared.waited = shared.waited, self.link.me
        answer = self.link.ask(Question(self, peer=name), PATIENCE)
        if answer is not None:
            shared.grant, shared.waited = None, ""
            return float(answer)
        if waited == self.link.me or not self.link.is_late:
            # A lease that was granted, and has run out meanwhile, has been waited for as well.
            shared.waited = ""
            return 0.0
        return INTERVAL


class _Gate:
    """What one peer's breaker asks before a trial."""

    __slots__ = ("_name", "_sharing")

    def __init__(self, sharing: Sharing, name: str) -> None:
        self._sharing = sharing
        self._name = name

    def __call__(self, by_hand: bool) -> float:
        return self._sharing.may_try(self._name, by_hand)


def _what_to_say(circuit: Circuit, agreed: _Agreed, cut_off: bool) -> str:
    """Return what has happened to a circuit since something was agreed on."""
    if circuit.state == CLOSED:
        return "close" if agreed.is_open else ""
    if cut_off:
        # Only what this process alone has found is taken back, which Redis knows.
        return "withdraw" if agreed.is_open else ""
    if circuit.generation == agreed.generation:
        return ""
    # A trial that failed, for whatever reason, puts off the next one. A peer that refuses us
    # may well take the others' word for who they are.
    return "open" if agreed.is_open or circuit.fault is not Fault.REFUSED else ""


def _fields(peers: Iterable[Peer]) -> dict[str, str]:
    """Return under what each peer is known to the other processes, by its name.

    Its address is: names go by position, and differ where a peer was added. An address that means
    another server on each host goes with the host's name.
    """
    fields: dict[str, str] = {}
    for peer in peers:
        field = peer.address or peer.name
        if _is_local(peer.address):
            field += f" on {socket.gethostname()}"
        while field in fields.values():
            field += "'"
        fields[peer.name] = field
    return fields


def _is_local(address: str) -> bool:
    host, _, port = address.rpartition(":")
    host = host.strip("[]").lower() if port.isdigit() else address
    # A name without a port is a host's, or a database's on no host in particular.
    return (
        host in ("localhost", "::1", "")
        or host.startswith(("127.", "/", "@", ":memory:"))
        or host.endswith((".sock", ".sqlite3"))
        or "/" in host
    )


def _ms(seconds: float, most: float = 86400.0) -> int:
    return int(max(0.0, min(seconds, most)) * 1000)


def _bounded(milliseconds: Any, most: float) -> float:
    """Return a duration of Redis's in seconds, as far as it is to be believed."""
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, (int, float)):
        return 0.0
    return max(0.0, min(milliseconds / 1000, most))


def _fault(value: Any) -> Fault | None:
    try:
        return Fault(value)
    except ValueError:
        return None
