"""A middleware that has views run again when the database gave their blocks up."""

from __future__ import annotations

import inspect
import time
from typing import Any, Callable

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.base import BaseHandler
from django.utils.deprecation import MiddlewareMixin
from django.utils.module_loading import import_string

from .backends.state import NO_TRANSACTION
from .request import Body, Kept, atomic_aliases
from .retry import Call, Rules

_BODY = "_django_proxysql_body"
_RUN = "_django_proxysql_run"


class RetryingRequestMiddleware(MiddlewareMixin):
    """Runs each view under ATOMIC_REQUESTS again by the rules of ``retrying_request``.

    It is the last in MIDDLEWARE: it keeps the request as the view finds it. A view on whose aliases
    ``non_atomic_requests`` stands, or an async one, is left alone. So is each view if an alias of
    another engine would commit before one of this engine's.

    :raises ImproperlyConfigured: a middleware after it has a ``process_view()`` of its own.
    """

    rules = Rules("RetryingRequestMiddleware")

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        super().__init__(get_response)
        names = list(settings.MIDDLEWARE)
        own = [number for number, name in enumerate(names) if import_string(name) is type(self)]
        for name in names[max(own, default=len(names)) + 1 :]:
            if hasattr(import_string(name), "process_view"):
                raise ImproperlyConfigured(
                    f"MIDDLEWARE has {name!r} after {names[own[-1]]!r}, which would run a view "
                    "again without what the former does before it. "
                    "Put RetryingRequestMiddleware last."
                )

    def process_request(self, request: Any) -> None:
        """Have the body recorded from here on: CSRF protection reads it before the view does."""
        setattr(request, _BODY, Body.record(request))

    def process_view(self, request: Any, view: Any, args: Any, kwargs: Any) -> None:
        """Keep the request as the view will find it."""
        # A view of retrying_request has its blocks there.
        without = getattr(view, "_non_atomic_requests", ())
        call = Call(self.rules, view, atomic_aliases(without))
        # Another engine's block that has committed would be run twice.
        if not call.ours or call.is_in_test or not call.fits_django:
            return
        for wrapper in call.ours:
            wrapper.next_block = NO_TRANSACTION
        kept = Kept(request, getattr(request, _BODY))
        setattr(request, _RUN, (call, kept, view, args, kwargs))

    def process_template_response(self, request: Any, response: Any) -> Any:
        """Leave alone what comes of rendering it: the view's blocks have ended."""
        vars(request).pop(_RUN, None)
        return response

    def process_exception(self, request: Any, exception: Exception) -> Any:
        """Run the view again, if its first run ended by what may be run again.

        :returns: the response of the run that ended well, or what another middleware makes of the
            last run's error; None: the exception is raised.
        :raises Exception: what the last run raised.
        """
        run = vars(request).pop(_RUN, None)
        if run is None:
            return None
        call, kept, view, args, kwargs = run
        call.adopt([wrapper.next_block for wrapper in call.ours])
        seconds = call.seconds_to_wait(exception)
        if seconds is None:
            return None
        time.sleep(seconds)
        try:
            return call.repeat(
                lambda: view(request, *args, **kwargs), lambda: kept.restore(request)
            )
        except Exception as exc:
            # Django shows the other middlewares the first run's error.
            handler = getattr(inspect.unwrap(self.get_response), "__self__", None)
            if not isinstance(handler, BaseHandler):
                raise
            response = handler.process_exception_by_middleware(exc, request)
            if response is None:
                raise
            return response
