"""For those who operate a site: what is known of the peers, where it can be seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Union

from ..core.face import Face

if TYPE_CHECKING:
    from ..registry import Balancers

    Source = Union[Face, Balancers]


def check_sources(taker: str, sources: Iterable[Source]) -> None:
    """Raise a TypeError if a source of events is no load balancer."""
    for source in sources:
        if not hasattr(source, "add_listener"):
            kind = type(source).__name__
            raise TypeError(
                f"{taker} takes load balancers, or Django's balancers, and not a {kind}."
            )


def in_use(sources: Iterable[Source]) -> list[Face]:
    """Return the load balancers that there are by now, each once."""
    found: dict[Face, None] = {}
    for source in sources:
        if isinstance(source, Face):
            found[source] = None
        else:
            found.update((known.balancer, None) for known in list(source.known.values()))
    return list(found)
