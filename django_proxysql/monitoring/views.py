"""The status page, its buttons, and the health endpoint.

None of them opens a database connection. Who asks is found out by Django's
own means, though, and their sessions and users mostly live in the database.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from django.apps import apps
from django.conf import settings
from django.contrib import messages
from django.core.exceptions import ImproperlyConfigured
from django.db import Error, connections, transaction
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.shortcuts import render, resolve_url
from django.template import Engine, RequestContext
from django.urls import NoReverseMatch, Resolver404, resolve, reverse
from django.views.decorators.cache import never_cache
from django.views.decorators.clickjacking import xframe_options_deny
from django.views.decorators.csrf import csrf_protect
from django.views.decorators.http import require_POST, require_safe

from ..conf.options import healthz_is_on, operate_permission
from ..core.balancer import LoadBalancer
from ..core.circuit import CLOSED
from ..core.drivers import describe
from ..core.exceptions import DrainRefused
from ..core.logger import complain, logger
from ..core.peer import Peer
from ..registry import balancers
from .status import health, process_name, status

#: Seconds between two looks of a page that refreshes itself.
REFRESH = 5

_HERE = Path(__file__).parent
_TEMPLATES = _HERE.parent / "templates"

View = Callable[..., HttpResponse]


def _without_transaction(view: View) -> View:
    """Let ATOMIC_REQUESTS open no connection for this view, in whichever database."""
    for alias in connections:
        view = transaction.non_atomic_requests(using=alias)(view)
    return view


def _guarded(view: View) -> View:
    """Let only staff in, and nothing be cached, framed or forged."""

    @functools.wraps(view)
    def guarded(request: HttpRequest) -> HttpResponse:
        return _refusal(request) or view(request)

    # csrf_protect works where its middleware is off, too.
    return _without_transaction(never_cache(xframe_options_deny(csrf_protect(guarded))))


# What is asked for


@_guarded
@require_safe
def page(request: HttpRequest) -> HttpResponse:
    """Show how things stand."""
    return _page(request)


@_guarded
@require_POST
def operate(request: HttpRequest) -> HttpResponse:
    """Drain a peer, take it back, or make its trial; then show how things stand."""
    if not _may_operate(request):
        return _say(request, 403, "You may look, but not drain", f"That takes {_what_it_takes()}.")
    alias, name = request.POST.get("balancer", ""), request.POST.get("peer", "")
    action = request.POST.get("action", "")
    try:
        balancer = balancers[alias]
        peer = balancer.peers[name]
    except (KeyError, ImproperlyConfigured):
        text = f"There is no load balancer {alias!r} with a peer {name!r} in {process_name()}."
        return _say(request, 404, "No such peer", text)
    if action == "drain":
        forced = request.POST.get("force") == "yes"
        try:
            balancer.drain(name, force=forced)
        except DrainRefused as exc:
            return _page(request, 409, refused=str(exc), alias=balancer.name, peer=name)
        said = f"drained {name}, the last that took connections" if forced else f"drained {name}"
    elif action == "undrain":
        balancer.undrain(name)
        said = f"took {name} back into use"
    elif action == "retry":
        said = _try(balancer, peer)
    else:
        return _say(request, 400, "No such action", "It is drain, undrain or retry.")
    _note(request, balancer, name, action, said)
    return HttpResponseRedirect(_url(request, "status"))


def _try(balancer: LoadBalancer, peer: Peer) -> str:
    """Make a peer's trial here and now, which may take as long as a connect; say how it went."""
    if peer.drained:
        return f"had {peer.name} not tried, for it is drained"
    if peer.breaker.is_available:
        return f"had {peer.name} not tried, for its circuit is closed"
    before = peer.breaker.circuit.tried
    try:
        succeeded = balancer.try_out(peer, now=True)
    except Exception as exc:
        # Nothing that the peer could do anything about: wrong OPTIONS, say.
        return f"had {peer.name} tried, which could not be done: {describe(exc)}"
    circuit = peer.breaker.circuit
    if not succeeded:
        if balancer.sharing and not peer.breaker.trial and circuit.tried == before:
            return f"had {peer.name} not tried, for another process is trying it"
        why = "another trial of it is under way" if peer.breaker.trial else circuit.error
        return f"had {peer.name} tried, without success: {why}"
    if circuit.state != CLOSED:
        return f"had {peer.name} tried: it answered, and has to again before it is in use"
    return f"had {peer.name} tried: it is in use again"


