"""retrying_request and its middleware: a view that is run again finds the request as it was.

What is run again, and what never is, is tested beside retrying_atomic (test_retry.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import sys
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import django
import pytest
from django.contrib import messages
from django.contrib.auth.models import User
from django.core.exceptions import ImproperlyConfigured
from django.core.files.storage import FileSystemStorage
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.handlers.wsgi import WSGIHandler, WSGIRequest
from django.db import OperationalError, connections, transaction
from django.db.transaction import TransactionManagementError
from django.http import HttpResponse, StreamingHttpResponse
from django.template.response import TemplateResponse
from django.test import RequestFactory, override_settings
from django.utils.functional import SimpleLazyObject
from django.views import View as ClassView

from django_proxysql import CommitOutcomeUnknown, retrying_request, signals
from django_proxysql.middleware import RetryingRequestMiddleware
from django_proxysql.request import Body, Kept
from tests.app.models import Token
from tests.engine import make_outcome_table, rows_of
from tests.servers.mariadb import Node
from tests.site import Site, site
from tests.work import MIDDLEWARE, Work, run_by, serving

WAYS = ["decorator", "middleware"]
CSRF = "django.middleware.csrf.CsrfViewMiddleware"


@pytest.fixture
def on_site(mariadb: Node, fault_proxy: Callable[..., Any]) -> Iterator[Site]:
    with site(mariadb, fault_proxy, ATOMIC_REQUESTS=True) as made:
        yield made


@pytest.mark.parametrize("way", WAYS)
class TestRuns:
    def test_a_view_of_a_class_is_named_by_its_class(
        self, on_site: Site, receive: Any, way: str
    ) -> None:
        class Orders(ClassView):
            get = staticmethod(Work(on_site))

        told = receive(signals.block_retried)
        assert run_by(way, Orders.as_view(), on_site).content == b"result 2"
        assert [sent["function"] for sent in told] == [f"{__name__}.{Orders.__qualname__}"]

    def test_what_a_stream_sends_is_after_the_block_and_never_repeated(
        self, on_site: Site, way: str
    ) -> None:
        work = Work(on_site)

        def rows() -> Iterator[bytes]:
            yield b"begun"
            on_site.cut("after")
            on_site.write("stream")

        def view(request: Any) -> StreamingHttpResponse:
            work(request)
            return StreamingHttpResponse(rows())

        sent = iter(run_by(way, view, on_site).streaming_content)
        assert next(sent) == b"begun"
        assert work.runs == 2
        with pytest.raises(OperationalError):
            next(sent)
        assert work.runs == 2
        assert on_site.written() == ["run 2", "run 2, again", "stream"]

    @pytest.mark.parametrize("form", [True, False], ids=["form", "raw"])
    @pytest.mark.parametrize("csrf", [[CSRF], []], ids=["csrf", "bare"])
    def test_what_was_read_of_the_body_is_there_again(
        self, on_site: Site, way: str, form: bool, csrf: list[str]
    ) -> None:
        seen: list[Any] = []
        work = Work(on_site)

        def view(request: Any) -> HttpResponse:
            if form:
                seen.append((request.POST["name"], request.FILES["file"].read()))
                request.FILES["file"].close()
            else:
                seen.append((request.read(3), request.read()))
            return work(request)

        sent: Any = b"0123456789", "application/octet-stream"
        if form:
            sent = ({"name": "Ada", "file": SimpleUploadedFile("a.txt", b"content")},)
        with serving(view, way, csrf) as client:
            client.post("/", *sent)
        once = ("Ada", b"content") if form else (b"012", b"3456789")
        assert seen == [once, once]

    def test_a_large_upload_that_was_moved_away_is_there_again(
        self, on_site: Site, way: str
    ) -> None:
        sizes: list[int] = []
        work = Work(on_site)
        with tempfile.TemporaryDirectory() as directory:
            storage = FileSystemStorage(directory)

            def view(request: Any) -> HttpResponse:
                name = storage.save("upload", request.FILES["file"])
                sizes.append(storage.size(name))
                return work(request)

            with (
                override_settings(FILE_UPLOAD_MAX_MEMORY_SIZE=10),
                serving(view, way, [CSRF]) as client,
            ):
                client.post("/", {"file": SimpleUploadedFile("a.txt", b"x" * 100_000)})
        assert sizes == [100_000, 100_000]

    def test_what_a_run_has_counted_down_is_not_counted_down_twice(
        self, on_site: Site, way: str
    ) -> None:
        """In what a middleware has read ahead: a profile of the user's, a dictionary in another."""
        work = Work(on_site)

        def page(request: Any) -> HttpResponse:
            profile = request.user._state.fields_cache["profile"]
            cart = request.cart["lines"]["tea"]
            profile.id -= 1
            cart["left"] -= 1
            on_site.write(f"{profile.id} and {cart['left']} left")
            return work(request)

        with serving(page, way, [f"{__name__}.read_ahead"]) as client:
            assert client.get("/").content == b"result 2"
        assert on_site.written()[0] == "7 and 7 left"

    def test_a_request_is_no_garbage(self, on_site: Site, way: str) -> None:
        """Its body, above 1 MB a file, goes with it, and not when Python collects garbage."""
        requests: list[Any] = []

        def page(request: Any) -> HttpResponse:
            requests.append(weakref.ref(request))
            return HttpResponse()

        with serving(page, way):
            environ = RequestFactory().get("/").environ
            gc.disable()
            try:
                WSGIHandler()(environ, lambda *args: None).close()  # type: ignore[arg-type]
                assert requests[0]() is None
            finally:
                gc.enable()

    def test_other_middlewares_see_what_a_later_run_raises(self, on_site: Site, way: str) -> None:
        work = Work(on_site)

        def page(request: Any) -> HttpResponse:
            work(request)
            raise KeyError(f"of run {work.runs}")

        with serving(page, way, [f"{__name__}.Excuses"]) as client:
            answer = client.get("/")
        assert (answer.status_code, answer.content) == (409, b"'of run 2'")
        assert on_site.written() == []

    def test_what_is_raised_while_a_response_is_rendered_runs_no_view_again(
        self, on_site: Site, way: str
    ) -> None:
        """Also where the view has its blocks rolled back: what the template writes, stands."""
        alias, runs = on_site.connection.alias, []

        class Page(TemplateResponse):
            @property
            def rendered_content(self) -> str:  # type: ignore[override]
                on_site.write("rendered")
                with transaction.atomic(alias):
                    on_site.write("lost")
                    on_site.kill()
                    on_site.write("raises")
                return ""

        def view(request: Any) -> TemplateResponse:
            runs.append(on_site.read())
            transaction.set_rollback(True, alias)
            return Page(request, "")

        with pytest.raises(OperationalError):
            run_by(way, view, on_site)
        assert runs == [[]]
        assert on_site.written() == ["rendered"]


