"""What becomes of a connection that is lost, at the byte where it is lost."""

from __future__ import annotations

from typing import Any

import pytest

from tests.site import Site
from tests.stories import CUTS, tell, told

TWO = "write one; write two"
#: What is lost there, and whether it is a statement that is run again.
FIRST_OF_A_BLOCK = {
    "a statement": (f"CUT 2; {{ {TWO} }}", True),
    "a statement after a read": ("CUT 2; { read; write one; { write two } }", True),
    # Django's own savepoints use up no first statement; they are made again.
    "SAVEPOINT": ("CUT 2; { { write one }; write two }", False),
    "a statement in a nested block": (
        "CUT 4; { { read; write one }; undone { write never }; write two }",
        True,
    ),
}
STORIES = {
    # A socket that has something to say before it was asked: the connection is replaced.
    **{
        f"found before a {what}: {how}": "all: " + story.format(how=how)
        for how in ("cut_idle", "kill")
        for what, story in {
            "write": "write before; {how}; write after; written before after; "
            "replaced 1 forced; replayed 0",
            "read after idleness": "write before; request_ends; {how}; idle; read before; "
            "replaced 1; replayed 0",
        }.items()
    },
    "found before a block": f"all: kill; {{ {TWO} }}; written one two; replayed 0",
    # Between BEGIN and the first statement, too: nothing has happened in it yet.
    "found before a block's first statement": (
        f"all: {{ ensure; kill_idle; {TWO} }}; written one two; replaced 1; replayed 0"
    ),
    "found before COMMIT it is rolled back, and said so": (
        "all: !{ write one; hook a; kill }; written; ran; write two; written two; ran"
    ),
    "a read is run again": "all: SELECT 1; CUT; SELECT 42; replayed 1; lost 1",
    "a percent sign of a read is no placeholder": (
        "all: write one; write two; request_ends; cut before; "
        "SELECT value FROM app_token WHERE value LIKE 'o%' AND 7 % 4 = 3; answer one; replayed 1"
    ),
    # It may have run: the error is raised, once, and the next statement is fine.
    **{
        f"a write is raised: {kind}": (
            f"all: SELECT 1; cut {kind}; !write one; written {ran}; write two; written {ran} two; "
            "replayed 0"
        )
        for kind, ran in zip(CUTS, ("", "one", "one"))
    },
    # The application goes on in the block: on nothing, to no effect, until it has left it.
    "caught inside the block": (
        "all: SELECT 1; CUT 3; !{ write one; !write two; write three }; written; write four; "
        "written four"
    ),
    # psycopg sends it with the first statement.
    **{
        f"a block in which nothing has happened goes on: BEGIN: {servers}": (
            f"{servers}: SELECT 1; CUT; {{ {TWO} }}; written one two; replayed {replayed}; "
            "write three; written one two three"
        )
        for servers, replayed in (("mysql", 0), ("postgres", 1))
    },
    **{
        f"a block in which nothing has happened goes on: {lost}": (
            f"all: SELECT 1; {story}; written one two; replayed {replayed:d}; write three; "
            "written one two three"
        )
        for lost, (story, replayed) in FIRST_OF_A_BLOCK.items()
    },
    **{
        f"a block fails after its first write: {work}": (
            f"all: SELECT 1; CUT 3; !{{ hook a; {work} }}; written; ran; write three; "
            "written three; ran; replayed 0"
        )
        for work in (TWO, "write one; read", "write one; { write two }")
    },
    **{
        f"COMMIT is unknown: {kind}": (
            f"all: SELECT 1; cut {kind} 3; !!{{ hook a; write one }}; written {ran}; ran; "
            f"write two; written {ran} two; ran"
        )
        for kind, ran in zip(CUTS, ("", "one", "one"))
    },
    # COMMIT was answered: what comes after it is no error. psycopg sends nothing there.
    "after COMMIT the hooks run once": (
        "mysql: SELECT 1; CUT 4; { hook a; write one }; ran a; written one; write two; "
        "written one two; ran a"
    ),
    "at ROLLBACK the application's own exception comes out": (
        "all: SELECT 1; CUT 3; undone { write one }; written; write two; written two"
    ),
}


@told(STORIES)
def test_story(request: Any, server: str, settings: dict[str, Any], text: str) -> None:
    tell(request, server, settings, text)


@pytest.mark.parametrize("how", ["dead", "drained"])
def test_schema_change_uses_one_peer_from_start_to_end(here: Site, how: str) -> None:
    """And not one that is gone before the start."""
    here.read()
    lost = here.connection.peer
    if how == "dead":
        here.here.refuse()
        here.cut_idle()
    else:
        here.balancer.drain(lost.name)
    with here.connection.schema_editor() as editor:
        editor.execute("CREATE TABLE app_made (id integer)")
        editor.execute("DROP TABLE app_made")
        assert here.connection.peer is not lost


def test_look_at_the_socket_costs_no_round_trip(here: Site) -> None:
    proxy = here.here
    here.read()
    sent = proxy.client_packets
    here.idle()
    here.read()
    here.idle()
    here.write("one")
    assert proxy.client_packets - sent == 2
