"""What one process finds out, the others know: circuits, trials and drains through Redis.

Each process keeps its own circuits, and its connects and statements look at nothing else. One
thread a process (:class:`Link`) compares them with what Redis knows, in one round trip a
second, and at once when a circuit has changed here. What the others have found out is applied
to the local circuit (:meth:`PeerBreaker.learn_open <django_proxysql.PeerBreaker.learn_open>`).

How it holds
------------

* **Redis decides, in one script** (:data:`SYNC`), which is atomic there and keeps the time:
  hosts' clocks are never compared, only durations travel.
* **Versions.** Each record in Redis has one, and whoever reports a change says which version it
  knew. A change that was made in ignorance of another one is dropped, and the other one
  adopted: a late word changes nothing. A record that is older than what a process knows of it,
  or gone, was lost (FLUSHALL, a failover), and is written again.
* **State, not messages.** What is reported is the difference between the circuit and what was
  last agreed on. A round trip that failed, a thread that was killed anywhere, a fork: the next
  round trip finds the same difference.
* **One trial at a time** is a lease in the peer's record. Whoever's trial is due asks for it, and
  the thread renews it while the trial is under way. It runs out by itself where its holder dies.
* **Redis is believed in so far only.** Durations are bounded by this process's own settings;
  what cannot be read is left out; a process that has no other peer left connects whatever the
  others say; and one that has lost all its peers keeps that to itself, for it may be the one
  that is cut off (its openings that nobody has confirmed are withdrawn).
* **Redis away** costs a thread that waits for nothing else. Who asks it for a lease waits
  50 ms at most, and nobody asks again within a second.

No lock is held while anything waits, and nobody but the thread uses the connection to Redis.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import secrets
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from .breaker import CLOSED, Circuit
from .exceptions import ConfigError
from .faults import Fault
from .logger import complain, logger

if TYPE_CHECKING:
    from .balancer import LoadBalancer
    from .peer import Peer

__all__ = ["Fleet", "Link", "Moment", "Sharing", "checked_url"]

#: Seconds between two round trips while all is well.
INTERVAL = 1.0

#: The longest that a connect whose peer's trial is due waits to hear whether it may make it.
PATIENCE = 0.05

#: Seconds for which the thread waits for Redis. Nobody waits for the thread as long as that.
TIMEOUT = 0.25

#: Seconds after which a process that is not heard of counts as gone.
ALIVE = 5

#: Seconds for which the fleet's record of what happened goes back.
HISTORY = 3600

PREFIX = "django-proxysql"

SYNC = """
local request = cjson.decode(ARGV[1])
local circuits, drains, processes, counts, timeline = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local me = request.me
local now_us = request.now
if type(now_us) ~= 'number' then
  local time = redis.call('TIME')
  now_us = tonumber(time[1]) * 1000000 + tonumber(time[2])
end
local now = math.floor(now_us / 1000)
local refused, garbage = nil, 0
local DAY = 86400000

-- Where Redis is full or a replica, what is written fails, and what is read does not.
local function write(...)
  local done = redis.pcall(...)
  if type(done) == 'table' and done.err then
    refused = done.err
    return false
  end
  return true
end

local function between(value, least, most)
  value = tonumber(value)
  if value and value >= least and value <= most then return math.floor(value) end
end

local function read(key, field)
  local text = redis.pcall('HGET', key, field)
  if type(text) == 'table' then
    garbage = garbage + 1
    return nil
  end
  if not text then return nil end
  local good, record = pcall(cjson.decode, text)
  if good and type(record) == 'table' then
    -- A version from next week would never be outdone.
    record.v = between(record.v, 1, now_us + 1000 * DAY)
    if record.v then return record end
  end
  garbage = garbage + 1
  return nil
end

local function store(key, field, record, seconds)
  local copy = {}
  for name, value in pairs(record) do copy[name] = value end
  -- cjson writes 14 digits of a number, and this one has 16.
  copy.v = string.format('%.0f', record.v)
  return write('HSET', key, field, cjson.encode(copy)) and write('PEXPIRE', key, seconds * 1000)
