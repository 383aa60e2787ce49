"""A process's one connection to a Redis, and the thread that alone uses it."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import random
import secrets
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import address_in_words
from ..logger import log
from ..runtime import Worker
from .scripts import FLEET, HEARTBEAT, SHA, SYNC
from .trouble import Trouble, trouble_from
from .url import checked_url

if TYPE_CHECKING:
    from . import Sharing

#: Seconds between two round trips while all is well.
INTERVAL = 1.0

#: The longest that a connect whose peer's trial is due waits for leave to make it, in
#: seconds; and so many round trips in a row that take longer are worth a word.
PATIENCE = 0.05
SLOW = 5

#: Seconds after which a process that says nothing counts as gone.
ALIVE = 5


class Link(Worker):
    """This process's connection to one Redis, for all balancers that name it.

    :param url: the setting SHARED_STATE.
    :raises ConfigError: see :func:`checked_url`.
    """

    def __init__(self, url: str) -> None:
        self._options = checked_url(url)
        #: Which host this is to the others.
        self.host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
        #: What the keys begin with.
        self.prefix: str = self._options.pop("prefix")
        #: Where Redis is, as people write it; without a password.
        self.address = address_in_words(
            self._options.get("host"), self._options.get("port", 6379), self._options.get("path")
        )
        self._members: dict[int, weakref.ref[Sharing]] = {}
        self._client: Any = None
        self._begin()
        super().__init__("to share circuits with other processes")

    def __repr__(self) -> str:
        return f"<Link to Redis at {self.address}>"

    def after_fork(self) -> None:
        """In the child: another process to the others, with nothing of its parent's."""
        super().after_fork()
        self._begin()

    def _begin(self) -> None:
        #: Who this process is to the others.
        self.me = secrets.token_hex(8)
        # redis-py closes its copy of the socket, and that alone; but not here, where a lock of
        # its own may be one that a thread of the parent's held.
        self._inherited, self._client = self._client, None
        # Where the thread does not get to run (uWSGI without threads) it is never emptied.
        self._asked: deque[Question] = deque(maxlen=1000)
        self._requests = itertools.count()
        #: Whether the last round trip went well, and when it did.
        self.answers = False
        self._answered_at = float("-inf")
        #: Not before this moment is Redis tried again, and no caller waits for an answer.
        self._retry_at = self._silent_until = float("-inf")
        #: How long a caller waited for the answer that has not come.
        self._waited_for = 0.0
        #: What is wrong with Redis, as far as is known; None: nothing.
        self.trouble: Trouble | None = None
        #: Since when there is trouble, and what has been logged of it: each kind once.
        self._trouble_since: float | None = None
        self._said: frozenset[str] = frozenset()
        #: How many round trips have been slow lately: each one counts, and each swift one takes
        #: one off.
        self._slow = 0
        self._is_slow = False

    # The thread

    def join(self, member: Sharing) -> None:
        """Share what ``member`` knows from now on. Costs nothing later, and never blocks."""
        known = self._members.get(id(member))
        if known is None or known() is not member:
            self._members[id(member)] = weakref.ref(member)
            self.wake()
        elif not self.is_running:
            self.wake()

    def is_needed(self) -> bool:
        """Return whether a balancer shares its state by this link."""
        return bool(self._living())

    def step(self, now: float | None = None) -> float | None:
        """Do one round trip, if it is time for one.

        :param now: for tests: the time, in seconds, on a clock that is used for nothing else.
        :returns: seconds until the next one; None when no balancer shares its state any more.
        """
        now = time.monotonic() if now is None else now
        # What is asked from here on is the next step's, whether this one fails or not.
        asked: list[Question] = []
        try:
            # For a moment there may be two threads: one may take what the other has seen.
            with contextlib.suppress(IndexError):
                while True:
                    asked.append(self._asked.popleft())
            members = self._living()
            if not members:
                self._client = None
                return None
            if now < self._retry_at:
                return self._retry_at - now
            return self._round_trip(now, members, asked)
        finally:
            for question in asked:
                question.bell.release()

    def _living(self) -> list[Sharing]:
        living = []
        for key, reference in list(self._members.items()):
            member = reference()
            if member is None:
                self._members.pop(key, None)
            else:
                living.append(member)
        return living

    def _round_trip(self, now: float, members: list[Sharing], asked: list[Question]) -> float:
        asking = [question for question in asked if question.peer]
        composed = [
            (member, member.compose([question for question in asking if question.of is member]))
            for member in members
        ]
        views = [question for question in asked if question.fleet]
        alive = json.dumps({"alive": ALIVE})
        began = time.monotonic()
        try:
            answers = self._exchange(
                [
                    (HEARTBEAT if request.is_quiet else SYNC, member.keys, request.text(self))
                    for member, request in composed
                ]
                + [(FLEET, question.of.keys, alive) for question in views]
            )
            said = ""
            behind = []
            for (member, request), answer in zip(composed, answers):
                if isinstance(answer, Exception):
                    raise answer
                if request.is_quiet:
                    same = json.loads(answer)
                    said = refusal(same) or said
                    if same["same"] is not True:
                        behind.append((member, replace(request, is_quiet=False)))
                else:
                    said = member.apply(request, answer) or said
            if behind:
                # Something has happened: once more, in full.
                calls = [(SYNC, member.keys, request.text(self)) for member, request in behind]
                for (member, request), answer in zip(behind, self._exchange(calls)):
                    if isinstance(answer, Exception):
                        raise answer
                    said = member.apply(request, answer) or said
        except Exception as exc:
            self.answers = False
            self._client = None
            # A fleet that lost its Redis at one moment is not to come back at one moment.
            wait = INTERVAL * (1 + random.random())
            self._retry_at = now + wait
            self._of_no_use(
                now,
                trouble_from(
                    exc,
                    database=self._options.get("db", 0),
                    has_password=bool(self._options.get("password")),
                    uses_tls="SSL"
                    in getattr(self._options.get("connection_class"), "__name__", ""),
                    was_answered=self._answered_at > float("-inf"),
                ),
            )
            return wait
        self._clocked(time.monotonic() - began)
        self.answers, self._answered_at = True, now
        for question, answer in zip(views, answers[len(composed) :]):
            if not isinstance(answer, Exception):
                question.answer = answer
        for question in asked:
            if question.peer:
                question.answer = question.of.answer_for(question.peer)
            elif not question.fleet:
                question.answer = not said and question.of.has_published_all
        self.trouble = None
        if said:
            self._of_no_use(now, Trouble(said))
        elif self._is_slow:
            milliseconds = int(PATIENCE * 1000)
            self._in_trouble(now, "slow", f"it took more than {milliseconds} ms {SLOW} times")
        elif self._trouble_since is not None:
            seconds = now - self._trouble_since
            self._trouble_since, self._said = None, frozenset()
            log(logging.INFO, "Redis at %s is of use again, after %.0f s", self.address, seconds)
        return INTERVAL

    def _exchange(self, calls: list[tuple[str, list[str], str]]) -> list[Any]:
        """Run scripts, in one round trip.

        :returns: what each answers, or the exception that it ended with.
        :raises Exception: whatever redis-py raises: there are no answers.
        """
        if self._client is None:
            import redis

            self._inherited = None
            # One connection, for only the thread uses it.
            self._client = redis.Redis(connection_pool=redis.ConnectionPool(**self._options))
        answers = self._run_scripts("evalsha", calls)
        unknown = [
            position
            for position, answer in enumerate(answers)
            if type(answer).__name__ == "NoScriptError"
        ]
        if unknown:
            # A Redis that was just started has not seen them yet.
            again = self._run_scripts("eval", [calls[position] for position in unknown])
            for position, answer in zip(unknown, again):
                answers[position] = answer
        return answers

    def _run_scripts(self, command: str, calls: list[tuple[str, list[str], str]]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for script, keys, text in calls:
            which = SHA[script] if command == "evalsha" else script
            getattr(pipeline, command)(which, len(keys), *keys, text)
        answers: list[Any] = pipeline.execute(raise_on_error=False)
        return answers

    def serial(self) -> str:
        """Return what no other request of any process is called."""
        return f"{self.me}-{next(self._requests)}"

    # Trouble

    def _clocked(self, seconds: float) -> None:
        """Note how long a round trip took, on the clock of those who wait for it."""
        if seconds <= PATIENCE:
            self._slow = max(0, self._slow - 1)
            self._is_slow &= self._slow > 0
        elif self._slow < SLOW:
            self._slow += 1
            self._is_slow |= self._slow == SLOW

    def _of_no_use(self, now: float, trouble: Trouble) -> None:
        password = self._options.get("password")
        if password:
            trouble = Trouble(trouble.says, trouble.detail.replace(str(password), "…"))
        self.trouble = trouble
        self._in_trouble(now, "of no use", str(trouble), kind=trouble.says)

    def _in_trouble(self, now: float, what: str, why: str, kind: str = "") -> None:
        if self._trouble_since is None:
            self._trouble_since = now
        if kind in self._said:
            return
        self._said |= {kind}
        log(
            logging.WARNING,
            "Redis at %s, by which processes share their circuits, is %s: %s. Each goes on with "
            "what it knows itself.",
            self.address,
            what,
            why,
        )

    # Questions to Redis, asked by others than the thread

    def ask(self, question: Question, seconds: float) -> Any:
        """Return what Redis answers, or None: it did not within ``seconds``, or is away."""
        now = time.monotonic()
        if now < self._retry_at:
            return None
        # An operator has more patience than a connect, which may have given up just now.
        if now < self._silent_until and seconds <= self._waited_for:
            if not question.peer:
                return None
            # Not waited for, but asked: a lease that is granted is kept.
            seconds = 0.0
        self._asked.append(question)
        self.wake()
        if not question.bell.acquire(timeout=seconds) and seconds:
            # The next caller does not wait as well.
            self._silent_until, self._waited_for = now + INTERVAL, seconds
        return question.answer

    @property
    def is_late(self) -> bool:
        """Whether an answer that has not come may still: the machine is busy, and Redis is well."""
        return self.answers and time.monotonic() - self._answered_at < 3 * INTERVAL


class Question:
    """Something to be asked in the thread's next round trip."""

    __slots__ = ("answer", "bell", "by_hand", "fleet", "of", "peer")

    def __init__(
        self, of: Sharing, *, peer: str = "", by_hand: bool = False, fleet: bool = False
    ) -> None:
        self.of = of
        #: Whose trial somebody here is ready to make; and whether that is due or not.
        self.peer = peer
        self.by_hand = by_hand
        self.fleet = fleet
        self.answer: Any = None
        self.bell = threading.Lock()
        self.bell.acquire()


def refusal(said: Mapping[str, Any]) -> str:
    """Return what a script says of its writes that failed, as a sentence without its subject."""
    return f"takes no writes: {said['refused']}" if said.get("refused") else ""


#: The links of this process, by URL.
_links: dict[str, Link] = {}


def link_to(url: str) -> Link:
    if not isinstance(url, str):
        # Says what is wrong: it is no URL.
        checked_url(url)
    link = _links.get(url)
    # Of two threads that come here at once, one's is kept.
    return link if link is not None else _links.setdefault(url, Link(url))
