"""Draw docs/images/architecture.svg from the text below: ``python docs/architecture.py``."""

from __future__ import annotations

from html import escape
from pathlib import Path

#: Each box: column, row, width and height in cells, its heading, and the lines below that.
BOXES = """
0 0 1 3 | your site's processes | Django's ORM | connections["default"]
1 0 2 3 | django-proxysql, in each process | picks a peer: strategy, weight, priority | \
goes on to the next within the same connect() | replaces a lost connection at a safe point | \
runs a lost read again
3 0 1 1 | peer db1 | circuit closed: in use
3 1 1 1 | peer db2 | circuit open: left alone
3 2 1 1 | peer db3 | circuit closed: in use
"""
#: From column and row to column and row, and whether the way is taken.
ARROWS = """
0 1 1 1 yes
2 1 3 0 yes
2 1 3 1 no
2 1 3 2 yes
"""
CELL_W, CELL_H, GAP, PAD = 190, 62, 34, 10


def left(column: int) -> int:
    return PAD + column * (CELL_W + GAP)


def top(row: int) -> int:
    return PAD + row * (CELL_H + 14)


def draw() -> str:
    parts = []
    for line in BOXES.strip().split("\n"):
        place, heading, *said = (part.strip() for part in line.split("|"))
        column, row, wide, high = map(int, place.split())
        x, y = left(column), top(row)
        w = wide * CELL_W + (wide - 1) * GAP
        h = high * CELL_H + (high - 1) * 14
        out = any("open" in one for one in said)
        fill = "#f7e3e1" if out else "#e3f1e8" if heading.startswith("peer") else "#eef3f6"
        parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="{fill}" '
            'stroke="#417690"/>'
        )
        lines = [f'<tspan font-weight="bold">{escape(heading)}</tspan>', *map(escape, said)]
        first = y + h / 2 - (len(lines) - 1) * 10 + 5
        for number, text in enumerate(lines):
            parts.append(
                f'<text x="{x + w / 2:g}" y="{first + number * 20:g}" '
                f'text-anchor="middle">{text}</text>'
            )
    for line in ARROWS.strip().split("\n"):
        a, b, c, d, taken = line.split()
        x1, y1 = left(int(a)) + CELL_W, top(int(b)) + CELL_H / 2
        x2, y2 = left(int(c)) - 4, top(int(d)) + CELL_H / 2
        style = 'stroke="#2e8b57"' if taken == "yes" else 'stroke="#d6453d" stroke-dasharray="5 4"'
        parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke-width="2" {style} '
            'marker-end="url(#tip)"/>'
        )
    width, height = left(4) - GAP + PAD, top(3) - 14 + PAD
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="13" fill="#222">\n'
        "<title>The site's processes connect through django-proxysql to peers that work</title>\n"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#555"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    (Path(__file__).parent / "images" / "architecture.svg").write_text(draw(), encoding="utf-8")
