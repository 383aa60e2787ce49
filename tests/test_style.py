"""Words that :mod:`tests.words` lists are nowhere; sentences are short; long files say why."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import django_proxysql
from tests import words

PACKAGE = Path(django_proxysql.__file__).parent
#: Lines.
LONG_FILE, LONG_CLASS = 450, 300
#: Words.
LONG_SENTENCE = 35
#: Code, figures and other directives with no prose; rows of a table; a bullet.
NO_PROSE = r"^( *)\.\. (?:code-block|image|include|raw|toctree|_).*\n(?:\n|\1 .*\n)*"
TABLE = r"^ *(?:=+ +=[= ]*|\+[-=+]+)\n(?:.+\n)*"
BULLET = r"^ *(?:[*#-]|\d+\.) "


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
        ("def test_nobody_waits() -> None:\n\nclass TestSeams:", [(1, "nobody"), (3, "Seams")]),
        ("A readiness probe, several keepalive probes, a timestamp, pretends.", []),
    ],
)
def test_a_word_is_found_and_a_word_that_has_it_in_it_is_not(
    text: str, found: list[tuple[int, str]]
) -> None:
    assert [(number, word) for number, word, _ in words.hits(text)] == found


def long_sentences(page: str) -> Iterator[str]:
    """Yield the first words of each sentence that is too long, outside code and tables."""
    page = re.sub(rf"{NO_PROSE}|{TABLE}|{BULLET}", "\n", page, flags=re.M)
    page = re.sub(r"``.+?``", "CODE", page)
    for sentence in re.split(r"[.!?][)\"*]*\s|\n\s*\n", page):
        if len(re.findall(r"\S*\w\S*", sentence)) > LONG_SENTENCE:
            yield " ".join(sentence.split()[:8])


def test_no_sentence_of_the_docs_is_long() -> None:
    found = {
        path.relative_to(words.ROOT).as_posix(): list(long_sentences(path.read_text("utf-8")))
        for path in words.files()
        if path.suffix in {".rst", ".md"}
    }
    assert {path: long for path, long in found.items() if long} == {}


def test_a_long_sentence_is_found_and_code_and_tables_are_not() -> None:
    line = "so many words " * 6
    assert list(long_sentences(f"One.\n\n* It has {line}\n  {line}.")) == [
        "It has so many words so many words"
    ]
    assert list(long_sentences(f"{line}.\n{line}")) == []
    assert list(long_sentences(f"* {line}\n* {line}")) == []
    assert list(long_sentences(f".. code-block:: text\n\n   {line}\n\n   {line}{line}\n")) == []
    assert list(long_sentences(f"=== ===\n{line}{line}{line}\n=== ===\n")) == []


def lonely_cells(page: str) -> Iterator[str]:
    """Yield what a table between rules of ``=`` shows as a row with nothing beside it.

    There each line with a first cell begins a row. A first cell of two lines takes a table of
    ``+`` and ``|``.
    """
    for rule, body in re.findall(
        r"^( *=+ +)=[= ]*\n((?:.+\n)+?)(?= *=+ +=[= ]*\n\n)", page, flags=re.M
    ):
        for line in body.splitlines():
            if line[: len(rule)].strip(" =") and not line[len(rule) :].strip():
                yield line.strip()


def test_each_row_of_a_table_has_more_than_a_first_cell() -> None:
    found = {
        path.relative_to(words.ROOT).as_posix(): list(lonely_cells(path.read_text("utf-8")))
        for path in words.files()
        if path.suffix == ".rst"
    }
    assert {path: lonely for path, lonely in found.items() if lonely} == {}


def test_a_row_with_nothing_beside_it_is_found_and_a_longer_last_cell_is_not() -> None:
    rule = "=== ===\n"
    rows = "a   one\n    and\nb   two\n"
    assert list(lonely_cells(f"{rule}{rows}{rule}\n")) == []
    assert list(lonely_cells(f"{rule}x   y\n{rule}{rows}too\n{rule}\n")) == ["too"]


def too_long(text: str) -> Iterator[str]:
    """Yield what is too long in a file that does not say at its top why."""
    tree = ast.parse(text)
    if "Longer than other" in (ast.get_docstring(tree) or ""):
        return
    if text.count("\n") > LONG_FILE:
        yield "the file"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > LONG_CLASS:
                yield f"class {node.name}, {lines} lines"


def test_file_or_class_that_is_long_says_why_at_the_files_top() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix(): list(too_long(path.read_text(encoding="utf-8")))
        for path in PACKAGE.rglob("*.py")
    }
    assert {path: long for path, long in found.items() if long} == {}


def test_a_long_class_is_found_and_a_reason_is_enough() -> None:
    text = "class Long:\n" + "    a = 1\n" * LONG_CLASS
    assert list(too_long(text)) == [f"class Long, {LONG_CLASS + 1} lines"]
    assert list(too_long("#\n" * LONG_FILE + "#\n")) == ["the file"]
    assert list(too_long(f'"""A subject.\n\nLonger than others: a reason."""\n{text}')) == []