@_without_transaction
@never_cache
@require_safe
def healthz(request: HttpRequest) -> HttpResponse:
    """Say for machines whether every balancer has a usable peer; 503 where one has none."""
    if not healthz_is_on():
        raise Http404("DJANGO_PROXYSQL['HEALTHZ'] is not True")
    # Only here is it asked who asks, which may take a database.
    detailed = request.GET.get("detail") == "1" and _is_staff(request) is True
    well, answer = health(detailed=detailed)
    return JsonResponse(answer, status=200 if well else 503)


#: The page's looks and what refreshes it: served from here, so that a site needs no staticfiles,
#: and no inline script that its Content-Security-Policy would forbid.
ASSETS = {"status.css": "text/css", "status.js": "text/javascript"}


@_without_transaction
@require_safe
def asset(request: HttpRequest, name: str) -> HttpResponse:
    """Send one of :data:`ASSETS`; for ever where the URL has its version."""
    content, version = _content(name)
    response = HttpResponse(content, content_type=f"{ASSETS[name]}; charset=utf-8")
    current = request.META.get("QUERY_STRING") == version
    response["Cache-Control"] = "public, max-age=31536000, immutable" if current else "no-cache"
    return response


# Who asks


def _is_staff(request: HttpRequest) -> bool | None:
    """Return whether staff asks; None where that cannot be found out now."""
    user = getattr(request, "user", None)
    try:
        # A site's own user model may know of no staff.
        return bool(getattr(user, "is_active", False) and getattr(user, "is_staff", False))
    except Error:
        return None


def _refusal(request: HttpRequest) -> HttpResponse | None:
    """Return the answer to a visitor who is not let in; None: let in."""
    staff = _is_staff(request)
    if staff:
        return None
    if staff is None:
        return _say(
            request,
            503,
            "The database is unavailable",
            "Your session and your account are in it, so this page cannot tell whether you may see "
            'it. Run "manage.py peers" on a host of the site: it asks each peer and shows its '
            "error. The health endpoint answers without the database, too.",
        )
    user = getattr(request, "user", None)
    title = "For staff only"
    if user is None:
        title = "Not for everybody"
        text = (
            "This page is for staff, and it is unknown who you are: the site has no "
            "AuthenticationMiddleware."
        )
    elif user.is_authenticated:
        text = f"You are logged in as {user.get_username()}, which is no staff account."
    elif login := _login_page():
        return HttpResponseRedirect(f"{login}?{urlencode({'next': request.get_full_path()})}")
    else:
        text = "Log in first, with a staff account."
    return _say(request, 403, title, text)


def _login_page() -> str:
    """Return where to log in: the admin's page, or else the site's, if there is one."""
    if _has_admin():
        return reverse("admin:login")
    try:
        url = resolve_url(settings.LOGIN_URL)
        resolve(url)
    except (NoReverseMatch, Resolver404):
        return ""
    return url


def _may_operate(request: HttpRequest) -> bool:
    user: Any = request.user
    permission = operate_permission()
    if permission is None:
        return bool(getattr(user, "is_superuser", False))
    try:
        return bool(user.has_perm(permission))
    except Error:
        return False


def _what_it_takes() -> str:
    permission = operate_permission()
    return f"the permission {permission}" if permission else "a superuser"


# What they get


def _page(
    request: HttpRequest, code: int = 200, *, refused: str = "", alias: str = "", peer: str = ""
) -> HttpResponse:
    context = {
        "title": "Database peers",
        "status": status(),
        "refresh": 0 if refused else REFRESH,
        "may_operate": _may_operate(request),
        "what_it_takes": _what_it_takes(),
        "operate_url": _url(request, "operate"),
        "script_url": _asset_url(request, "status.js"),
        "refused": refused,
        "alias": alias,
        "peer": peer,
    }
    return _framed(request, "status.html", context, code, in_admin=_has_admin())


