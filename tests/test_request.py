"""retrying_request and its middleware: a view is run again, and finds the request as it was."""

from __future__ import annotations

import asyncio
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import django
import pytest
from django.contrib import messages
from django.contrib.auth.models import User
from django.core.exceptions import ImproperlyConfigured
from django.core.files.storage import FileSystemStorage
from django.core.files.uploadedfile import SimpleUploadedFile
from django.core.handlers.wsgi import WSGIRequest
from django.db import OperationalError, connections, transaction
from django.db.transaction import TransactionManagementError
from django.http import HttpResponse, StreamingHttpResponse
from django.test import Client, RequestFactory, TestCase, override_settings
from django.urls import path
from django.utils.functional import SimpleLazyObject
from django.views import View as ClassView

from django_proxysql import CommitOutcomeUnknown, retrying_request, signals
from django_proxysql.middleware import RetryingRequestMiddleware
from django_proxysql.request import Body, Kept
from tests.engine import run_case
from tests.servers.mariadb import Node
from tests.site import Site, site

MIDDLEWARE = "django_proxysql.middleware.RetryingRequestMiddleware"
WAYS = ["decorator", "middleware"]


@pytest.fixture
def on_site(mariadb: Node, fault_proxy: Callable[..., Any]) -> Iterator[Site]:
    with site(mariadb, fault_proxy, ATOMIC_REQUESTS=True) as made:
        yield made


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """``serve(view, way)`` returns a client's get or post to a site of that one view."""
    urls = ModuleType("urls_of_the_test")
    sys.modules[urls.__name__] = urls

    def made(view: Any, way: str = "decorator", method: str = "get", middleware: Any = ()) -> Any:
        served = retrying_request(view) if way == "decorator" else view
        urls.urlpatterns = [path("", served)]  # type: ignore[attr-defined]
        chain = [*middleware, *([MIDDLEWARE] if way == "middleware" else [])]
        settings = override_settings(ROOT_URLCONF=urls.__name__, MIDDLEWARE=chain)
        settings.enable()
        request.addfinalizer(settings.disable)
        client = Client(enforce_csrf_checks=True, HTTP_X_CSRFTOKEN="a" * 32)
        client.cookies["csrftoken"] = "a" * 32
        return lambda *args, **kwargs: getattr(client, method)("/", *args, **kwargs)

    yield made
    del sys.modules[urls.__name__]


class View:
    """Writes once a run, and loses the connection in its first runs."""

    def __init__(self, here: Site, losses: int = 1, lose: Callable[[], None] | None = None) -> None:
        self.here = here
        self.losses = losses
        self.lose = lose or here.kill
        self.runs = 0
        self.hooks = 0

    def __call__(self, request: Any, *args: Any, **kwargs: Any) -> HttpResponse:
        self.runs += 1
        transaction.on_commit(self.hook, self.here.connection.alias)
        self.here.write(f"run {self.runs}")
        if self.runs <= self.losses:
            self.lose()
        self.here.write(f"run {self.runs}, again")
        return HttpResponse(f"response {self.runs}")

    def hook(self) -> None:
        self.hooks += 1