end

local function keep(key, seconds)
  local left = redis.call('PTTL', key)
  if left > -2 and left < seconds * 500 then write('PEXPIRE', key, seconds * 1000) end
end

local function note(field, state, why)
  local moment = cjson.encode({p = field, s = state, t = now, e = why})
  if write('RPUSH', timeline, moment) then
    write('LTRIM', timeline, -request.moments, -1)
    write('PEXPIRE', timeline, request.history * 1000)
  end
end

local reply = {circuits = {}, drains = {}}

for field, theirs in pairs(request.circuits) do
  local record = read(circuits, field)
  local known = tonumber(theirs.v)
  local version = record and record.v or 0
  local before = record
  local following = math.max(now_us, version + 1, known + 1)
  local is_open = record and record.s == 'open'
  local told, changed, done, why = nil, false, false, ''
  if record then
    record.due = between(record.due, 0, now + DAY) or now
    record.out = between(record.out, 0, now) or now
    record.hu = between(record.hu, 0, now + DAY) or 0
    if type(record.h) ~= 'string' then record.h = '' end
  end
  local function as_told(version, by)
    return {v = version, s = 'open', due = now + theirs.due, out = now - theirs.out,
            err = theirs.err, fault = theirs.fault, q = theirs.q, by = by, h = '', hu = 0}
  end
  if theirs.op == 'open' and version <= known then
    local fresh = as_told(following, me)
    if is_open then
      fresh.out, fresh.h, fresh.hu = record.out, record.h, record.hu
      -- Two have found the same.
      if record.by ~= me then fresh.by = '' end
    else
      told, why = 'open', theirs.err
    end
    record, done = fresh, true
  elseif theirs.op == 'close' and version <= known then
    if is_open then told = 'closed' end
    record, done = {v = following, s = 'closed'}, true
  elseif theirs.op == 'withdraw' and is_open and record.by == me then
    told, why = 'closed', 'withdrawn'
    record, done = {v = following, s = 'closed'}, true
  elseif version < known and (theirs.s == 'open' or record) then
    if theirs.s == 'open' then
      record = as_told(known, '')
    else
      record = {v = known, s = 'closed'}
    end
    changed = true
  end
  changed = changed or done
  local granted = false
  if record and record.s == 'open' then
    local other = record.h ~= '' and record.h ~= me and record.hu > now
    if theirs.bid then
      if not other and record.due <= now then
        record.h, record.hu, granted, changed = me, now + theirs.lease, true, true
      end
    elseif theirs.hold then
      if not other then
        record.h, record.hu, changed = me, now + theirs.lease, true
      end
    elseif record.h == me then
      record.h, record.hu, changed = '', 0, true
    end
  else
    granted = true
  end
  if changed then
    if store(circuits, field, record, request.history) then
      if told then note(field, told, why) end
    else
      -- Nobody can be kept from trying, and nobody has been told.
      record, granted, done = before, true, false
    end
  end
  local held = 0
  if record and record.s == 'open' and record.h ~= '' and record.h ~= me then
    held = math.max(0, record.hu - now)
  end
  reply.circuits[field] = record and {
    v = string.format('%.0f', record.v), s = record.s, done = done, granted = granted,
    due = math.max(0, (record.due or now) - now), out = math.max(0, now - (record.out or now)),
    err = record.err, fault = record.fault, q = record.q, held = held,
  } or {v = '0', s = 'closed', done = done, granted = granted}
end

for field, theirs in pairs(request.drains) do
  local record = read(drains, field)
  if record and type(record.on) ~= 'boolean' then record, garbage = nil, garbage + 1 end
  local known = tonumber(theirs.v)
  local version = record and record.v or 0
  local was = record and record.on or false
  if theirs.wish then
    local wished = {v = math.max(now_us, version + 1, known + 1), on = theirs.on}
    if store(drains, field, wished, request.wishes) then
      if was ~= theirs.on then note(field, theirs.on and 'drained' or 'undrained', '') end
      reply.drains[field] = {v = string.format('%.0f', wished.v), on = wished.on, done = true}
    end
  elseif version < known then
    store(drains, field, {v = known, on = theirs.on}, request.wishes)
  elseif record then
    reply.drains[field] = {v = string.format('%.0f', version), on = was, done = false}
  end
