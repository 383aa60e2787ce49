"""A plugin of pytest's: run modules, and the tests of each, in random order.

``TEST_ORDER=7 bash tests/run -n 3 -p tests.shuffled``. Without TEST_ORDER the order is a new one,
which pytest's header names.
"""

from __future__ import annotations

import os
import random

import pytest

#: In the environment, where the worker processes find it.
ORDER = os.environ.setdefault("TEST_ORDER", str(random.randrange(10**6)))


def pytest_report_header() -> str:
    return f"random order: TEST_ORDER={ORDER}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    chance = random.Random(ORDER)
    modules = sorted({item.path for item in items})
    chance.shuffle(modules)
    chance.shuffle(items)
    items.sort(key=lambda item: modules.index(item.path))
