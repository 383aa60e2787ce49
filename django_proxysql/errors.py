"""Exceptions that are Django's as well as ours."""

from __future__ import annotations

from django.db.utils import OperationalError

from .core import exceptions


class NoPeerAvailable(exceptions.NoPeerAvailable, OperationalError):
    """No peer could be connected to; Django's OperationalError as well as the core's own."""


class CommitOutcomeUnknown(OperationalError):
    """COMMIT was sent, and its answer was lost: the transaction may stand or not.

    It is never repeated. An application that needs to know must look: by a token that the
    transaction wrote, for one.
    """