end

write('ZADD', processes, now, me)
write('HSET', counts, me, request.beat)
local gone = redis.pcall('ZRANGEBYSCORE', processes, '-inf', now - 60000, 'LIMIT', 0, 100)
if type(gone) == 'table' and #gone > 0 then
  write('ZREM', processes, unpack(gone))
  write('HDEL', counts, unpack(gone))
end
keep(processes, 60)
keep(counts, 60)
keep(circuits, request.history)
keep(drains, request.wishes)
reply.refused, reply.garbage = refused, garbage
return cjson.encode(reply)
"""

FLEET = """
local request = cjson.decode(ARGV[1])
local now = request.now
if type(now) ~= 'number' then
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000000 + tonumber(time[2])
end
now = math.floor(now / 1000)
local alive = redis.call('ZRANGEBYSCORE', KEYS[3], now - request.alive * 1000, '+inf')
local sums = {}
for first = 1, #alive, 500 do
  local part = {}
  for i = first, math.min(first + 499, #alive) do part[#part + 1] = alive[i] end
  for _, text in ipairs(redis.call('HMGET', KEYS[4], unpack(part))) do
    local good, beat = pcall(cjson.decode, text or '')
    if good and type(beat) == 'table' then
      for field, held in pairs(beat) do
        if type(held) == 'number' then sums[field] = (sums[field] or 0) + held end
      end
    end
  end
end
return {tostring(#alive), cjson.encode(sums), tostring(now),
        unpack(redis.call('LRANGE', KEYS[5], 0, -1))}
"""

_SHA = {script: hashlib.sha1(script.encode()).hexdigest() for script in (SYNC, FLEET)}  # noqa: S324

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


def checked_url(url: object) -> dict[str, Any]:
    """Return what to connect to Redis with, and under ``prefix`` what its keys begin with.

    :param url: the setting SHARED_STATE: ``redis://``, ``rediss://`` or ``unix://``.
    :raises ConfigError: it is no such URL, or the package redis is not installed. The message
        quotes nothing of it, for there may be a password in it.
    """
    problem = ConfigError(
        "SHARED_STATE",
        "is no URL of a Redis",
        "Give 'redis://host:6379/0', 'rediss://…' or 'unix:///path', with what is special in "
        "a password escaped (%40 for @).",
    )
    if not isinstance(url, str):
        raise problem
    try:
        from redis.backoff import NoBackoff
        from redis.connection import parse_url
        from redis.retry import Retry
    except ImportError as exc:
        raise ConfigError(
            "SHARED_STATE",
            f"takes the package redis, which cannot be imported ({type(exc).__name__})",
            'Install it: pip install "django-proxysql[redis]".',
        ) from None
    # redis-py has no annotation for it in some versions.
    parse: Callable[[str], dict[str, Any]] = parse_url
    try:
        parts = urlsplit(url)
        address = url.partition("?")[0]
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        prefix = query.pop("prefix", PREFIX)
        database = parts.path.strip("/")
        if parts.scheme == "unix":
            good = bool(parts.path)
        else:
            good = bool(parts.hostname) and (not database or database.isdigit())
        if not good or not prefix or parts.fragment or parts.port == 0:
            raise problem
        options: dict[str, Any] = parse(f"{address}?{urlencode(query)}")
    except ValueError:
        # urllib's message quotes the part that it stumbled on.
        raise problem from None
    unknown = sorted(set(query) - {"db", "username", "password", "protocol"})
    unknown = [name for name in unknown if not name.startswith("ssl_")]
    if unknown:
        raise ConfigError(
            "SHARED_STATE",
            f"has the unknown option {unknown[0]!r}",
            "Known are prefix, db, protocol, and redis-py's ssl_… ones.",
        )
    return {
        **options,
        "prefix": prefix,
        "socket_timeout": TIMEOUT,
        "socket_connect_timeout": TIMEOUT,
        # The next try is a second later, and the thread's own affair.
        "retry": Retry(NoBackoff(), 0),
    }


class Link:
    """This process's connection to one Redis, for all balancers that name it.

    :param url: the setting SHARED_STATE.
    :param now: for tests: the time in seconds that takes the place of Redis's own.
    :raises ConfigError: see :func:`checked_url`.
    """

    def __init__(self, url: str, *, now: Callable[[], float] | None = None) -> None:
        self._options = checked_url(url)
        #: What the keys begin with.
        self.prefix: str = self._options.pop("prefix")
        #: Where Redis is, as people write it; without a password.
        self.address = str(
            self._options.get("path")
            or f"{self._options.get('host', 'localhost')}:{self._options.get('port', 6379)}"
        )
        self._now = now
        self._members: dict[int, weakref.ref[Sharing]] = {}
        self._forget_connection()
        _forkable.add(self)

    def __repr__(self) -> str:
        return f"<Link to Redis at {self.address}>"

    def _forget_connection(self) -> None:
        """Begin anew: at first, and in the child of a fork, with nothing of its parent's."""
        #: Who this process is to the others.
        self.me = secrets.token_hex(8)
        self._client: Any = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._bell = threading.Lock()
        self._bell.acquire()
        self._asked: deque[_Question] = deque()
        #: Whether the last round trip went well, and when it did.
        self.heard = False
        self._heard_at = float("-inf")
        #: Not before this moment is Redis tried again, and nobody waits for an answer.
        self._retry_at = self._silent_until = float("-inf")
        #: Since when there is trouble, which has been logged.
        self._trouble_since: float | None = None

    # The thread

    def start(self, member: Sharing) -> None:
        """Share what ``member`` knows from now on. Waits for nothing."""
        known = self._members.get(id(member))
        if known is None or known() is not member:
            self._members[id(member)] = weakref.ref(member)
            self.wake()
        thread = self._thread
        if thread is not None and thread.is_alive():
            return
        # Whoever comes second leaves it to the first.
        if self._starting.acquire(blocking=False):
            try:
                thread = threading.Thread(target=self._run, name="django-proxysql", daemon=True)
                thread.start()
                self._thread = thread
            except RuntimeError:
                # No more threads are to be had, or the interpreter is on its way out.
                complain("No thread could be started to share circuits with other processes")
            finally:
                self._starting.release()

    def wake(self) -> None:
        """Have the thread do its next round trip now. Safe in a signal handler or finalizer."""
        try:
            self._bell.release()
        except RuntimeError:
            # It has been woken already.
            pass

    def _run(self) -> None:
        pid = os.getpid()
        while os.getpid() == pid:
            try:
                wait = self.step(time.monotonic())
            except Exception:
                complain("Sharing circuits with other processes failed")
                wait = INTERVAL
            if wait is None:
                self._bell.acquire()
            else:
                self._bell.acquire(timeout=max(0.001, wait))

    def step(self, now: float) -> float | None:
        """Do one round trip, if it is time for one.

        :param now: the time, in seconds, on a clock that is used for nothing else.
        :returns: seconds until the next one; None when there is nobody to do it for.
        """
        # What is asked from here on is the next step's, whether this one fails or not.
        asked = [self._asked.popleft() for _ in range(len(self._asked))]
        try:
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

    def _round_trip(self, now: float, members: list[Sharing], asked: list[_Question]) -> float:
        bids = {(id(question.of), question.peer) for question in asked if question.peer}
        composed = [
            (member, member.compose({peer for of, peer in bids if of == id(member)}))
            for member in members
        ]
        views = [question for question in asked if question.fleet]
        try:
            answers = self._exchange(
                [(SYNC, member.keys, request.text(self)) for member, request in composed]
                + [(FLEET, question.of.keys, self._fleet_request()) for question in views]
            )
            said = ""
            for (member, request), answer in zip(composed, answers):
                if isinstance(answer, Exception):
                    raise answer
                said = member.apply(request, answer) or said
        except Exception as exc:
            self.heard = False
            self._client = None
            # A fleet that lost its Redis at one moment is not to come back at one moment.
            wait = INTERVAL * (1 + random.random())
            self._retry_at = now + wait
            self._in_trouble(now, f"{type(exc).__name__}: {exc}")
            return wait
        self.heard, self._heard_at = True, now
        for question, answer in zip(views, answers[len(composed) :]):
            if not isinstance(answer, Exception):
                question.answer = answer
        for question in asked:
            if question.peer:
                question.answer = question.of.answer_for(question.peer)
            elif not question.fleet:
                question.answer = True
        if said:
            self._in_trouble(now, said)
        elif self._trouble_since is not None:
            seconds = now - self._trouble_since
            self._trouble_since = None
            _log(logging.INFO, "Redis at %s is of use again, after %.0f s", self.address, seconds)
        return INTERVAL

    def _exchange(self, calls: list[tuple[str, list[str], str]]) -> list[Any]:
        """Run scripts, in one round trip.

        :returns: what each answers, or the exception that it ended with.
        :raises Exception: whatever redis-py raises: there are no answers.
        """
        if self._client is None:
            import redis

            # One connection, for nobody but the thread uses it.
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
            which = _SHA[script] if command == "evalsha" else script
            getattr(pipeline, command)(which, len(keys), *keys, text)
        answers: list[Any] = pipeline.execute(raise_on_error=False)
        return answers

    def _fleet_request(self) -> str:
        return json.dumps({"alive": ALIVE, "now": self.now_us()})

    def now_us(self) -> int | None:
        """Return the microseconds that tests put in the place of Redis's clock."""
        return None if self._now is None else int(self._now() * 1e6)

    # Trouble

    def _in_trouble(self, now: float, what: str) -> None:
        if self._trouble_since is not None:
            return
        self._trouble_since = now
        password = self._options.get("password")
        if password:
            what = what.replace(str(password), "…")
        _log(
            logging.WARNING,
            "Redis at %s, by which processes share their circuits, is of no use: %s. Each goes "
            "on with what it knows itself.",
            self.address,
            what,
        )

    # Questions to Redis, asked by others than the thread

    def ask(self, question: _Question, seconds: float) -> Any:
        """Return what Redis answers, or None: it did not within ``seconds``, or is away."""
        now = time.monotonic()
        if now < self._retry_at or now < self._silent_until:
            return None
        self._asked.append(question)
        self.wake()
        if not question.bell.acquire(timeout=seconds):
            # Whoever comes next does not wait as well.
            self._silent_until = now + INTERVAL
        return question.answer

    @property
    def is_late(self) -> bool:
        """Whether an answer that has not come may still: the machine is busy, and Redis is well."""
        return self.heard and time.monotonic() - self._heard_at < 3 * INTERVAL


class _Question:
    """Something to be asked in the thread's next round trip."""

    __slots__ = ("answer", "bell", "fleet", "of", "peer")

    def __init__(self, of: Sharing, *, peer: str = "", fleet: bool = False) -> None:
        self.of = of
        self.peer = peer
        self.fleet = fleet
        self.answer: Any = None
        self.bell = threading.Lock()
        self.bell.acquire()


class _Agreed(NamedTuple):
    """What was last agreed on with Redis about a peer's circuit."""

    #: The record's version; 0: there is none.
    version: int = 0
    #: Whether it says that the circuit is open.
    is_open: bool = False
    #: The local circuit's generation at that time.
    generation: int = 0


class _Shared:
    """One peer's part. All but the wishes is the thread's own, and replaced by one assignment."""

    __slots__ = ("agreed", "drain_version", "left_to_others", "wishes")

    def __init__(self) -> None:
        self.agreed = _Agreed()
        #: Seconds for which a trial that was asked for is to be left to others.
        self.left_to_others = 0.0
        self.drain_version = 0
        #: Operators' wishes that Redis has not heard of. Others add, the thread removes.
        self.wishes: deque[bool] = deque()


@dataclass
class _Request:
    """What one balancer tells Redis in one round trip, and what that was made from."""

    circuits: dict[str, dict[str, Any]]
    drains: dict[str, dict[str, Any]]
    #: By peer: the record that was looked at.
    seen: dict[str, Circuit]
    #: By peer: how many wishes are told.
    wishes: dict[str, int]
    beat: dict[str, int]

    def text(self, link: Link) -> str:
        return json.dumps(
            {
                "me": link.me,
                "now": link.now_us(),
                "circuits": self.circuits,
                "drains": self.drains,
                "beat": json.dumps(self.beat),
                "moments": _MOMENTS,
                "history": HISTORY,
                "wishes": _WISHES,
            }
        )


class Sharing:
    """What one balancer shares with the same balancer in other processes.

    It is ``balancer.sharing`` where the balancer has ``SHARED_STATE``.

    :param balancer: whose circuits and drains they are.
    :param link: for tests, in place of the process's own.
    :raises ConfigError: see :func:`checked_url`.
    """

    def __init__(self, balancer: LoadBalancer, link: Link | None = None) -> None:
        # The balancer has this; it is not to be kept alive by the thread.
        self._balancer = weakref.ref(balancer)
        self.link = link or _link_to(balancer.config.shared_state or "")
        config = balancer.config
        trial = config.connect_timeout if config.trial_timeout is None else config.trial_timeout
        #: A trial is one attempt, and at most one throw-away connection before it.
        self._lease = int((2 * trial + 1) * 1000)
        self._fields = _fields(balancer.peers.values())
        self._names = {field: name for name, field in self._fields.items()}
        self._shared = {name: _Shared() for name in balancer.peers}
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
        self.link.start(self)

    def has_news(self) -> None:
        """Tell the others at once what has changed here."""
        self.link.wake()

    # What operators ask

    @property
    def is_heard(self) -> bool:
        """Whether the last round trip to Redis, at most a second ago, went well."""
        return self.link.heard

    def settle(self, seconds: float = 1.0) -> bool:
        """Wait until Redis knows what this process knows, and this process what Redis does.

        :param seconds: how long to wait at most.
        :returns: whether it does. If not, drains and circuits of this process are its own until
            Redis is back, which it tells then, if it still runs.
        """
        self.start()
        return bool(self.link.ask(_Question(self), seconds))

    def wish(self, peer: Peer, drained: bool) -> None:
        """Have all processes drain or undrain a peer.

        :param peer: one of the balancer's.
        :param drained: what is wished; the last wish counts.
        """
        self._shared[peer.name].wishes.append(drained)

    def fleet(self) -> Fleet | None:
        """Ask what all processes know together. Takes 50 ms at most.

        :returns: None where Redis does not say.
        """
        self.start()
        answer = self.link.ask(_Question(self, fleet=True), PATIENCE)
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
        return Fleet(int(processes), connections, tuple(timeline))

    # What the thread does

    def compose(self, bids: set[str]) -> _Request:
        """Return what to tell Redis.

        :param bids: the peers whose trial somebody here is ready to make.
        """
        request = _Request({}, {}, {}, {}, {})
        balancer = self._balancer()
        if balancer is None:
            return request
        now = balancer.clock()
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
            }
            if is_open:
                since = now if circuit.out_since is None else circuit.out_since
                told.update(
                    due=_ms(circuit.due - now),
                    out=_ms(now - since),
                    err=circuit.error[:500],
                    fault=circuit.fault.value if circuit.fault else "",
                    q=circuit.question,
                    hold=circuit.lease is not None and now < circuit.lease.expires,
                    bid=name in bids,
                )
            request.circuits[field] = told
            wishes = request.wishes[name] = len(shared.wishes)
            request.drains[field] = {
                "v": str(shared.drain_version),
                "on": shared.wishes[wishes - 1] if wishes else peer.drained,
                "wish": wishes > 0,
            }
            request.beat[field] = peer.connections
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
        for name, seen in request.seen.items():
            peer, field = balancer.peers[name], self._fields[name]
            self._apply_circuit(peer, seen, said["circuits"][field])
            self._apply_drain(balancer, peer, request.wishes[name], said["drains"].get(field))
        if said.get("refused"):
            return f"it takes no writes: {said['refused']}"
        if said.get("garbage"):
            return "what is stored there is not what was written"
        return ""

    def _apply_circuit(self, peer: Peer, seen: Circuit, said: Mapping[str, Any]) -> None:
        shared, breaker = self._shared[peer.name], peer.breaker
        version, is_open = int(said["v"]), said["s"] == "open"
        due_in = _bounded(said.get("due"), 2 * breaker.reset_timeout)
        held_for = min(_bounded(said.get("held"), self._lease / 1000), INTERVAL)
        shared.left_to_others = 0.0 if said["granted"] else max(due_in, held_for, 0.001)
        if said["done"]:
            # What was said here.
            shared.agreed = _Agreed(version, is_open, seen.generation)
            return
        if version <= shared.agreed.version:
            if is_open and held_for:
                # Somebody is at it: to ask for the trial would be of no use.
                breaker.put_off(seen.generation, held_for)
            return
        after: Circuit | None = seen
        if is_open:
            after = breaker.learn_open(
                seen.generation,
                due_in=due_in,
                out_for=_bounded(said.get("out"), 365 * 86400),
                error=str(said.get("err") or "")[:500],
                fault=_fault(said.get("fault")),
                question=str(said.get("q") or "")[:50],
            )
        elif seen.state != CLOSED:
            after = breaker.learn_closed(seen.generation)
        # Otherwise it has changed meanwhile, or is being tried: the next round trip sees to it.
        if after is not None:
            shared.agreed = _Agreed(version, is_open, after.generation)

    def _apply_drain(
        self, balancer: LoadBalancer, peer: Peer, told: int, said: Mapping[str, Any] | None
    ) -> None:
        if said is None:
            return
        shared, version = self._shared[peer.name], int(said["v"])
        if said["done"]:
            for _ in range(told):
                shared.wishes.popleft()
        if version > shared.drain_version:
            shared.drain_version = version
            # A wish that has come meanwhile is younger.
            if not shared.wishes:
                balancer._set_drained(peer, said["on"] is True, learnt=not said["done"])

    # What a breaker asks

    def answer_for(self, name: str) -> float:
        """Return for how many seconds a trial that was asked for is to be left to others."""
        return self._shared[name].left_to_others

    def may_try(self, name: str) -> float:
        """Return for how many seconds a trial that is due is to be left to others; 0: go ahead.

        Waits 50 ms at most.
        """
        balancer = self._balancer()
        # What the others do not know of is nobody else's trial; and one that has no other peer
        # left connects, whatever is said.
        known = self._shared[name].agreed.is_open
        if balancer is None or not known or not balancer.has_usable():
            return 0.0
        answer = self.link.ask(_Question(self, peer=name), PATIENCE)
        if answer is None:
            return INTERVAL if self.link.is_late else 0.0
        return float(answer)


class _Gate:
    """What one peer's breaker asks before a trial."""

    __slots__ = ("_name", "_sharing")

    def __init__(self, sharing: Sharing, name: str) -> None:
        self._sharing = sharing
        self._name = name

    def __call__(self) -> float:
        return self._sharing.may_try(self._name)


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


def _ms(seconds: float) -> int:
    return int(max(0.0, min(seconds, 86400.0)) * 1000)


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


def _log(level: int, message: str, *args: object) -> None:
    try:
        logger.log(level, message, *args)
    except Exception:  # noqa: S110
        # A handler that is broken is not to end the thread.
        pass


#: The links of this process, by URL.
_links: dict[str, Link] = {}


def _link_to(url: str) -> Link:
    link = _links.get(url)
    # Of two threads that come here at once, one's is kept.
    return link if link is not None else _links.setdefault(url, Link(url))


_forkable: weakref.WeakSet[Link] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for link in list(_forkable):
        link._forget_connection()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
