"""ENGINE: ``django_proxysql.backends.proxysql``."""

from __future__ import annotations

from typing import Any

from django.db import DEFAULT_DB_ALIAS
from django.db.backends.base.base import BaseDatabaseWrapper

from ..engines import EngineType, engine_class, first_class
from ..shims import ClientMixin, CreationMixin, Helper, SchemaEditorMixin, ValidationMixin
from ..wrapper import SafePointsMixin


class DatabaseWrapper(SafePointsMixin, BaseDatabaseWrapper, metaclass=EngineType):
    """A load-balanced connection: an instance of this and of the peer engine's own class.

    Subclass it like any other backend's; the peer engine is mixed in when an
    instance is made, from what its settings say. As a class it has the attributes of the
    peers' engine of the first balancer that has it for its ENGINE.
    """

    #: Whether the peer engine is mixed in.
    _is_made = False

    @classmethod
    def _class_for_settings(cls) -> type:
        return first_class(cls)

    @staticmethod
    def _namespace(wrapper: Any) -> dict[str, Any]:
        return {
            "client_class": Helper(ClientMixin),
            "creation_class": Helper(CreationMixin),
            "validation_class": Helper(ValidationMixin),
            "SchemaEditorClass": Helper(SchemaEditorMixin),
        }

    @classmethod
    def _made_for(
        cls, settings_dict: dict[str, Any], alias: str = DEFAULT_DB_ALIAS, *args: Any, **kwargs: Any
    ) -> EngineType:
        return engine_class(cls, settings_dict, alias)