def _say(request: HttpRequest, code: int, title: str, text: str) -> HttpResponse:
    """Return a page that says why there is nothing to see."""
    return _framed(request, "refused.html", {"title": title, "text": text}, code)


def _framed(
    request: HttpRequest, template: str, context: dict[str, Any], code: int, in_admin: bool = False
) -> HttpResponse:
    """Return a page in the admin's frame or in our own."""
    name = f"django_proxysql/{template}"
    context.update(
        status_url=_url(request, "status"), stylesheet_url=_asset_url(request, "status.css")
    )
    if in_admin:
        from django.contrib.admin import site

        context.update(
            base="admin/base_site.html",
            # As AdminSite.each_context() says, but for its list of apps, which asks the database.
            site_title=site.site_title,
            site_header=site.site_header,
            site_url=site.site_url,
            has_permission=True,
            is_nav_sidebar_enabled=False,
        )
        return render(request, name, context, status=code)
    # The site needs neither admin nor TEMPLATES for ours.
    context.update(base="django_proxysql/base.html", messages=messages.get_messages(request))
    page = _own_engine().get_template(name).render(RequestContext(request, context))
    return HttpResponse(page, status=code)


@functools.cache
def _own_engine() -> Engine:
    return Engine(dirs=[str(_TEMPLATES)])


def _has_admin() -> bool:
    """Return whether the site serves Django's admin, whose looks are then the page's."""
    # Our templates in that frame are found by the site's own loaders.
    if not (apps.is_installed("django.contrib.admin") and apps.is_installed("django_proxysql")):
        return False
    try:
        reverse("admin:index")
    except NoReverseMatch:
        return False
    return True


def _url(request: HttpRequest, name: str) -> str:
    """Return where another of these views is, under whichever namespace they are included."""
    match = request.resolver_match
    namespace = match.namespace if match else ""
    return reverse(f"{namespace or 'django_proxysql'}:{name}")


def _note(request: HttpRequest, balancer: LoadBalancer, peer: str, action: str, said: str) -> None:
    """Report what was done: to the user who did it, in the log, and in the admin's log."""
    user: Any = request.user
    where = "" if action == "retry" else f", {_where(balancer)}"
    logger.log(
        logging.WARNING if action == "drain" else logging.INFO,
        "%s: on the status page %s %s",
        balancer.name,
        user.get_username(),
        said,
        extra={"alias": balancer.name, "peer": peer, "user": user.get_username()},
    )
    well = action != "retry" or balancer.peers[peer].is_available
    messages.add_message(
        request,
        messages.SUCCESS if well else messages.WARNING,
        f"You {said} (load balancer {balancer.name}){where}.",
        fail_silently=True,
    )
    if not apps.is_installed("django.contrib.admin"):
        return
    from django.contrib.admin.models import CHANGE, LogEntry

    try:
        LogEntry.objects.create(
            user_id=user.pk,
            object_repr=f"{peer} of load balancer {balancer.name}"[:200],
            action_flag=CHANGE,
            change_message=f"{said[:1].upper()}{said[1:]}{where}.",
        )
    except Error:
        # It is done and logged; the database may be what is being repaired.
        complain("%s: the admin's log could not be written", balancer.name)


def _where(balancer: LoadBalancer) -> str:
    """Return where it holds what an operator has done."""
    if balancer.sharing is None:
        return f"in {process_name()} only"
    if balancer.sharing.settle():
        return "in all processes that share its state"
    return (
        f"in {process_name()}; the others will follow when Redis answers again (it "
        f"{balancer.sharing.trouble})"
    )


@functools.cache
def _content(name: str) -> tuple[bytes, str]:
    content = (_HERE / "assets" / name).read_bytes()
    return content, hashlib.sha256(content).hexdigest()[:12]


def _asset_url(request: HttpRequest, name: str) -> str:
    return f"{_url(request, name)}?{_content(name)[1]}"
