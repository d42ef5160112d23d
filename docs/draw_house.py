"""Draw `house.svg`: the folders of the package as rooms on floors, ordered by who imports whom.

    python docs/draw_house.py            writes docs/house.svg
    python docs/draw_house.py --count    prints modules and lines of every folder

A room stands one floor above the highest room that it imports from. Folders within a folder are drawn as rooms within
its room; what they import counts as imported by it. Everything drawn is read from the sources: the imports (also those
inside functions, not those for type checkers), and the first line of each docstring. Needs nothing but the standard
library.
"""

from __future__ import annotations

import argparse
import ast
import functools
import graphlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "flashcore"
PICTURE = DOCS / "house.svg"

WIDTH, MARGIN, GAP, PADDING = 900, 16, 8, 12
ROOF = 104
COLUMN = 180
"""Pixels from the wall to the text of a room that has its floor to itself."""
FONT = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'Liberation Mono', monospace"
NAME, BODY, SMALL = 16, 13, 12
"""Sizes of letters in pixels: a room's name, its purpose, its figures and what it uses."""
PAPER, INK, MUTED, WALL = "#fbfaf6", "#1d2430", "#57606e", "#8b93a1"
COMPUTES, READS = ("#eef4fd", "#9db8de"), ("#f7f2e4", "#d3c08c")
"""Fill and border of a room that imports torch, and of one that does not."""


@dataclass(frozen=True)
class Room:
    """A folder of the package, or a module that lies in its root."""

    name: str
    purpose: str
    modules: int
    """Its `.py` files, but for those whose names begin with two underscores."""
    lines: int
    """All lines of its `.py` files: code, comments and blank ones."""
    torch: bool
    """Whether any of its modules imports torch, CuPy or CUDA's bindings, be it inside a function."""
    uses: frozenset[str]
    """The rooms that it imports from, and not those within them; empty for a room within another."""
    within: tuple[Room, ...] = ()
    """The folders that lie in it, by name."""

    @property
    def is_folder(self) -> bool:
        return not self.name.endswith(".py")


# ---------------------------------------------------------------------------------------------------- reading


def _imports(tree: ast.Module) -> Iterator[str]:
    """Full names of what a module imports, without what only a type checker imports."""
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def read_rooms(package: Path = PACKAGE) -> dict[str, Room]:
    """Every room of a package, by name: ``measure`` for a folder, ``ops.py`` for a module in the root."""
    folders = {p.name: sorted(p.rglob("*.py")) for p in sorted(package.iterdir()) if (p / "__init__.py").is_file()}
    modules = {p.name: [p] for p in sorted(package.glob("*.py")) if not p.name.startswith("__")}
    return {name: _read(name, paths, package, folders | modules) for name, paths in {**folders, **modules}.items()}


def _read(name: str, paths: Sequence[Path], package: Path, rooms: Mapping[str, Sequence[Path]]) -> Room:
    """The room of that name in a folder, which has these `.py` files; `rooms` are those that it may use."""
    uses, torch, purpose = set(), False, ""
    for path in paths:
        first_line, imports = _told(path)
        if path in (package / name / "__init__.py", package / name):
            purpose = first_line
        for imported in imports:
            head, _, rest = imported.partition(".")
            torch |= head in ("torch", "cupy", "cuda")
            place = rest.partition(".")[0]
            uses |= {room for room in (place, f"{place}.py") if head == package.name and room in rooms}
    inner = sorted(path.parent for path in paths if path.parent.parent == package / name and path.name == "__init__.py")
    return Room(
        name,
        purpose.replace("`", ""),
        modules=len([p for p in paths if not p.name.startswith("__")]),
        lines=sum(_lines(p) for p in paths),
        torch=torch,
        uses=frozenset(uses - {name}),
        within=tuple(_read(p.name, sorted(p.rglob("*.py")), package / name, {}) for p in inner),
    )


