"""Connections are spread over the peers by their weights."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

from django_proxysql import LoadBalancer
from django_proxysql.core.strategies import Random

from .figures import Figure

CONNECTS = 10_000
EQUAL = {"peer0": 1.0, "peer1": 1.0, "peer2": 1.0}
WEIGHTED = {"peer0": 1.0, "peer1": 2.0, "peer2": 5.0}


class Connection:
    """A connection to nothing that knows its peer."""

    def __init__(self, host: str) -> None:
        self.host = host

    def close(self) -> None:
        """Do nothing."""


def run(quick: bool = False) -> list[Figure]:
    """Make the connects with each strategy, with equal weights and with others.

    They take so little time that there is nothing to be quick about.
    """
    figures = []
    for strategy in ("random", "round_robin", "least_connections"):
        for name, weights in (("equal", EQUAL), ("1:2:5", WEIGHTED)):
            counts = spread(strategy, weights)
            shares = " ".join(str(counts[peer]) for peer in weights)
            figures.append(
                Figure(
                    f"{strategy}, {name} ({shares})",
                    deviation(counts, weights),
                    "std.dev.",
                    3,
                )
            )
    return figures


def spread(strategy: Any, weights: Mapping[str, float]) -> Counter[str]:
    """Return how many of CONNECTS connections, all kept, each peer gets."""
    balancer = LoadBalancer(
        {peer: {"host": peer, "weight": weight} for peer, weight in weights.items()},
        connect=Connection,
        strategy=strategy,
    )
    kept = [balancer.connect() for _ in range(CONNECTS)]
    return Counter(connection.host for connection in kept)


def seeded(seed: int) -> Random:
    """Return the strategy ``random``, drawing alike each time."""
    return Random(random.Random(seed).random)


def deviation(counts: Mapping[str, int], weights: Mapping[str, float]) -> float:
    """Return the largest distance from the expected share, in standard deviations."""
    connects = sum(counts.values())
    total = sum(weights.values())
    return max(
        abs(counts[peer] - connects * weight / total)
        / math.sqrt(connects * (weight / total) * (1 - weight / total))
        for peer, weight in weights.items()
    )
