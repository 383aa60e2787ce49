"""Code, docs and messages have none of the words that :mod:`tests.words` lists."""

from __future__ import annotations

import pytest

from tests import words


def test_no_file_has_a_listed_word(capsys: pytest.CaptureFixture[str]) -> None:
    status = words.main([])
    assert capsys.readouterr().out == ""
    assert status == 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Nobody knows.", [(1, "Nobody")]),
        ("# A thread that is\n    # told of it.", [(1, "is told")]),
        ("Two lines,\nand whom it concerns.", [(2, "whom")]),
        ("A readiness probe, several keepalive probes, a timestamp, pretends.", []),
    ],
)
def test_a_word_is_found_and_a_word_that_has_it_in_it_is_not(
    text: str, found: list[tuple[int, str]]
) -> None:
    assert [(number, word) for number, word, _ in words.hits(text)] == found
