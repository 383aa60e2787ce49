"""The table, as it stands in the docs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .judgement import Result

#: Each column's heading, and what stands in it.
COLUMNS = (
    ("scenario", "{.scenario}"),
    ("faults", "{.faults}"),
    ("requests", "{.requests:,}"),
    ("failed\nreads", "{.failed_reads:,}"),
    ("failed\nwrites", "{.failed_writes:,}"),
    ("failed\nblocks", "{.failed_blocks:,}"),
    ("timed\nout", "{.timed_out:,}"),
    ("failed in\nthe outage", "{.in_outage:,}"),
    ("lost", "{.lost}"),
    ("doubled", "{.doubled}"),
    ("longest\nrequest", "{.longest:.2f} s"),
)


def table(results: Sequence[Result]) -> str:
    """Return a simple table of reStructuredText's."""
    rows = [[text.format(result) for _, text in COLUMNS] for result in results]
    headings = [heading.split("\n") for heading, _ in COLUMNS]
    width = [
        max(*(len(part) for part in heading), *(len(row[column]) for row in rows))
        for column, heading in enumerate(headings)
    ]
    rule = "  ".join("=" * size for size in width)
    lines = [rule]
    for line in range(2):
        cells = [heading[line] if line < len(heading) else "" for heading in headings]
        # Not to the right: a second line that begins further left is an error to docutils.
        lines.append("  ".join(cell.ljust(size) for cell, size in zip(cells, width)).rstrip())
    lines.append(rule)
    lines += [_line(row, width) for row in rows]
    lines.append(rule)
    notes = [note for result in results for note in _notes(result)]
    return "\n".join([*lines, "", *notes] if notes else lines)


def _notes(result: Result) -> Iterator[str]:
    if result.engine != "plain":
        yield (
            f"{result.scenario}: {result.replaced} connections were replaced,"
            f" {result.replayed} statements and {result.retried} blocks were run again,"
            f" {result.resolved} COMMITs were asked about"
        )
    if result.resumed_after is not None:
        yield (
            f"{result.scenario}: a request was served {result.resumed_after:.2f} s after the"
            f" first peer's return, the last error was {result.quiet_after:.2f} s after it"
        )


def _line(cells: Sequence[str], width: Sequence[int]) -> str:
    first, *others = cells
    return "  ".join(
        [first.ljust(width[0]), *(cell.rjust(size) for cell, size in zip(others, width[1:]))]
    ).rstrip()
