"""What one process finds out, the others know: circuits, trials and drains through Redis.

Each process keeps its own circuits, and its connects and statements look at nothing else. One
thread a process (:mod:`.link`) compares them with what Redis knows, in one round trip a
second, and at once when a circuit has changed here. What the others have found out
is applied to the local circuit (:mod:`.agreement`).

How it holds
------------

* **Redis decides, in one script** (``sync.lua``), which is atomic there and keeps the time:
  hosts' clocks are never compared, only durations travel.
* **Versions.** Each record in Redis has one. A process that reports a change says which version it
  knew. A change that was made in ignorance of another one is dropped, and the other one adopted. A
  record that is older than what a process knows of it, or gone, was lost (FLUSHALL, a failover),
  and is written again.
* **Desired states have an age.** Of what two operators ask for the younger counts, also where the
  older reaches Redis last. Of two that drain the last two peers at once Redis refuses one.
* **State, not messages.** A process reports the difference between the circuit and what was last
  agreed on. A round trip that failed, a thread that was killed anywhere, a fork: the next round
  trip finds the same difference.
* **One trial at a time** is a lease in the peer's record. A process whose trial is due asks for it,
  and the thread renews it while the trial is under way.
* **Redis is trusted only so far.** This process's own settings bound durations. What cannot be read
  is left out.

docs/howto/redis.rst says what is shared and what is not, and what a Redis that fails or is slow
costs. No lock is held while anything waits. Only the thread uses the connection to Redis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..logger import complain
from ..peer import Peer
from .agreement import Agreement
from .link import INTERVAL, NO_ANSWER, PATIENCE, Link
from .records import HISTORY, DesiredState, Fleet, Moment, Question
from .url import checked_url

__all__ = ["Fleet", "Link", "Moment", "Sharing", "checked_url"]

#: The longest that an operator waits for Redis, in seconds.
OPERATOR_WAITS = 1.0


class Sharing(Agreement):
    """What one balancer shares with the same balancer in other processes.

    It is ``balancer.sharing`` where the balancer has ``SHARED_STATE``, by :meth:`.PeerGroup.share`.

    :param group: whose circuits and drains they are.
    :param link: for tests, in place of the process's own.
    :raises ConfigError: see :func:`checked_url`.
    """

    def __repr__(self) -> str:
        return f"<Sharing by Redis at {self.link.address}>"

    def start(self) -> None:
        """Begin to share. Costs nothing where that has begun, and waits for nothing."""
        self.link.join(self)

    def has_news(self) -> None:
        """Publish at once what has changed here."""
        self.link.wake()

    # What operators ask

    @property
    def is_answered(self) -> bool:
        """Whether the last round trip to Redis, at most a second ago, went well."""
        return self.link.answers

    @property
    def trouble(self) -> str:
        """What is wrong with Redis, as a sentence without its subject; holds no secret.

        ``does not answer`` where nothing is known but that.
        """
        trouble = self.link.trouble
        return (NO_ANSWER if trouble is None else trouble).says

    def settle(self, seconds: float = OPERATOR_WAITS) -> bool:
        """Wait until Redis knows what this process knows, and this process what Redis does.

        :returns: whether it does. If not, drains and circuits of this process are its own until
            Redis is back, which then gets them from it, if it still runs.
        """
        self.start()
        return bool(self.link.ask(Question(self), seconds))

    def publish(self, peer: Peer, drained: bool, *, forced: bool = False) -> DesiredState:
        """Have all processes drain or undrain a peer.

        The last desired state counts, of whichever process, however late it comes to Redis.

        :param forced: drain it even if that leaves no peer undrained.
        :returns: the desired state; it says whether it was refused, once Redis has answered.
        """
        desired = DesiredState(drained, forced, self._clock())
        self._shared[peer.name].desired.append(desired)
        return desired

    def fleet(self, seconds: float = PATIENCE) -> Fleet | None:
        """Ask what all processes know together; None where Redis does not say in time."""
        self.start()
        answer = self.link.ask(Question(self, fleet=True), seconds)
        try:
            return None if answer is None else self._fleet_from(answer)
        except Exception:
            complain("What Redis at %s says of the other processes is garbage", self.link.address)
            return None

    def _fleet_from(self, said: Mapping[str, Any]) -> Fleet:
        now, held, shared = said["now"] / 1000, said["connections"], self._shared.items()
        timeline = []
        for text in said["moments"]:
            try:
                told = json.loads(text)
                moment = Moment(
                    self._names[told["p"]],
                    str(told["s"]),
                    float(told["t"]) / 1000,
                    str(told["e"])[:500],
                )
            except (KeyError, TypeError, ValueError):
                # Of a peer that this process does not have; or garbage.
                continue
            if moment.when >= now - HISTORY:
                timeline.append(moment)
        return Fleet(
            said["processes"],
            {name: int(held.get(field, 0)) for name, field in self._fields.items()},
            tuple(timeline),
            frozenset(name for name, known in shared if known.agreed.is_open),
            frozenset(name for name, known in shared if known.drain_on),
            now,
        )

    # What a breaker asks

    def may_try(self, name: str, by_hand: bool = False) -> float:
        """Return for how many seconds a trial that is due is to be left to others; 0: go ahead.

        Waits 50 ms at most.

        :param by_hand: an operator asks for it, due or not, and waits for a second.
        """
        group, shared = self.group(), self._shared[name]
        # What the others do not know of is this process's own trial; and one that has no other
        # peer left connects, whatever is said.
        if group is None or not shared.agreed.is_open or not group.has_usable():
            return 0.0
        self.start()
        if self._clock() < shared.kept_until:
            shared.forget_lease()
            # It goes on from now on, by the trial that is under way.
            self.link.wake()
            return 0.0
        # First: a no that comes right after we have given up is to be seen.
        waited, shared.waited = shared.waited, True
        question = Question(self, peer=name, by_hand=by_hand)
        answer = self.link.ask(question, OPERATOR_WAITS if by_hand else PATIENCE)
        if answer is None and not (by_hand or waited) and self.link.is_late:
            return INTERVAL
        # A lease that was kept, and has run out meanwhile, has been waited for as well.
        shared.forget_lease()
        return float(answer or 0.0)