@functools.cache
def _told(path: Path) -> tuple[str, tuple[str, ...]]:
    """The first line of a file's docstring, and what it imports; asked for the room it lies in and the one around."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0], tuple(_imports(tree))


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def floors(rooms: Mapping[str, Room]) -> list[list[Room]]:
    """The rooms by floor, ground floor first: each above all that it uses, and as low as that allows.

    Modules of the root that use nothing but each other are the words of the house and share the ground floor, in the
    order in which they build on each other. On other floors the order is that of the alphabet.

    Raises
    ------
    ValueError
        Rooms import each other in a circle, so that no floor can hold them; the sentence names them.
    """
    try:
        graph = {name: sorted(rooms[name].uses) for name in sorted(rooms)}
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise ValueError(f"These rooms import each other in a circle: {' → '.join(error.args[1])}.") from error
    level: dict[str, int] = {}
    for name in order:
        below = [level[used] for used in rooms[name].uses]
        word = not rooms[name].is_folder and not any(below)
        level[name] = 0 if word else 1 + max(below, default=0)
    storeys: list[list[Room]] = [[] for _ in range(1 + max(level.values()))]
    for name in order:
        storeys[level[name]].append(rooms[name])
    return [storeys[0], *(sorted(storey, key=lambda room: room.name) for storey in storeys[1:])]


# ---------------------------------------------------------------------------------------------------- drawing


def _width(text: str, size: float) -> float:
    """About how wide a text is, in pixels, in a font on the wide side (DejaVu Sans), so that it fits in others too."""
    narrow, wide = "iljtfrI.,:;'()/·| ", "mwMW"
    units = sum(0.35 if c in narrow else 0.88 if c in wide else 0.69 if c.isupper() else 0.6 for c in text)
    return units * size


def _wrap(words: Sequence[tuple[str, str]], room: float, size: float) -> list[str]:
    """SVG of lines that are at most so many pixels wide, from (plain text, SVG) of each word."""
    lines: list[list[tuple[str, str]]] = [[]] if words else []
    for word in words:
        if lines[-1] and _width(" ".join(plain for plain, _ in [*lines[-1], word]), size) > room:
            lines.append([])
        lines[-1].append(word)
    return [" ".join(svg for _, svg in line) for line in lines]


def rounded(lines: int) -> str:
    """A number of lines, to the hundred: the picture shall not change with every line that is written."""
    return f"{round(lines, -2) if lines >= 100 else max(10, round(lines, -1)):,} lines"


def _figures(room: Room) -> str:
    counted = f"{room.modules} modules · " if room.is_folder else ""
    return f"{counted}{rounded(room.lines)}"


def _text(x: float, y: float, size: float, content: str, *, fill: str = INK, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}"{more}>{content}</text>'


def _rect(x: float, y: float, width: float, height: float, fill: str, border: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="{border}"/>'


def _uses(room: Room, order: Sequence[str], below: set[str]) -> list[tuple[str, str]]:
    """What a room uses, the nearest floor first, as (plain text, SVG) a word; what lies one floor down is bold."""
    used = [name for name in order if name in room.uses]
    words = [("uses", "uses")] if used else []
    for name in used:
        short, comma = escape(name.removesuffix(".py")), "," if name != used[-1] else ""
        bold = f'<tspan fill="{INK}" font-weight="600">{short}</tspan>' if name in below else short
        words.append((short + comma, bold + comma))
    return words


def _draw_room(
    room: Room, x: float, y: float, width: float, order: Sequence[str], below: set[str]
) -> tuple[list[str], float]:
    """The texts of a room and how high it has to be. `order` is all rooms from the top; `below` is the next floor."""
    left, edge = x + PADDING, x + width - PADDING
    name, figures = (f"{room.name}/" if room.is_folder else room.name), _figures(room)
    top = y + PADDING + NAME - 3
    parts = [_text(left, top, NAME, escape(name), more=f' font-weight="700" font-family="{MONO}"')]
    if alone := width > WIDTH * 0.7:  # a floor to itself: the name in a column of its own
        parts.append(_text(left, top + SMALL + 6, SMALL, figures, fill=MUTED))
        left, bottom = x + COLUMN, top + SMALL + 6
        top -= BODY + 4
    elif width > WIDTH * 0.25:
        parts.append(_text(edge, top, SMALL, figures, fill=MUTED, more=' text-anchor="end"'))
        top += 5
    else:
        top += SMALL + 5
        parts.append(_text(left, top, SMALL, figures, fill=MUTED))
        top += 5
    for line in _wrap([(word, escape(word)) for word in room.purpose.split()], edge - left, BODY):
        top += BODY + 4
        parts.append(_text(left, top, BODY, line))
    top += 2
    for line in _wrap(_uses(room, order, below), edge - left, SMALL):
        top += SMALL + 4
        parts.append(_text(left, top, SMALL, line, fill=MUTED))
    top += GAP if room.within else 0
    for inner in room.within:
        drawn, tall = _draw_inner(inner, left, top, edge - left)
        parts += drawn
        top += tall + GAP / 2
    return parts, (max(top, bottom) if alone else top) + PADDING - y


def _draw_inner(room: Room, x: float, y: float, width: float) -> tuple[list[str], float]:
    """A room within another: its name and its purpose, one after the other, and how high it is."""
    name = f"{room.name}/"
    bold = f'<tspan font-weight="700" font-family="{MONO}">{escape(name)}</tspan>'
    words = [("n" * (len(name) + 1), bold), *((word, escape(word)) for word in room.purpose.split())]
    lines = _wrap(words, width - PADDING, SMALL)
    fill, border = COMPUTES if room.torch else READS
    tall = len(lines) * (SMALL + 4) + GAP - 2
    parts = [_rect(x, y, width, tall, fill, border)]
    for number, line in enumerate(lines, start=1):
        parts.append(_text(x + PADDING / 2, y + number * (SMALL + 4), SMALL, line))
    return parts, tall


def draw(rooms: Mapping[str, Room]) -> str:
    """The whole picture as SVG."""
    storeys = floors(rooms)
    order = [room.name for storey in reversed(storeys) for room in storey]
    left, right = MARGIN + GAP, WIDTH - MARGIN - GAP
    body: list[str] = []
    y = float(MARGIN + ROOF)
    for number in range(len(storeys) - 1, -1, -1):
        storey = storeys[number]
        below = {room.name for room in storeys[number - 1]} if number else set()
        width = (right - left - GAP * (len(storey) - 1)) / len(storey)
        drawn = [_draw_room(r, left + i * (width + GAP), y, width, order, below) for i, r in enumerate(storey)]
        height = max(tall for _, tall in drawn)
        for i, (room, (parts, _)) in enumerate(zip(storey, drawn, strict=True)):
            fill, border = COMPUTES if room.torch else READS
            x = left + i * (width + GAP)
            body += [_rect(x, y, width, height, fill, border), *parts]
        y += height + GAP
    modules, lines = sum(r.modules for r in rooms.values()), sum(r.lines for r in rooms.values())
    total = f"{sum(r.is_folder for r in rooms.values())} folders · {modules} modules · {rounded(lines)}"
    ground = y
    height = ground + 80
    middle, eaves = WIDTH / 2, MARGIN + ROOF - GAP
    roof = f"M{MARGIN - 10} {eaves} L{middle} {MARGIN / 2} L{WIDTH - MARGIN + 10} {eaves} Z"
    centred = ' text-anchor="middle"'
    title = [
        f'<path d="{roof}" fill="#33415c"/>',
        _text(middle, 62, 24, "flashcore/", fill="#ffffff", more=f'{centred} font-weight="700" font-family="{MONO}"'),
        _text(middle, 84, BODY, total, fill="#ffffff", more=centred),
        f'<rect x="{MARGIN}" y="{eaves}" width="{WIDTH - 2 * MARGIN}" height="{ground - eaves:g}" fill="#ffffff"'
        f' stroke="{WALL}"/>',
    ]
    key = ground + 24
    sample = f'y="{key - 11:g}" width="14" height="14" rx="2"'
    legend = [
        f'<path d="M0 {ground:g} H{WIDTH}" stroke="#6c7a55" stroke-width="4"/>',
        f'<rect x="{left}" {sample} fill="{COMPUTES[0]}" stroke="{COMPUTES[1]}"/>',
        _text(left + 20, key, SMALL, "imports torch, CuPy or CUDA: computes", fill=MUTED),
        f'<rect x="{left + 290}" {sample} fill="{READS[0]}" stroke="{READS[1]}"/>',
        _text(left + 310, key, SMALL, "imports none of them: reads, decides, draws, runs the others", fill=MUTED),
        _text(left, key + 22, SMALL, "A room uses only rooms on lower floors, and on the ground floor only those to "
              "its left. Bold: one floor down.", fill=MUTED),
        _text(left, key + 40, SMALL, "A room within another is a folder in it. Names that end in .py are modules in "
              "the root of the package.", fill=MUTED),
    ]  # fmt: skip
    said = "Floors from the top: " + "; ".join(", ".join(r.name for r in storey) for storey in reversed(storeys)) + "."
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}"'
        f' role="img" aria-labelledby="title desc" font-family="{FONT}">',
        '<title id="title">The house: the folders of the package, each above those that it uses</title>',
        f'<desc id="desc">{escape(said)}</desc>',
        f'<rect width="{WIDTH}" height="{height:g}" fill="{PAPER}"/>',
    ]
    return "\n".join([*head, *title, *body, *legend, "</svg>"]) + "\n"


# ---------------------------------------------------------------------------------------------------- counting


def count(package: Path = PACKAGE) -> str:
    """Modules and lines of each folder from the top floor down, of the root, and of all, as a table of text."""
    rooms = read_rooms(package)
    rows = [(f"{r.name}/", r.modules, r.lines) for storey in reversed(floors(rooms)) for r in storey if r.is_folder]
    root = sorted(package.glob("*.py"))
    rows.append(("(root)", len([p for p in root if not p.name.startswith("__")]), sum(map(_lines, root))))
    rows.append(("all", sum(r[1] for r in rows), sum(r[2] for r in rows)))
    lines = [f"{'folder':<16}{'modules':>9}{'lines':>9}"]
    return "\n".join([*lines, *(f"{name:<16}{modules:>9}{n:>9,}" for name, modules, n in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw docs/house.svg from the package's imports.")
    parser.add_argument("--count", action="store_true", help="print modules and lines of every folder; draw nothing")
    if parser.parse_args().count:
        print(count())
    else:
        PICTURE.write_text(draw(read_rooms()), encoding="utf-8")
        print(f"Drew {PICTURE}")


if __name__ == "__main__":
    main()
