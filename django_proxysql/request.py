"""Views that are run again from their beginning when the database gave their blocks up.

Under ATOMIC_REQUESTS a view's blocks end before anything of its response is sent. A run must find
the request as the first one found it: :class:`Kept`.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import operator
import os
import sys
import tempfile
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Container
from io import BytesIO
from typing import Any, TypeVar, overload

import django
from django.core.files.uploadedfile import InMemoryUploadedFile, TemporaryUploadedFile
from django.db import Error, connections
from django.db.models import Model, QuerySet
from django.db.models.base import ModelState
from django.db.transaction import TransactionManagementError
from django.utils.datastructures import MultiValueDict
from django.utils.functional import LazyObject

from .retry import Call, Rules, Wait

_V = TypeVar("_V", bound=Callable[..., Any])

#: What Django's request keeps of its body, and of what it made of it.
_OF_BODY = (
    "_stream",
    "_read_started",
    "_body",
    "_post",
    "_files",
    "_upload_handlers",
    "_post_parse_error",
)
#: More of a body than this is kept in a file.
_IN_MEMORY = 1 << 20
_CHUNK = 1 << 16
#: What no run can change in place: the most frequent types.
_PLAIN = frozenset({str, bytes, int, float, bool, type(None)})
#: What a run may change in place: by their items, …
_BY_ITEMS = frozenset({dict, OrderedDict, defaultdict, list, set, tuple})
#: … and by their attributes.
_BY_ATTRIBUTES = (LazyObject, Model, ModelState, QuerySet)
#: The web server's own: what these lead to may be all requests'.
_OF_SERVER = ("META", "environ", "scope")


class _Recorded:
    """A body's stream that keeps what is read of it, so that it can be read again."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.kept = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - Body.record()

    def read(self, size: int | None = None) -> bytes:
        return self._next("read", -1 if size is None else size)

    def readline(self, size: int | None = None) -> bytes:
        return self._next("readline", -1 if size is None else size)

    def _next(self, method: str, size: int) -> bytes:
        """Return what was read before, and then what is read of the source, at most ``size``."""
        data: bytes = getattr(self.kept, method)(size)
        if size >= 0:
            size -= len(data)
        if size and not (method == "readline" and data.endswith(b"\n")):
            # Django's stream of its first versions takes no -1.
            more: bytes = getattr(self._source, method)(*([size] if size > 0 else []))
            self.kept.write(more)
            data += more
        return data

    def seekable(self) -> bool:
        """Return False: Django 6 looks for a body's size in a stream that is."""
        return False

    def rewind(self) -> None:
        """Have it read from its beginning."""
        self.kept.seek(0)

    def close(self) -> None:
        """Do nothing: the next run may read it. The web server closes its own stream."""


class Body:
    """A request's body, to be there for each run: see :meth:`record`."""

    def __init__(self, request: Any, stream: _Recorded | None) -> None:
        state = vars(request)
        self._stream = stream
        self._before = {name: state[name] for name in _OF_BODY if name in state}
        #: Uploads that were read before: a run may close them or move them away.
        self._uploads = [
            (field, [(one, self._content(one)) for one in files])
            for field, files in (state["_files"].lists() if state.get("_files") else ())
        ]

    @classmethod
    def record(cls, request: Any) -> Body:
        """Record what is read of Django's ``request`` from here on; keep what was made of it."""
        stream = None
        state = vars(request)
        if "_stream" in state and "_body" not in state:
            # Also of a stream of which a middleware has read the beginning.
            stream = request._stream = _Recorded(request._stream)
            weakref.finalize(stream, stream.kept.close)
        return cls(request, stream)

    def _content(self, upload: Any) -> bytes | int | None:
        """Return what an uploaded file holds, or another descriptor of it."""
        if isinstance(upload, TemporaryUploadedFile):
            descriptor = os.dup(upload.fileno())
            weakref.finalize(self, os.close, descriptor)
            return descriptor
        if isinstance(upload, InMemoryUploadedFile) and isinstance(upload.file, BytesIO):
            return upload.file.getvalue()
        return None

    def restore(self, request: Any) -> None:
        state = vars(request)
        for name in _OF_BODY:
            state.pop(name, None)
        state.update(self._before)
        if self._stream is not None:
            self._stream.rewind()
        elif "_body" in state:
            state["_stream"] = BytesIO(state["_body"])
        if self._uploads:
            state["_files"] = copy.copy(state["_files"])
            for field, files in self._uploads:
                state["_files"].setlist(field, [_uploaded(*one) for one in files])


