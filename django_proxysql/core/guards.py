"""Generators that a permit guards while they are run through."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import Any

from .permits import Permit

__all__ = ["run_through", "run_through_async"]


def run_through(generator: Generator[Any, Any, Any], permit: Permit) -> Generator[Any, Any, Any]:
    """Yield from ``generator``; its end is the permit's."""
    try:
        result = yield from generator
    except BaseException as exc:
        permit.judge(exc)
        raise
    permit.succeeded()
    return result


async def run_through_async(
    generator: AsyncGenerator[Any, Any], permit: Permit
) -> AsyncGenerator[Any, Any]:
    """Do for an asynchronous generator what ``yield from`` does for another."""
    try:
        try:
            item = await generator.__anext__()
            while True:
                try:
                    sent = yield item
                except GeneratorExit:
                    await generator.aclose()
                    raise
                except BaseException as exc:
                    item = await generator.athrow(exc)
                else:
                    item = await generator.asend(sent)
        except StopAsyncIteration:
            permit.succeeded()
    except BaseException as exc:
        permit.judge(exc)
        raise