@pytest.mark.parametrize("way", WAYS)
class TestRuns:
    def test_a_view_is_run_again_after_a_loss(
        self, on_site: Site, serve: Any, receive: Any, way: str
    ) -> None:
        view = View(on_site)
        told = receive(signals.block_retried)
        assert serve(view, way)().content == b"response 2"
        assert on_site.written() == ["run 2", "run 2, again"]
        assert view.hooks == 1
        (sent,) = told
        assert (sent["alias"], sent["run"]) == (on_site.connection.alias, 2)
        assert sent["function"] == "tests.test_request.View"

    def test_a_view_of_a_class_is_named_by_its_class(
        self, on_site: Site, serve: Any, receive: Any, way: str
    ) -> None:
        class Orders(ClassView):
            get = staticmethod(View(on_site))

        told = receive(signals.block_retried)
        assert serve(Orders.as_view(), way)().content == b"response 2"
        assert [sent["function"] for sent in told] == [f"{__name__}.{Orders.__qualname__}"]

    def test_a_socket_found_dead_at_commit_is_a_loss(
        self, on_site: Site, serve: Any, way: str
    ) -> None:
        runs: list[int] = []

        def view(request: Any) -> HttpResponse:
            runs.append(1)
            on_site.write(f"run {len(runs)}")
            if len(runs) == 1:
                on_site.kill()
            return HttpResponse(f"response {len(runs)}")

        assert serve(view, way)().content == b"response 2"
        assert on_site.written() == ["run 2"]

    def test_a_commit_that_may_stand_is_never_repeated(
        self, on_site: Site, serve: Any, way: str
    ) -> None:
        view = View(on_site, losses=0)
        on_site.sql("SELECT 1")
        on_site.here.cut_after(b"COMMIT")
        with pytest.raises(OperationalError):
            serve(view, way)()
        assert view.runs == 1
        assert on_site.written() == ["run 1", "run 1, again"]

    def test_a_view_of_which_a_part_may_stand_is_never_repeated(
        self, on_site: Site, serve: Any, way: str
    ) -> None:
        def lose() -> None:
            on_site.sql("COMMIT")
            on_site.kill()

        view = View(on_site, lose=lose)
        with pytest.raises(OperationalError):
            serve(view, way)()
        assert view.runs == 1
        assert on_site.written() == ["run 1"]

    def test_a_hook_that_loses_the_connection_repeats_nothing(
        self, on_site: Site, serve: Any, way: str
    ) -> None:
        runs: list[int] = []

        def hook() -> None:
            with transaction.atomic(on_site.connection.alias):
                on_site.write("hook")
                on_site.kill()
                on_site.read()

        def view(request: Any) -> HttpResponse:
            runs.append(1)
            on_site.write("view")
            transaction.on_commit(hook, on_site.connection.alias)
            return HttpResponse()

        with pytest.raises(OperationalError):
            serve(view, way)()
        assert runs == [1]
        assert on_site.written() == ["view"]

    def test_what_a_stream_sends_is_after_the_block_and_never_repeated(
        self, on_site: Site, serve: Any, way: str
    ) -> None:
        runs: list[int] = []

        def rows() -> Iterator[bytes]:
            yield b"begun"
            on_site.cut("after")
            on_site.write("stream")

        def view(request: Any) -> StreamingHttpResponse:
            runs.append(1)
            on_site.write(f"run {len(runs)}")
            if len(runs) == 1:
                on_site.kill()
            return StreamingHttpResponse(rows())

        sent = iter(serve(view, way)().streaming_content)
        assert next(sent) == b"begun"
        assert runs == [1, 1]
        with pytest.raises(OperationalError):
            next(sent)
        assert runs == [1, 1]
        assert on_site.written() == ["run 2", "stream"]

    def test_it_gives_up_after_its_attempts(self, on_site: Site, serve: Any, way: str) -> None:
        view = View(on_site, losses=5)
        with pytest.raises(OperationalError):
            serve(view, way)()
        assert view.runs == 3
        assert on_site.written() == []

    def test_another_error_is_raised_at_once(self, on_site: Site, serve: Any, way: str) -> None:
        view = View(on_site, lose=lambda: {}["nonesuch"])
        with pytest.raises(KeyError):
            serve(view, way)()
        assert view.runs == 1

    def test_a_later_run_may_end_by_another_error(
        self, on_site: Site, serve: Any, way: str
    ) -> None:
        runs: list[int] = []

        def view(request: Any) -> HttpResponse:
            runs.append(1)
            if len(runs) == 2:
                raise KeyError("second")
            on_site.write("first")
            on_site.kill()
            on_site.read()
            return HttpResponse()

        with pytest.raises(KeyError, match="second"):
            serve(view, way)()

    @pytest.mark.parametrize("form", [True, False], ids=["form", "raw"])
    @pytest.mark.parametrize("csrf", [True, False], ids=["csrf", "bare"])
    def test_what_was_read_of_the_body_is_there_again(
        self, on_site: Site, serve: Any, way: str, form: bool, csrf: bool
    ) -> None:
        seen: list[Any] = []
        view = View(on_site)

        def reading(request: Any) -> HttpResponse:
            if form:
                seen.append((request.POST["name"], request.FILES["file"].read()))
                request.FILES["file"].close()
            else:
                seen.append(request.read(3) if len(seen) % 2 == 0 else request.body)
                seen.append(request.read())
            return view(request)

        chain = ["django.middleware.csrf.CsrfViewMiddleware"] if csrf else []
        post = serve(reading, way, "post", chain)
        if form:
            post({"name": "Ada", "file": SimpleUploadedFile("a.txt", b"content")})
        else:
            post(b"0123456789", content_type="application/octet-stream")
        assert view.runs == 2
        assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]

    def test_a_large_upload_that_was_moved_away_is_there_again(
        self, on_site: Site, serve: Any, way: str
    ) -> None:
        sizes: list[int] = []
        view = View(on_site)
        with tempfile.TemporaryDirectory() as directory:
            storage = FileSystemStorage(directory)

            def upload(request: Any) -> HttpResponse:
                name = storage.save("upload", request.FILES["file"])
                sizes.append(storage.size(name))
                return view(request)

            post = serve(upload, way, "post", ["django.middleware.csrf.CsrfViewMiddleware"])
            with override_settings(FILE_UPLOAD_MAX_MEMORY_SIZE=10):
                post({"file": SimpleUploadedFile("a.txt", b"x" * 100_000)})
        assert sizes == [100_000, 100_000]


