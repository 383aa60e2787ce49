"""Each error is judged once, and the judgement is handed on to all that act on it."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import Error, transaction

from django_proxysql.core import drivers
from django_proxysql.core.events import ConnectFailed
from django_proxysql.core.faults import Fault, Judgement, Proof
from tests.site import Site


@pytest.fixture
def judged(here: Site, monkeypatch: pytest.MonkeyPatch) -> list[Judgement]:
    """All judgements of the test, in order."""
    made: list[Judgement] = []
    judge = drivers.judge

    def counting(*args: Any, **kwargs: Any) -> Judgement:
        made.append(judge(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(drivers, "judge", counting)
    return made


def texts(here: Site) -> set[str]:
    """What the events say of errors."""
    return {event.error for event in here.events if getattr(event, "error", "")}


def test_lost_read_is_judged_once(here: Site, judged: list[Judgement]) -> None:
    here.cut("after")
    assert here.read() == []
    (judgement,) = judged
    assert judgement.fault is Fault.LOST
    assert texts(here) == {judgement.text}
    assert here.replayed()


def test_lost_write_is_judged_once(here: Site, judged: list[Judgement]) -> None:
    here.cut("after")
    with pytest.raises(Error):
        here.write("one")
    (judgement,) = judged
    assert judgement.fault is Fault.LOST
    assert texts(here) == {judgement.text}


def test_loss_that_a_ping_finds_is_judged_once(here: Site, judged: list[Judgement]) -> None:
    here.cut_idle()
    here.write("one")
    (judgement,) = judged
    assert texts(here) == {judgement.text}


def test_lost_commit_is_judged_once(here: Site, judged: list[Judgement]) -> None:
    with pytest.raises(Error), transaction.atomic(using=here.connection.alias):
        here.write("one")
        here.cut("after")
    (judgement,) = judged
    assert judgement.proof is Proof.UNDECIDED


def test_commit_on_a_socket_found_dead_is_judged_once(here: Site, judged: list[Judgement]) -> None:
    with pytest.raises(Error), transaction.atomic(using=here.connection.alias):
        here.write("one")
        here.cut_idle()
    assert len(judged) == 1


def test_failed_connect_is_judged_once(here: Site, judged: list[Judgement]) -> None:
    here.connection.close()
    for proxy in here.proxies:
        proxy.refuse()
    with pytest.raises(Error):
        here.read()
    failed = [event for event in here.events if isinstance(event, ConnectFailed)]
    assert [(one.fault, one.error) for one in failed] == [(one.fault, one.text) for one in judged]
    assert len(failed) == 2