class Excuses:
    """A middleware that answers what views raise."""

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        self.get_response = get_response

    def __call__(self, request: Any) -> Any:
        return self.get_response(request)

    def process_exception(self, request: Any, exception: Exception) -> HttpResponse | None:
        if isinstance(exception, KeyError):
            return HttpResponse(str(exception), status=409)
        return None


def read_ahead(get_response: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A middleware."""

    def middleware(request: Any) -> Any:
        request.user = User(username="ada")
        # As Django keeps what a foreign key leads to.
        request.user._state.fields_cache["profile"] = Token(id=8)
        request.cart = {"lines": {"tea": {"left": 8}}}
        return get_response(request)

    return middleware


@pytest.mark.skipif(django.VERSION < (3, 2), reason="needs Django 3.2")
class TestAsync:
    """An async view has its blocks in the thread of its ORM calls."""

    def ask(self, view: Any, way: str = "decorator", data: Any = None) -> Any:
        from asgiref.sync import async_to_sync
        from django.test import AsyncClient

        with serving(view, way):
            return async_to_sync(AsyncClient().post)("/", data)

    @pytest.mark.parametrize("of_a_class", [False, True], ids=["function", "class"])
    def test_an_async_view_is_run_again_and_reads_its_body_again(
        self, on_site: Site, receive: Any, of_a_class: bool
    ) -> None:
        from asgiref.sync import sync_to_async

        if of_a_class and django.VERSION < (4, 1):
            pytest.skip("needs Django 4.1")
        work, seen = Work(on_site), []

        async def page(request: Any) -> HttpResponse:
            assert await sync_to_async(lambda: on_site.connection.in_atomic_block)()
            seen.append((request.POST["name"], request.FILES["file"].read()))
            return await sync_to_async(work)(request)  # type: ignore[no-any-return]

        class Page(ClassView):
            async def post(self, request: Any) -> HttpResponse:
                return await page(request)

        told = receive(signals.block_retried)
        upload = {"name": "Ada", "file": SimpleUploadedFile("a.txt", b"content")}
        answer = self.ask(Page.as_view() if of_a_class else page, data=upload)
        assert answer.content == b"result 2"
        work.stands_once(2)
        assert seen == [("Ada", b"content")] * 2
        assert [(sent["alias"], sent["run"]) for sent in told] == [(on_site.connection.alias, 2)]

    def test_the_loop_goes_on_while_a_request_is_put_back(
        self, on_site: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Its uploads may be large, and are copied."""
        from asgiref.sync import sync_to_async

        restore, is_in_loop, work = Kept.restore, [], Work(on_site)

        def note(kept: Kept, request: Any) -> None:
            is_in_loop.append(asyncio._get_running_loop() is not None)
            restore(kept, request)

        async def page(request: Any) -> HttpResponse:
            return await sync_to_async(work)(request)  # type: ignore[no-any-return]

        monkeypatch.setattr(Kept, "restore", note)
        assert self.ask(page).content == b"result 2"
        assert is_in_loop == [False]

    def test_an_async_view_that_raises_leaves_no_block_open(self, on_site: Site) -> None:
        from asgiref.sync import sync_to_async

        async def page(request: Any) -> HttpResponse:
            await sync_to_async(on_site.write)("one")
            raise KeyError("page")

        with pytest.raises(KeyError, match="page"):
            self.ask(page)
        assert not on_site.connection.in_atomic_block
        assert on_site.written() == []

    def test_a_cancelled_view_leaves_no_block_open(self, on_site: Site) -> None:
        from asgiref.sync import async_to_sync, sync_to_async

        async def main() -> None:
            started = asyncio.Event()

            @retrying_request
            async def page(request: Any) -> HttpResponse:
                await sync_to_async(on_site.write)("one")
                started.set()
                await asyncio.sleep(60)
                return HttpResponse()

            for wait in (started.wait, lambda: asyncio.sleep(0)):
                task = asyncio.ensure_future(page(RequestFactory().get("/")))
                # While the view runs, and while its block begins.
                await wait()
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert not await sync_to_async(lambda: on_site.connection.in_atomic_block)()

        async_to_sync(main)()
        assert on_site.written() == []

    def test_a_sync_view_under_asgi_is_run_again(self, on_site: Site) -> None:
        work = Work(on_site)
        assert self.ask(work, "middleware").content == b"result 2"
        work.stands_once(2)

    def test_a_coroutine_out_of_a_plain_function_is_refused(self, on_site: Site) -> None:
        async def page(request: Any) -> HttpResponse:
            return HttpResponse()

        with pytest.raises(TypeError, match="Decorate an async view itself by retrying_request"):
            run_by("decorator", lambda request: page(request), on_site)


class TestRefused:
    def test_a_view_without_a_block_of_the_engines(self, on_mariadb: Site) -> None:
        with pytest.raises(TransactionManagementError, match="Set ATOMIC_REQUESTS"):
            run_by("decorator", Work(on_mariadb), on_mariadb)

    @pytest.mark.parametrize("marked", ["before", "after"])
    def test_a_view_marked_with_non_atomic_requests(self, on_site: Site, marked: str) -> None:
        mark = transaction.non_atomic_requests(using=on_site.connection.alias)
        view = mark(lambda request: HttpResponse())
        assert run_by("middleware", view, on_site).status_code == 200
        if marked == "after":
            view = mark(retrying_request(lambda request: HttpResponse()))
        with pytest.raises(TransactionManagementError, match="Set ATOMIC_REQUESTS"):
            run_by("decorator" if marked == "before" else "as it is", view, on_site)

    def test_what_is_no_view(self) -> None:
        with pytest.raises(TypeError, match="is no view"):
            retrying_request(1)  # type: ignore[call-overload]
        with pytest.raises(ValueError, match="retrying_request: attempts"):
            retrying_request(attempts=0)

    def test_a_middleware_after_it_that_views_pass_by(self) -> None:
        chain = [MIDDLEWARE, "django.middleware.csrf.CsrfViewMiddleware"]
        told = pytest.raises(ImproperlyConfigured, match="Put RetryingRequestMiddleware last")
        with override_settings(MIDDLEWARE=chain), told:
            RetryingRequestMiddleware(lambda request: None)


def test_the_middleware_leaves_a_decorated_view_to_its_decorator(on_site: Site) -> None:
    """Its last run may stand: the middleware has seen the first one alone."""
    work = Work(on_site)

    def page(request: Any) -> HttpResponse:
        if work.runs == 1:
            on_site.here.cut_after(b"\x03COMMIT")
        return work(request)

    with pytest.raises(CommitOutcomeUnknown):
        run_by("middleware", retrying_request(page), on_site)
    assert work.runs == 2
    assert on_site.written() == ["run 2", "run 2, again"]


class Session:
    """The session middleware's, in what counts here."""

    def __init__(self) -> None:
        self.modified = False
        self._session_cache = {"cart": [1]}


class TestKept:
    """What the first run does to a request is undone, without a server."""

    def request(self) -> WSGIRequest:
        request = RequestFactory().post("/", b"abc\ndef\n", content_type="text/plain")
        request.user = User(username="ada")
        request.session = Session()  # type: ignore[assignment]
        return request

    def test_user_session_and_attributes(self) -> None:
        request: Any = self.request()
        user = request.user
        lazy = request.lazy = SimpleLazyObject(lambda: User(username="lazy"))
        kept = Kept(request)
        for run in range(2):
            assert lazy.username == "lazy", run
            assert request.user is user
            assert user.username == "ada"
            assert request.session._session_cache == {"cart": [1]}
            assert not request.session.modified
            assert not hasattr(request, "mine")
            assert "MINE" not in request.META
            user.username = lazy.username = "changed"
            request.user = User(username="other")
            request.session._session_cache["cart"].append(2)
            request.session.modified = True
            request.META["MINE"] = request.mine = True
            kept.restore(request)

    def test_what_they_lead_to_in_a_circle_and_in_a_long_row(self) -> None:
        request: Any = self.request()
        first = request.user
        for number in range(5000):
            following = User(username=str(number))
            first._state.fields_cache["next"] = following
            first = following
        first._state.fields_cache["next"] = request.user
        seen = request.seen = OrderedDict(a=({1}, [Token(value="b")]))
        request.products = request.user.products = User.objects.none()
        kept = Kept(request)
        for _ in range(2):
            (numbers, tokens), username = request.seen["a"], first.username
            assert (request.seen is seen, numbers, len(tokens)) == (True, {1}, 1)
            assert (tokens[0].value, username) == ("b", "4999")
            assert request.products._result_cache is None
            assert list(request.products) == []
            tokens[0].value = first.username = "changed"
            numbers.add(None)
            tokens.clear()
            seen["c"] = 3
            kept.restore(request)
        assert list(request.seen) == ["a"]

    def test_what_other_requests_use_as_well_is_left_alone(self) -> None:
        """A lifespan's state; the current Site, whose attributes are there at each moment."""
        request: Any = self.request()
        request.scope = {"state": {"hits": (hits := {"/": 1})}}
        site = request.site = Token(id=1, value="example.org")
        kept = Kept(request)
        hits["/"] += 1
        site.value, site.cached = "changed", "by the run"
        called: list[Any] = []
        sys.setprofile(lambda frame, event, arg: called.append(arg) if event == "c_call" else None)
        try:
            kept.restore(request)
        finally:
            sys.setprofile(None)
        emptied = [one.__self__ for one in called if one.__name__ == "clear"]
        assert not [one for one in emptied if one is vars(site)]
        assert (site.value, vars(site).get("cached")) == ("example.org", None)
        assert hits == {"/": 2}

    def test_a_set_of_rows_that_a_run_has_deleted_is_whole_again(self) -> None:
        request: Any = self.request()
        token = Token(id=1)
        request.chosen = {token}
        request.order = OrderedDict.fromkeys("abc")
        kept = Kept(request)
        request.chosen.clear()
        token.pk = None
        request.order.move_to_end("a")
        kept.restore(request)
        assert request.chosen == {Token(id=1)}
        assert list(request.order) == ["a", "b", "c"]

    @pytest.mark.parametrize("name", ["GET", "POST"])
    def test_what_a_form_has_sent_is_there_though_a_run_changes_it(self, name: str) -> None:
        request: Any = RequestFactory().post("/?a=1&a=2", {"a": [1, 2]})
        assert getattr(request, name)["a"] == "2"
        kept = Kept(request)
        for _ in range(2):
            sent = getattr(request, name)
            assert dict(sent.lists()) == {"a": ["1", "2"]}
            with pytest.raises(AttributeError):
                sent["a"] = "changed"
            sent._mutable = True
            sent["a"] = "changed"
            sent.appendlist("b", "added")
            kept.restore(request)

    def test_messages(self) -> None:
        request: Any = self.request()
        storage: Any = messages.storage.default_storage
        request.COOKIES = {}
        request.session = {}
        request._messages = storage(request)
        messages.info(request, "before")
        kept = Kept(request)
        messages.info(request, "of the first run")
        kept.restore(request)
        assert [str(one) for one in request._messages._queued_messages] == ["before"]

    def test_a_lazy_user_is_not_asked_for(self) -> None:
        request: Any = self.request()
        request.user = SimpleLazyObject(lambda: pytest.fail("it was read from the database"))
        Kept(request).restore(request)

    @pytest.mark.parametrize("asgi", [False, True])
    @pytest.mark.parametrize(
        "read",
        [
            lambda request: request.read(2),
            lambda request: request.readline(),
            lambda request: list(request),
            lambda request: request.body,
            lambda request: (request.read(5), request.readline(), request.read()),
            lambda request: None,
        ],
    )
    def test_the_body_is_read_again(self, read: Callable[[Any], Any], asgi: bool) -> None:
        request: Any = self.request()
        if asgi:
            if django.VERSION < (3, 2):
                pytest.skip("needs Django 3.2")
            from django.core.handlers.asgi import ASGIRequest
            from django.test.client import AsyncRequestFactory

            scope = AsyncRequestFactory()._base_scope(path="/", method="POST")
            request = ASGIRequest(scope, io.BytesIO(b"abc\ndef\n"))
        body = Body.record(request)
        first = read(request)
        body.restore(request)
        assert read(request) == first
        body.restore(request)
        assert request.body == b"abc\ndef\n"
        body.restore(request)
        assert request.body == b"abc\ndef\n"

    @pytest.mark.parametrize("begin", [lambda one: one.read(2), lambda one: one.readline()])
    def test_the_rest_of_a_body_of_which_a_part_was_read_is_read_again(
        self, begin: Callable[[Any], Any]
    ) -> None:
        request: Any = self.request()
        begin(request)
        body = Body.record(request)
        rest = request.read()
        assert rest
        for _ in range(2):
            body.restore(request)
            assert request.read() == rest

    def test_a_body_read_before_is_kept(self) -> None:
        request: Any = self.request()
        assert request.body == b"abc\ndef\n"
        body = Body.record(request)
        assert request.read() == b"abc\ndef\n"
        body.restore(request)
        assert request.read() == b"abc\ndef\n"


def write(alias: str, value: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute("INSERT INTO app_token (value) VALUES (%s)", [value])


def test_one_block_that_may_stand_ends_it(on_site: Site) -> None:
    """With two aliases the inner one's COMMIT stands when the outer one's is lost."""
    work = Work(on_site, losses=0)
    databases: Any = connections.databases
    databases["second"] = {**databases[on_site.connection.alias]}
    try:

        def page(request: Any) -> HttpResponse:
            write("second", "second")
            # The second alias's block is the inner one, and commits first.
            transaction.on_commit(on_site.kill, "second")
            return work(request)

        with pytest.raises(OperationalError):
            run_by("decorator", page, on_site)
        assert work.runs == 1
        assert on_site.plain_rows() == ["second"]
    finally:
        connections["second"].close()
        del databases["second"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("of_second", ["nothing", "a hook", "a read"])
def test_an_empty_block_that_has_committed_ends_nothing(
    mariadb: Node,
    fault_proxy: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    of_second: str,
) -> None:
    """A site with two databases, of which a view uses one: the other's COMMIT left nothing."""
    settings = {"ATOMIC_REQUESTS": True, "COMMIT_OUTCOME": "record"}
    with site(mariadb, fault_proxy, **settings) as here:
        make_outcome_table(here.plain)
        databases: Any = connections.databases
        second = {**databases[here.connection.alias]}
        monkeypatch.setitem(databases, "second", second)
        if way == "middleware":
            # Django's first block is the inner one, which commits first.
            databases[here.connection.alias] = databases.pop(here.connection.alias)
        work, hooks = Work(here, lose=lambda: here.here.cut_before(b"; COMMIT"), at_end=True), []

        def page(request: Any) -> HttpResponse:
            if of_second == "a hook":
                transaction.on_commit(lambda: hooks.append(work.runs), "second")
            elif of_second == "a read":
                rows_of(connections["second"], "SELECT 1")
            return work(request)

        is_run_again = of_second == "nothing"
        with contextlib.nullcontext() if is_run_again else pytest.raises(OperationalError):
            run_by(way, page, here)
        assert (work.runs, hooks) == (1 + is_run_again, [1] * (of_second == "a hook"))
        assert here.plain_rows() == ["run 2", "run 2, again"][: 2 * is_run_again]
        connections["second"].close()


@pytest.mark.parametrize("other", ["first", "last"])
@pytest.mark.parametrize("way", WAYS)
def test_another_engines_block_that_has_committed_is_not_run_again(
    on_site: Site, monkeypatch: pytest.MonkeyPatch, way: str, other: str
) -> None:
    """Django commits in the order of DATABASES, and so does the middleware's first run."""
    databases: Any = connections.databases
    monkeypatch.setitem(databases["plain"], "ATOMIC_REQUESTS", True)
    if other == "last":
        databases["plain"] = databases.pop("plain")
    work = Work(on_site, at_end=True)

    def page(request: Any) -> HttpResponse:
        # A value that was there before, and is not purged yet, would lock the gap beside it: this
        # thread's two blocks would wait for each other.
        write("plain", f"{way} {other} {work.runs + 1}")
        return work(request)

    is_left_alone = (way, other) == ("middleware", "first")
    with pytest.raises(OperationalError) if is_left_alone else contextlib.nullcontext():
        run_by(way, page, on_site)
    again = [] if is_left_alone else ["run 2", "run 2, again"]
    assert on_site.plain_rows() == [f"{way} {other} {work.runs}", *again]
