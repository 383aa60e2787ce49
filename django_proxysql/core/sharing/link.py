"""A process's one connection to a Redis, and the thread that alone uses it."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import secrets
import socket
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import address_in_words
from ..logger import log
from ..runtime import Living, Worker
from .records import Question
from .url import checked_url

if TYPE_CHECKING:
    from ..group import PeerGroup
    from . import Sharing

#: What Redis does for a process, in one step that nothing else gets in between of: it keeps the
#: time, compares versions and decides. It is run by its SHA, so that it travels once.
SCRIPT = Path(__file__).with_name("sync.lua").read_text(encoding="utf-8")
SHA = hashlib.sha1(SCRIPT.encode()).hexdigest()  # noqa: S324

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
        self._members: Living[Sharing] = Living()
        self._client: Any = None
        self._begin()
        super().__init__("to share circuits with other processes")

    def __repr__(self) -> str:
        return f"<Link to Redis at {self.address}>"

    def after_fork(self) -> None:
        super().after_fork()
        self._begin()
        for member in self._members.all():
            member.after_fork()

    def _begin(self) -> None:
        #: Who this process is to the others.
        self.me = secrets.token_hex(8)
        # redis-py closes its copy of the socket, and that alone; but not here, where a lock of
        # its own may be one that a thread of the parent's held.
        self._inherited, self._client = self._client, None
        # Where the thread does not get to run (uWSGI without threads) it is never emptied.
        self._asked: deque[Question] = deque(maxlen=1000)
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
        is_known = member in self._members
        if not is_known:
            self._members.add(member)
        if not (is_known and self.is_running):
            self.wake()

    def is_needed(self) -> bool:
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

    def _living(self) -> list[tuple[Sharing, PeerGroup]]:
        found = [(member, member.group()) for member in self._members.all()]
        return [(member, group) for member, group in found if group is not None]

    def _round_trip(
        self, now: float, members: list[tuple[Sharing, PeerGroup]], asked: list[Question]
    ) -> float:
        requests = [
            (member, group, member.compose(group, [one for one in asked if one.of is member]))
            for member, group in members
        ]
        wrong = ""
        began = time.monotonic()
        try:
            answers = self._exchange([(member.keys, sent.text) for member, _, sent in requests])
            for (member, group, sent), answer in zip(requests, answers):
                if isinstance(answer, Exception):
                    raise answer
                wrong = member.apply(group, sent, answer) or wrong
        except Exception as exc:
            self.answers = False
            self._client = None
            # A fleet that lost its Redis at one moment is not to come back at one moment.
            wait = INTERVAL * (1 + random.random())
            self._retry_at = now + wait
            was_answered = self._answered_at > float("-inf")
            self._of_no_use(now, trouble_from(exc, self._options, was_answered=was_answered))
            return wait
        self._clocked(time.monotonic() - began)
        self.answers, self._answered_at = True, now
        self.trouble = None
        if wrong:
            self._of_no_use(now, Trouble(wrong))
        elif self._is_slow:
            milliseconds = int(PATIENCE * 1000)
            self._in_trouble(now, "slow", f"it took more than {milliseconds} ms {SLOW} times")
        elif self._trouble_since is not None:
            seconds = now - self._trouble_since
            self._trouble_since, self._said = None, frozenset()
            log(logging.INFO, "Redis at %s is of use again, after %.0f s", self.address, seconds)
        return INTERVAL

    def _exchange(self, calls: list[tuple[list[str], str]]) -> list[Any]:
        """Run the script once for each of the keys and arguments, in one round trip.

        :returns: what each answers, or the exception that it ended with.
        :raises Exception: whatever redis-py raises: there are no answers.
        """
        if self._client is None:
            import redis

            self._inherited = None
            # One connection, for only the thread uses it.
            self._client = redis.Redis(connection_pool=redis.ConnectionPool(**self._options))
        answers = self._send("evalsha", SHA, calls)
        unknown = [n for n, said in enumerate(answers) if type(said).__name__ == "NoScriptError"]
        if unknown:
            # A Redis that was just started has not seen it yet.
            again = self._send("eval", SCRIPT, [calls[position] for position in unknown])
            for position, answer in zip(unknown, again):
                answers[position] = answer
        return answers

    def _send(self, command: str, script: str, calls: list[tuple[list[str], str]]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for keys, text in calls:
            getattr(pipeline, command)(script, len(keys), *keys, text)
        answers: list[Any] = pipeline.execute(raise_on_error=False)
        return answers

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


# What is wrong with a Redis, in words that say what to do about it


class Trouble(NamedTuple):
    """Why a Redis is of no use."""

    #: What it does or does not do, as a sentence without its subject. Holds no secret.
    says: str
    #: The error's own words; "" where there are none.
    detail: str = ""

    def __str__(self) -> str:
        return f"it {self.says} ({self.detail})" if self.detail else f"it {self.says}"


NO_ANSWER = Trouble("does not answer")

#: redis-py's names for what only a node of a Redis Cluster answers.
_OF_A_CLUSTER = {"AskError", "ClusterCrossSlotError", "ClusterDownError", "MovedError"}


def trouble_from(exc: BaseException, options: Mapping[str, Any], *, was_answered: bool) -> Trouble:
    """Return what an error of redis-py's says about a Redis and about SHARED_STATE.

    :param options: what SHARED_STATE has redis-py connect with.
    :param was_answered: this Redis has answered this process before.
    """
    causes = [exc]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    said = " ".join(map(str, causes)).lower()
    names = {cls.__name__ for cause in causes for cls in type(cause).__mro__}
    uses_tls = "SSL" in getattr(options.get("connection_class"), "__name__", "")

    def holds(*parts: str) -> bool:
        return any(part in said for part in parts)

    if "NoPermissionError" in names or holds("noperm"):
        says = "does not let our user run its scripts; see SHARED_STATE, and the user's ACL"
    elif "AuthenticationError" in names or holds("noauth", "wrongpass", "invalid password"):
        lacking = "" if options.get("password") else ", for SHARED_STATE has none"
        says = f"refused our password{lacking}; see SHARED_STATE"
    elif "hello" in said and "unknown command" in said:
        says = (
            "is older than Redis 6, which protocol=3 takes; see SHARED_STATE: protocol=2 is the "
            "default"
        )
    elif names & _OF_A_CLUSTER:
        says = "is a Redis Cluster, which SHARED_STATE cannot use; name a Redis that is none"
    elif "unknown command" in said and "eval" in said:
        says = "runs no scripts, as a Redis Sentinel does not; see SHARED_STATE"
    elif holds("db index is out of range", "invalid db index"):
        says = f"has no database {options.get('db', 0)}; see SHARED_STATE"
    elif "SSLCertVerificationError" in names:
        says = "shows a TLS certificate that is not trusted; see ssl_ca_certs in SHARED_STATE"
    elif "SSLError" in names or holds("handshake"):
        says = "does not speak TLS as rediss:// in SHARED_STATE demands"
    elif "gaierror" in names:
        says = "has a host name that cannot be resolved; see SHARED_STATE"
    elif "FileNotFoundError" in names:
        says = "cannot be connected to: a file that SHARED_STATE names does not exist"
    elif not uses_tls and not was_answered and holds("reset by peer", "closed by server"):
        says = "ends connections at once; a port for TLS does so: then SHARED_STATE is rediss://…"
    elif "InvalidResponse" in names:
        says = "answers as no Redis does; see SHARED_STATE"
    elif "ResponseError" in names:
        says = "refused a command"
    else:
        says = NO_ANSWER.says
    return Trouble(says, f"{type(exc).__name__}: {' '.join(str(exc).split())}")


#: The links of this process, by URL.
_links: dict[str, Link] = {}


def link_to(url: str) -> Link:
    link = _links.get(url) if isinstance(url, str) else None
    # Of two threads that come here at once, one's is kept.
    return link or _links.setdefault(url, Link(url))