@pytest.mark.skipif(django.VERSION < (3, 2), reason="needs Django 3.2")
class TestAsync:
    """An async view has its blocks in the thread of its ORM calls."""

    def ask(self, method: str = "get", data: Any = None) -> Any:
        from asgiref.sync import async_to_sync
        from django.test import AsyncClient

        return async_to_sync(getattr(AsyncClient(), method))("/", data)

    @pytest.mark.parametrize("of_a_class", [False, True], ids=["function", "class"])
    def test_an_async_view_is_run_again_and_reads_its_body_again(
        self, on_site: Site, serve: Any, receive: Any, of_a_class: bool
    ) -> None:
        from asgiref.sync import sync_to_async

        if of_a_class and django.VERSION < (4, 1):
            pytest.skip("needs Django 4.1")
        view, seen = View(on_site), []

        async def page(request: Any) -> HttpResponse:
            assert await sync_to_async(lambda: on_site.connection.in_atomic_block)()
            seen.append((request.POST["name"], request.FILES["file"].read()))
            return await sync_to_async(view)(request)  # type: ignore[no-any-return]

        class Page(ClassView):
            async def post(self, request: Any) -> HttpResponse:
                return await page(request)

        serve(Page.as_view() if of_a_class else page)
        told = receive(signals.block_retried)
        upload = {"name": "Ada", "file": SimpleUploadedFile("a.txt", b"content")}
        assert self.ask("post", upload).content == b"response 2"
        assert on_site.written() == ["run 2", "run 2, again"]
        assert view.hooks == 1
        assert seen == [("Ada", b"content")] * 2
        assert [(sent["alias"], sent["run"]) for sent in told] == [(on_site.connection.alias, 2)]

    def test_an_async_view_that_raises_leaves_no_block_open(
        self, on_site: Site, serve: Any
    ) -> None:
        from asgiref.sync import sync_to_async

        async def page(request: Any) -> HttpResponse:
            await sync_to_async(on_site.write)("one")
            raise KeyError("page")

        serve(page)
        with pytest.raises(KeyError, match="page"):
            self.ask()
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

    def test_a_sync_view_under_asgi_is_run_again(self, on_site: Site, serve: Any) -> None:
        view = View(on_site)
        serve(view, "middleware")
        assert self.ask().content == b"response 2"
        assert on_site.written() == ["run 2", "run 2, again"]

    def test_a_coroutine_out_of_a_plain_function_is_refused(
        self, on_site: Site, serve: Any
    ) -> None:
        async def page(request: Any) -> HttpResponse:
            return HttpResponse()

        with pytest.raises(TypeError, match="Decorate the async view itself"):
            serve(lambda request: page(request))()


class TestRefused:
    def test_a_view_without_a_block_of_the_engines(self, on_mariadb: Site, serve: Any) -> None:
        with pytest.raises(TransactionManagementError, match="Set ATOMIC_REQUESTS"):
            serve(View(on_mariadb))()

    def test_a_view_marked_with_non_atomic_requests(self, on_site: Site, serve: Any) -> None:
        mark = transaction.non_atomic_requests(using=on_site.connection.alias)
        view = mark(lambda request: HttpResponse())
        with pytest.raises(TransactionManagementError, match="Set ATOMIC_REQUESTS"):
            serve(view)()
        with pytest.raises(TransactionManagementError, match="Set ATOMIC_REQUESTS"):
            serve(mark(retrying_request(lambda request: HttpResponse())), "as it is")()
        assert serve(view, "middleware")().status_code == 200

    def test_a_view_called_in_an_atomic_block(self, on_site: Site) -> None:
        request = RequestFactory().get("/")
        told = pytest.raises(TransactionManagementError, match="retrying_request was called inside")
        with transaction.atomic(on_site.connection.alias), told:
            retrying_request(View(on_site))(request)

    def test_a_view_called_while_autocommit_is_off(self, on_site: Site) -> None:
        on_site.connection.set_autocommit(False)
        with pytest.raises(TransactionManagementError, match="autocommit is off"):
            retrying_request(View(on_site))(RequestFactory().get("/"))

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


