"""What this process knows of circuits and drains, compared with what Redis knows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from .. import circuit as events
from ..circuit import CLOSED, Circuit, CircuitEvent, trial_of
from ..group import PeerGroup
from ..logger import log
from ..peer import Peer
from ..permits import JITTER
from .link import ALIVE, INTERVAL, Link, link_to
from .records import (
    HISTORY,
    KEEP_DRAINS,
    MOMENTS,
    Agreed,
    DesiredState,
    Question,
    Request,
    SharedPeer,
    change_of,
    fault_of,
    milliseconds,
    names_for_others,
    seconds_of,
)


class Agreement:
    """What one balancer's circuits and drains are here, beside what was agreed on with Redis.

    The link's thread alone uses it: it asks for :meth:`compose`, sends that, and has the answer
    applied by :meth:`apply`.
    """

    def __init__(self, group: PeerGroup, link: Link | None = None) -> None:
        #: The balancer's, which has this: it is not to be kept alive by the thread.
        self.group = weakref.ref(group)
        self._clock = group.clock
        self.link = link or link_to(group.config.shared_state or "")
        config = group.config
        trial = config.connect_timeout if config.trial_timeout is None else config.trial_timeout
        #: A trial is one attempt, and at most one throw-away connection before it.
        self._lease = int((2 * trial + 1) * 1000)
        self._fields = names_for_others(group.peers.values())
        self._names = {field: name for name, field in self._fields.items()}
        self._shared = {name: SharedPeer() for name in group.peers}
        base = f"{self.link.prefix}:{{{group.name}}}"
        addresses = "\n".join(sorted(peer.address for peer in group.peers.values()))
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

    def compose(self, group: PeerGroup, asked: Sequence[Question]) -> Request:
        """Return what to send to Redis, with the questions that are put to it."""
        link, now = self.link, self._clock()
        asking = {question.peer for question in asked}
        by_hand = {question.peer for question in asked if question.by_hand}
        # One that has lost all of its peers may be what is wrong itself.
        cut_off = not any(peer.breaker.circuit.state == CLOSED for peer in group.peers.values())
        seen, desired, circuits, drains = {}, {}, {}, {}
        for name, peer in group.peers.items():
            field, shared = self._fields[name], self._shared[name]
            circuit = seen[name] = peer.breaker.circuit
            is_open = circuit.state != CLOSED
            circuits[field] = report = {
                "v": str(shared.agreed.version),
                # As it was agreed on: what this process has kept to itself, it keeps.
                "s": "open" if shared.agreed.is_open and is_open else "closed",
                "op": change_of(circuit, shared.agreed, cut_off),
                "lease": self._lease,
                # Whatever lies further ahead is no time that anybody has set.
                "longest": milliseconds(2 * peer.breaker.reset_timeout),
            }
            if is_open:
                since = now if circuit.out_since is None else circuit.out_since
                report.update(
                    due=milliseconds(circuit.due - now),
                    out=milliseconds(now - since),
                    # An error's text may have bytes in it that are no text.
                    err=circuit.error[:500].encode(errors="replace").decode(),
                    fault=circuit.fault.value if circuit.fault else "",
                    q=circuit.question,
                    hold=trial_of(circuit, now) is not None,
                    asks=name in asking,
                    by_hand=name in by_hand,
                    keep=now < shared.kept_until,
                )
            wanted = desired[name] = list(shared.desired.copy())
            made = wanted[-1].made if wanted else shared.drain_at
            drains[field] = {
                "v": str(shared.drain_version),
                # As it is stored: what this process refuses is not taken back for the others.
                "on": wanted[-1].drained if wanted else shared.drain_on,
                "asked": bool(wanted),
                "force": bool(wanted) and wanted[-1].forced,
                "age": milliseconds(now - made, KEEP_DRAINS),
            }
        held = {self._fields[name]: peer.connections for name, peer in group.peers.items()}
        request = {
            "me": link.me,
            "host": link.host,
            "heartbeat": json.dumps(held),
            "circuits": circuits,
            "drains": drains,
            "fleet": any(question.fleet for question in asked),
            "alive": ALIVE,
            "moments": MOMENTS,
            "history": HISTORY,
            "keep_drains": KEEP_DRAINS,
        }
        return Request(now, asked, seen, desired, json.dumps(request))

    def apply(self, group: PeerGroup, request: Request, answer: bytes) -> str:
        """Apply what Redis answers; return what is wrong with it, or ""."""
        said = json.loads(bytes(answer).decode(errors="replace"))
        asking = {question.peer for question in request.asked}
        for name, seen in request.seen.items():
            stored = said["circuits"][self._fields[name]]
            if name in asking:
                self._apply_lease(self._shared[name], request.at, stored)
            self._apply_circuit(group.peers[name], seen, stored)
        drains = [
            (group.peers[name], said["drains"].get(self._fields[name])) for name in request.seen
        ]
        # Those that take connections again come first: at no moment is everything drained.
        for peer, drain in sorted(drains, key=lambda one: one[1] is None or one[1]["on"] is True):
            self._apply_drain(group, peer, request.desired[peer.name], drain)
        wrong = ""
        if said.get("refused"):
            wrong = f"takes no writes: {said['refused']}"
        elif said.get("garbage"):
            wrong = "holds what no process of ours has written"
        for question in request.asked:
            if question.peer:
                question.answer = self._shared[question.peer].left_to_others
            elif question.fleet:
                question.answer = said.get("fleet")
            else:
                question.answer = not wrong and self.has_published_all
        return wrong

    @property
    def has_published_all(self) -> bool:
        """Whether Redis has all desired states of this process."""
        return not any(shared.desired for shared in self._shared.values())

    def after_fork(self) -> None:
        """In the child: a lease is its parent's."""
        for shared in self._shared.values():
            shared.forget_lease()

    def _apply_lease(self, shared: SharedPeer, asked: float, said: Mapping[str, Any]) -> None:
        # Before anybody is answered: who has the answer takes this away.
        if not said["leased"]:
            shared.forget_lease()
        elif said["s"] == "open":
            shared.kept_until = asked + self._lease / 1000

    def _apply_circuit(self, peer: Peer, seen: Circuit, said: Mapping[str, Any]) -> None:
        shared, breaker = self._shared[peer.name], peer.breaker
        version, is_open = int(said["v"]), said["s"] == "open"
        due_in = seconds_of(said.get("due"), 2 * breaker.reset_timeout)
        held_for = min(seconds_of(said.get("held"), self._lease / 1000), INTERVAL)
        shared.left_to_others = 0.0 if said["leased"] else max(due_in, held_for, 0.001)
        if said["done"]:
            # What was said here.
            shared.agreed = Agreed(version, is_open, seen.generation)
            return
        now = breaker._clock()
        if version <= shared.agreed.version:
            if is_open and held_for:
                # Somebody is at it: to ask for the trial would be of no use.
                put_off = partial(events.put_off, generation=seen.generation, due=now + held_for)
                breaker.replace(put_off, now)
            return
        event: CircuitEvent | None = None
        if is_open:
            # This process's own trial comes a little later than the fleet's, spread as widely as
            # ever, and only if the fleet is silent.
            spread = breaker.reset_timeout * 2 * JITTER * breaker._jitter()
            event = partial(
                events.opened_elsewhere,
                generation=seen.generation,
                due=now + due_in + spread,
                out_for=seconds_of(said.get("out"), 365 * 86400),
                error=str(said.get("err") or "")[:500],
                fault=fault_of(said.get("fault")),
                question=str(said.get("q") or "")[:50],
            )
        elif seen.state != CLOSED:
            event = partial(events.closed_elsewhere, generation=seen.generation)
        after = seen
        if event is not None:
            before, after = breaker.apply(event, now, elsewhere=True)
            if after is before:
                # It has changed meanwhile, or is being tried: the next round trip sees to it.
                return
        shared.agreed = Agreed(version, is_open, after.generation)

    def _apply_drain(
        self,
        group: PeerGroup,
        peer: Peer,
        sent: list[DesiredState],
        said: Mapping[str, Any] | None,
    ) -> None:
        if said is None:
            return
        shared, version = self._shared[peer.name], int(said["v"])
        was_answered = said["done"] is True
        was_refused = was_answered and said.get("refused") is True
        if version > shared.drain_version or was_answered:
            shared.drain_on = said["on"] is True
            shared.drain_at = self._clock() - seconds_of(said.get("age"), KEEP_DRAINS)
            # A desired state that has come meanwhile is younger.
            if len(shared.desired) <= len(sent):
                elsewhere = said.get("taken") is not True
                refused = group.apply_drained(peer, shared.drain_on, elsewhere=elsewhere)
                if refused:
                    log(
                        logging.WARNING,
                        "%s: another process drained %s (%s), this one does not: no other peer "
                        "here takes connections. It is drained as soon as another does.",
                        group.name,
                        peer.name,
                        peer.address,
                    )
            # Last: what is broken off above is applied again.
            shared.drain_version = max(version, shared.drain_version)
        if was_refused:
            log(
                logging.WARNING,
                "%s: %s is not drained: others have drained all other peers",
                group.name,
                peer.name,
            )
        for desired in sent if was_answered else ():
            desired.was_refused = was_refused and desired.drained
            with contextlib.suppress(ValueError):
                shared.desired.remove(desired)
