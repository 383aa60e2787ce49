"""Words and phrases that this project does not use, and what to write instead.

``python -m tests.words`` lists the places that have one, of all files or of those named.
A pattern stands here if it is wrong in every sense that it may have.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: What is read: code, docs, templates.
SUFFIXES = {".py", ".rst", ".md", ".html", ".js", ".css", ".sh", ".lua", ".toml", ".yml"}
FOLDERS = ("django_proxysql", "docs", "tests", "cases", ".ci")

#: Each pattern, and what to write.
WORDS = {
    # Plain English.
    r"\bwhoever\b": "name who: the caller, the thread that …",
    r"\bwhom\b": "who, or name them",
    r"\bnobody\b": "no one, no thread, no process",
    r"\b(?:be|is|are) had\b": "available, or what can be done",
    r"\b(?:is|are|was|were|be|been|being) told\b": "is given, learns, or who tells it",
    r"\bof one's own\b": "its own",
    r"\bsave for\b": "except",
    r"\blest\b": "so that … not",
    r"\bwithout saying\b": "leave it out",
    r"\bbefall\w*\b": "happens to",
    r"\bout of nowhere\b": "asynchronous",
    r"\bstruck out\b": "interrupted",
    r"\bis believed in\b": "is trusted",
    r"\buntil when\b": "the time until which",
    # One word for one thing.
    r"\bslow[ _]start\b": "rebalance",
    r"\bunits? of work\b": "request or task",
    # Not Kubernetes' probes, nor TCP's.
    r"\bprobers?\b|\bprob(?:ed|ing)\b|\bas probe\b|\bprobe\.": "trial",
    r"\bhear(?:s|d)?\b": "a listener is notified, or called",
    r"\bsticky\b": "with session state",
    r"\bstay(?:s|ed)? with (?:a|one|its|that|the) peer\b": "is pinned",
    r"\bswap(?:s|ped|ping)?\b": "replace",
    r"\bwish(?:es|ed)?\b": "desired state",
    r"\btend(?:s|ed)?\b": "schedule",
    r"\bsever(?:s|ed)?\b": "detach",
    r"\bharden(?:s|ed|ing)?\b": "keepalive",
    r"\bseams?\b": "hook",
    r"\blook(?:s|ed)? anew\b": "invalidate",
    r"\blet(?:s|ting)? go\b": "release",
    r"\bfate\b": "outcome",
    r"\blearnt\b": "applied, found elsewhere",
    r"\bteller\b": "dispatcher",
    r"\b(?:there|here)by\b": "so",
}
# A phrase may go on in the next line. Looked for at the beginnings of words alone: a fifth of the
# time.
PATTERN = re.compile(
    r"\b(?=\w)(?:{})".format(
        "|".join("({})".format(pattern.replace(" ", r"\s+")) for pattern in WORDS)
    ),
    re.IGNORECASE,
)


def files() -> list[Path]:
    """Return all files that are read."""
    own = {Path(__file__), Path(__file__).with_name("test_style.py")}
    found = [path for path in ROOT.iterdir() if path.suffix in SUFFIXES]
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    return sorted(path for path in found if path not in own and "_build" not in path.parts)


def hits(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield each place: its line's number, what stands there, and what to write."""
    instead = list(WORDS.values())
    # A name is read as its words are: test_nobody_waits, TestSeams.
    joined = re.sub(r"(?<=[a-z])_(?=[a-z])|(?<=[a-z])\B(?=[A-Z][a-z])", " ", text)
    # A comment that goes on in the next line is one text.
    joined = re.sub(r"\n[ \t]*#:? ", lambda match: "\n" + " " * (len(match[0]) - 1), joined)
    for match in PATTERN.finditer(joined):
        number = joined.count("\n", 0, match.start()) + 1
        yield number, " ".join(match[0].split()), instead[(match.lastindex or 1) - 1]


def main(names: list[str]) -> int:
    """Print all places; return 1 if there is one."""
    bad = 0
    for path in [Path(name).resolve() for name in names] or files():
        name = path.relative_to(ROOT).as_posix()
        for number, words, instead in hits(path.read_text(encoding="utf-8")):
            bad += 1
            print(f"{name}:{number}: {words!r}: {instead}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