def _uploaded(upload: Any, content: bytes | int | None) -> Any:
    """Return an uploaded file as it was before a run."""
    about = upload.name, upload.content_type
    more = upload.charset, upload.content_type_extra
    if content is None:
        # An upload handler's own kind.
        upload.seek(0)
        return upload
    if isinstance(content, bytes):
        return InMemoryUploadedFile(BytesIO(content), upload.field_name, *about, upload.size, *more)
    made = TemporaryUploadedFile(*about, upload.size, *more)
    while True:
        chunk = os.pread(content, _CHUNK, made.tell())
        if not chunk:
            made.seek(0)
            return made
        made.write(chunk)


class Kept:
    """A request as the first run finds it, for the next ones.

    Its attributes are put back, and so is what a run has changed in place: in its session, its
    messages and its user, and in all that these and the request lead to by way of
    :data:`_BY_ITEMS` and :data:`_BY_ATTRIBUTES`.

    :param request: Django's request.
    :param body: its body, where it was recorded before.
    """

    def __init__(self, request: Any, body: Body | None = None) -> None:
        # Not the request itself: it may hold this one, and with it would be garbage.
        self._body = body or Body.record(request)
        self._attributes = dict(vars(request))
        #: What a run may change in place, what was in it, and whether it is an object's attributes.
        self._contents: list[tuple[Any, Any, bool]] = []
        todo: list[Any] = list(self._attributes.values())
        for name in ("session", "_messages"):
            value = self._attributes.get(name)
            if issubclass(type(value), LazyObject):
                value = vars(value).get("_wrapped")
            if hasattr(value, "__dict__"):
                todo.append(vars(value))
        seen = set()
        for name in _OF_SERVER:
            value = self._attributes.get(name)
            if type(value) is dict and id(value) not in seen:
                seen.add(id(value))
                self._contents.append((value, dict(value), False))
        # No recursion: models may be linked in a long row.
        while todo:
            value = todo.pop()
            # By its type alone: a lazy user would be read from the database.
            kind = type(value)
            if kind in _PLAIN:
                continue
            is_object = issubclass(kind, _BY_ATTRIBUTES)
            if is_object:
                value, kind = vars(value), dict
            elif issubclass(kind, MultiValueDict):
                # A QueryDict may be made mutable by a widespread trick.
                todo.append(vars(value))
            elif kind not in _BY_ITEMS:
                continue
            if id(value) in seen:
                continue
            seen.add(id(value))
            if kind is tuple:
                todo.extend(value)
                continue
            # Not a MultiValueDict's own, which leaves values out.
            kept: Any = value.copy() if kind in _BY_ITEMS else dict.copy(value)  # type: ignore[arg-type]
            todo.extend(kept.values() if isinstance(kept, dict) else kept)
            self._contents.append((value, kept, is_object))

    def restore(self, request: Any) -> None:
        state = vars(request)
        for _, uploads in state["_files"].lists() if "_files" in state else ():
            for upload in uploads:
                if isinstance(upload, TemporaryUploadedFile):
                    # It may have been moved away, which its end would complain of.
                    upload.close()
        state.clear()
        state.update(self._attributes)
        for value, kept, is_object in self._contents:
            if len(value) == len(kept) and all(map(operator.is_, _flat(value), _flat(kept))):
                # It may be all requests' own.
                continue
            if is_object:
                # So may this be, as the current Site is: what was there is there at each moment.
                value.update(kept)
                for name in value.keys() - kept.keys():
                    value.pop(name, None)
            elif isinstance(value, MultiValueDict):
                # Not its own methods: a QueryDict's may refuse.
                dict.clear(value)
                dict.update(value, kept)
            else:
                value.clear()
                # A set's members are not hashed anew, which may be impossible by now.
                (value.extend if isinstance(value, list) else value.update)(kept)
        self._body.restore(request)


def _flat(value: Any) -> tuple[object, ...]:
    """Return what is in something that is changed by its items."""
    if isinstance(value, set):
        return tuple(sorted(value, key=id))
    if isinstance(value, MultiValueDict):
        return (*dict.keys(value), *dict.values(value))
    return (*value, *value.values()) if isinstance(value, dict) else tuple(value)


class _AllOf(set):  # type: ignore[type-arg]
    """A view's aliases without a block of Django's: all of them. Its items are the user's own."""

    def __contains__(self, alias: object) -> bool:
        return True


def atomic_aliases(without: Container[str]) -> list[str]:
    """Return the aliases that have ATOMIC_REQUESTS.

    :param without: those that a view is marked with, by ``non_atomic_requests``.
    """
    databases: Any = connections.databases
    return [
        alias
        for alias in connections
        if databases[alias].get("ATOMIC_REQUESTS") and alias not in without
    ]


@overload
def retrying_request(view: _V) -> _V: ...


@overload
def retrying_request(
    *, attempts: int = 3, wait: Wait | None = None, wait_for_peer: float = 10.0
) -> Callable[[_V], _V]: ...