@pytest.mark.parametrize("way", WAYS)
def test_in_a_test_case_a_view_runs_once_in_its_block(on_site: Site, serve: Any, way: str) -> None:
    view = View(on_site, losses=0)
    get = serve(view, way)

    class Case(TestCase):
        databases = frozenset({on_site.connection.alias})

        def runTest(self) -> None:
            assert get().content == b"response 1"

    run_case(Case)
    assert view.runs == 1
    assert on_site.written() == []


def test_the_middleware_leaves_a_decorated_view_to_its_decorator(on_site: Site, serve: Any) -> None:
    """Its last run may stand: the middleware has seen the first one alone."""
    view = View(on_site)

    def page(request: Any) -> HttpResponse:
        if view.runs == 1:
            on_site.here.cut_after(b"\x03COMMIT")
        return view(request)

    with pytest.raises(CommitOutcomeUnknown):
        serve(retrying_request(page), "middleware")()
    assert view.runs == 2
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
            kept.restore()

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
            kept.restore()

    def test_messages(self) -> None:
        request: Any = self.request()
        storage: Any = messages.storage.default_storage
        request.COOKIES = {}
        request.session = {}
        request._messages = storage(request)
        messages.info(request, "before")
        kept = Kept(request)
        messages.info(request, "of the first run")
        kept.restore()
        assert [str(one) for one in request._messages._queued_messages] == ["before"]

    def test_a_lazy_user_is_not_asked_for(self) -> None:
        request: Any = self.request()
        request.user = SimpleLazyObject(lambda: pytest.fail("it was read from the database"))
        Kept(request).restore()

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


def test_one_block_that_may_stand_ends_it(on_site: Site, serve: Any) -> None:
    """With two aliases the inner one's COMMIT stands when the outer one's is lost."""
    view = View(on_site, losses=0)
    databases: Any = connections.databases
    databases["second"] = {**databases[on_site.connection.alias]}
    try:
        runs: list[int] = []

        def page(request: Any) -> HttpResponse:
            runs.append(1)
            with connections["second"].cursor() as cursor:
                cursor.execute("INSERT INTO app_token (value) VALUES ('second')")
            view(request)
            # The second alias's block is the inner one, and commits first.
            transaction.on_commit(on_site.kill, "second")
            return HttpResponse()

        with pytest.raises(OperationalError):
            serve(page)()
        assert runs == [1]
        assert on_site.plain_rows() == ["second"]
    finally:
        connections["second"].close()
        del databases["second"]


@pytest.mark.parametrize("other", ["first", "last"])
@pytest.mark.parametrize("way", WAYS)
def test_another_engines_block_that_has_committed_is_not_run_again(
    on_site: Site, serve: Any, monkeypatch: pytest.MonkeyPatch, way: str, other: str
) -> None:
    """Django commits in the order of DATABASES, and so does the middleware's first run."""
    databases: Any = connections.databases
    monkeypatch.setitem(databases["plain"], "ATOMIC_REQUESTS", True)
    if other == "last":
        databases["plain"] = databases.pop("plain")
    runs: list[int] = []

    def page(request: Any) -> HttpResponse:
        runs.append(1)
        with connections["plain"].cursor() as cursor:
            cursor.execute("INSERT INTO app_token (value) VALUES (%s)", [f"other {len(runs)}"])
        on_site.write(f"ours {len(runs)}")
        if len(runs) == 1:
            on_site.kill()
        return HttpResponse()

    get = serve(page, way)
    if (way, other) == ("middleware", "first"):
        with pytest.raises(OperationalError):
            get()
        assert on_site.plain_rows() == ["other 1"]
    else:
        get()
        assert on_site.plain_rows() == ["other 2", "ours 2"]
