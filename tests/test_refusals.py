"""What follows from a refused write: every combination of what the connections say."""

from __future__ import annotations

import itertools

import pytest

from django_proxysql.backends.refusals import Answer, Verdict, after_read_only

WRITABLE, READ_ONLY, UNKNOWN = Answer.WRITABLE, Answer.READ_ONLY, Answer.UNKNOWN

#: (the refused connection, a new one): what follows.
TABLE = {
    (WRITABLE, WRITABLE): Verdict(),
    (WRITABLE, READ_ONLY): Verdict(),
    (WRITABLE, UNKNOWN): Verdict(),
    (READ_ONLY, WRITABLE): Verdict(drops=True),
    (READ_ONLY, READ_ONLY): Verdict(drops=True, opens=True),
    (READ_ONLY, UNKNOWN): Verdict(drops=True),
    (UNKNOWN, WRITABLE): Verdict(asks_later=True),
    (UNKNOWN, READ_ONLY): Verdict(drops=True, opens=True),
    (UNKNOWN, UNKNOWN): Verdict(asks_later=True),
}


@pytest.mark.parametrize(("own", "new"), list(itertools.product(Answer, Answer)))
def test_refused_write(own: Answer, new: Answer) -> None:
    assert after_read_only(own, new) == TABLE[own, new]


@pytest.mark.parametrize("new", Answer)
def test_circuit_opens_only_if_a_new_connection_is_read_only_too(new: Answer) -> None:
    assert any(after_read_only(own, new).opens for own in Answer) is (new is READ_ONLY)


@pytest.mark.parametrize("new", Answer)
def test_connection_that_says_it_is_read_only_is_dropped(new: Answer) -> None:
    assert after_read_only(READ_ONLY, new).drops
