"""Draw docs/images/house.svg from the package's own imports: ``python docs/house.py``.

A room is a file, or a folder that is one part. Its floor is one above the highest room that it
imports, type checkers' imports included. So an import that goes up or in a circle cannot be drawn.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent / "django_proxysql"
PICTURE = Path(__file__).parent / "images" / "house.svg"

#: Folders whose files are rooms of their own; every other folder is one room.
OPEN = {"core", "backends"}
#: Colour and caption of each part of the house.
PARTS = {
    "core": ("#e3f1e8", "the core: knows no Django"),
    "engine": ("#eef3f6", "the engine: Django's side"),
    "optional": ("#fbf3dc", "optional: imported only where it is used"),
}
OPTIONAL = {
    "core.sharing",
    "core.sqlalchemy_engine",
    "backends.pools",
    "demo",
    "monitoring",
    "templatetags",
}
ROOM_W, ROOM_H, GAP, PAD, WIDE = 118, 26, 6, 12, 8


def room_of(module: str) -> str:
    """Return the room of a module, by its dotted name in the package."""
    first, _, rest = module.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in OPEN and rest else first


def imported(module: str, path: Path) -> Iterator[str]:
    """Yield the package's modules that the file imports, wherever in its text."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                whole = ".".join([*base, alias.name])
                path_of = ROOT.joinpath(*whole.split("."))
                is_module = path_of.with_suffix(".py").exists() or path_of.is_dir()
                yield whole if is_module else ".".join(base)


def rooms() -> dict[str, set[str]]:
    """Return each room with the rooms that it imports."""
    found: dict[str, set[str]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        room = room_of(module)
        if module in ("", "__main__", *OPEN):
            continue
        found.setdefault(room, set()).update(map(room_of, imported(module, path)))
    return {room: {o for o in others if o in found} - {room} for room, others in found.items()}


def floors(house: dict[str, set[str]]) -> list[list[str]]:
    """Return the rooms floor by floor, the ground floor first.

    :raises ValueError: rooms import one another in a circle.
    """
    made: list[list[str]] = []
    below: set[str] = set()
    left = dict(house)
    while left:
        floor = sorted(room for room, others in left.items() if others <= below)
        if not floor:
            raise ValueError(f"a circle among {', '.join(sorted(left))}")
        made.append(floor)
        below.update(floor)
        for room in floor:
            del left[room]
    return made


def part_of(room: str) -> str:
    """Return which of PARTS the room belongs to."""
    if room in OPTIONAL:
        return "optional"
    return "core" if room.startswith("core.") else "engine"


def draw(house: dict[str, set[str]]) -> str:
    """Return the picture: the highest floor at the top, a room's imports in its tooltip."""
    parts: list[str] = []
    y = PAD + 24
    width = 2 * PAD + WIDE * (ROOM_W + GAP) - GAP
    for number, floor in reversed(list(enumerate(floors(house)))):
        ordered = sorted(floor, key=lambda room: (list(PARTS).index(part_of(room)), room))
        for place, room in enumerate(ordered):
            x = PAD + place % WIDE * (ROOM_W + GAP)
            row = y + place // WIDE * (ROOM_H + GAP)
            name = room.rpartition(".")[2]
            said = ", ".join(sorted(house[room])) or "nothing of this package"
            parts.append(
                f"<g><title>{escape(room)} imports {escape(said)}</title>"
                f'<rect x="{x}" y="{row}" width="{ROOM_W}" height="{ROOM_H}" rx="4" '
                f'fill="{PARTS[part_of(room)][0]}" stroke="#417690"/>'
                f'<text x="{x + ROOM_W / 2:g}" y="{row + 17}" text-anchor="middle">'
                f"{escape(name)}</text></g>"
            )
        y += -(-len(ordered) // WIDE) * (ROOM_H + GAP) + 6
        if number:
            parts.append(f'<path d="M{PAD} {y - 6}H{width - PAD}" stroke="#bbb"/>')
            y += 4
    legend = []
    for place, (colour, said) in enumerate(PARTS.values()):
        x = PAD + place * 250
        legend.append(
            f'<rect x="{x}" y="{PAD}" width="14" height="14" fill="{colour}" stroke="#417690"/>'
            f'<text x="{x + 20}" y="{PAD + 12}">{escape(said)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" '
        f'height="{y}" font-family="system-ui, sans-serif" font-size="11.5" fill="#222">\n'
        "<title>Each row imports only from the rows below it</title>\n"
        f'<rect width="{width}" height="{y}" fill="#fff"/>\n'
        + "\n".join([*legend, *parts])
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(rooms()), encoding="utf-8")