def retrying_request(
    view: Any = None,
    *,
    attempts: int = 3,
    wait: Wait | None = None,
    wait_for_peer: float = 10.0,
) -> Any:
    """Run a view under ATOMIC_REQUESTS, and again if the database gave its blocks up.

    ::

        @retrying_request
        def place(request): ...

        @retrying_request(attempts=5)
        async def transfer(request): ...

        path("orders/", retrying_request(OrderView.as_view()))

    The view is run again from its beginning by the rules of :func:`retrying_atomic`, before
    anything of its response is sent. It finds the request as the first run found it: the
    body, ``POST`` and ``FILES`` can be read again, and what the first run did to
    ``request.user``, the session and the messages is gone. It must not do what a rollback
    does not undo.

    An async view, which Django itself refuses under ATOMIC_REQUESTS, gets the blocks too: in
    the thread that its ORM calls run in.

    :param view: the view; None where the parameters are given first.
    :param attempts: how many times the view is run at most; see :func:`.retrying_atomic`.
    :param wait: how long it waits between two runs: a wait strategy of tenacity's.
    :param wait_for_peer: for how many seconds it waits for a peer when none can be reached.
    :raises TypeError: it is given no view; or, at a request, a view that returns a coroutine and
        is no coroutine function; or an async view before Django 3.2.
    :raises TransactionManagementError: at a request: no alias of the engine has ATOMIC_REQUESTS, or
        the view is marked with ``non_atomic_requests``; or it is called in an atomic block,
        or while autocommit is off. (Inside the blocks of Django's TestCase it runs once.)
    """
    rules = Rules("retrying_request", attempts, wait, wait_for_peer)
    if view is None:
        return functools.partial(_retrying, rules=rules)
    return _retrying(view, rules)


def _retrying(view: _V, rules: Rules) -> _V:
    if not callable(view):
        raise TypeError(f"retrying_request: {view!r} is no view.")
    is_async = _is_async(view)
    if is_async and django.VERSION < (3, 2):
        raise TypeError("retrying_request: async views need Django 3.2.")

    @functools.wraps(view)
    def run(request: Any, *args: Any, **kwargs: Any) -> Any:
        call, kept = _call(rules, view, made), Kept(request)
        return call.repeat(lambda: view(request, *args, **kwargs), lambda: kept.restore(request))

    @functools.wraps(view)
    async def run_async(request: Any, *args: Any, **kwargs: Any) -> Any:
        call = await _in_thread(_call, rules, view, made)
        kept = Kept(request)
        while True:
            try:
                if call.runs:
                    # It may copy large uploads.
                    await _in_thread(kept.restore, request)
                try:
                    await _in_thread(call.__enter__)
                    response = await view(request, *args, **kwargs)
                except BaseException:
                    await _in_thread(call.__exit__, *sys.exc_info())
                    raise
                await _in_thread(call.__exit__, None, None, None)
                return response
            except Error as exc:
                seconds = await _in_thread(call.seconds_to_wait, exc)
                if seconds is None:
                    raise
            await asyncio.sleep(seconds)

    made: Any = run_async if is_async else run
    # The blocks are opened here, once a run.
    made._non_atomic_requests = _AllOf(iter(getattr(view, "_non_atomic_requests", ())))
    return made  # type: ignore[no-any-return]


def _call(rules: Rules, view: Callable[..., Any], made: Callable[..., Any]) -> Call:
    # Others' marks may stand on what was made of the view.
    marks = set(iter(made._non_atomic_requests))  # type: ignore[attr-defined]
    call = Call(rules, view, atomic_aliases(marks))
    if not call.ours and not call.is_in_test:
        raise TransactionManagementError(
            f"{rules.caller} found no block to run {view!r} in. Set ATOMIC_REQUESTS on an alias of "
            "this engine, and do not mark the view with transaction.non_atomic_requests. "
            "Without ATOMIC_REQUESTS, put the work into a function with retrying_atomic."
        )
    return call


def _is_async(view: Callable[..., Any]) -> bool:
    try:
        from asgiref.sync import iscoroutinefunction
    except ImportError:
        # Before asgiref 3.6, where asyncio's own knows Django's marks.
        return asyncio.iscoroutinefunction(view)
    return bool(iscoroutinefunction(view))


async def _in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in the thread of the request's ORM calls, to its end.

    Where the task is cancelled meanwhile, that is raised afterwards: a block that has begun in
    the thread is ended there.
    """
    from asgiref.sync import sync_to_async

    task = asyncio.ensure_future(sync_to_async(function, thread_sensitive=True)(*args))
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as exc:
            cancelled = exc
    if cancelled is not None:
        # What it raised, if it did, goes with the task.
        task.exception()
        raise cancelled
    return task.result()
