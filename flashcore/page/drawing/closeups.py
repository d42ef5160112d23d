"""Draw what lies around a bad element in plain HTML: a grid of errors, the map of a tile, a few numbers. Never torch.

These are drawn again at each move of a slider in a notebook, so they are written as text: matplotlib would take half a
second for each. Colours are laid over whatever is behind, light or dark, and what fails is also said in a word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from flashcore.page.drawing.svg import COLOURS

_PIXELS = 9
"""Edge of one element in a map."""
_LEFT, _TOP = 44, 20
"""Room for the numbers of rows and columns."""
_TABLE = "border-collapse:collapse;font-size:12px;line-height:1.3;font-variant-numeric:tabular-nums;margin:4px 0"
_CELL = "padding:2px 6px;text-align:right;border:none;background:none"
PANELS = ("got", "expected", "difference")


def words_of(share: float) -> str:
    """A share of a bound as a cell says it: a figure up to 1, else FAIL."""
    return f"{share:.2f}" if share <= 1 else "FAIL"


def number_of(value: float, *, digits: int = 4) -> str:
    """A value as a small table shows it."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    return f"{value:.{digits}g}"


def differences(window: Mapping[str, Any]) -> list[list[float]]:
    """Got minus expected of a window; 0 where they are equal, infinities too."""
    pairs = zip(window["got"], window["expected"], strict=True)
    return [[0.0 if a == b else a - b for a, b in zip(*rows, strict=True)] for rows in pairs]


def _fill(share: float) -> str:
    """A background: stronger towards the bound, of another colour beyond it."""
    if share <= 1:
        return f"rgba({_rgb('s1')},{0.04 + 0.3 * max(share, 0.0):.2f})"
    size = 1.0 if not math.isfinite(share) else min(1.0, math.log10(share) / 6)
    return f"rgba({_rgb('target')},{0.35 + 0.45 * size:.2f})"


def _rgb(name: str) -> str:
    return ",".join(str(int(COLOURS[name][i : i + 2], 16)) for i in (1, 3, 5))


def _table(caption: str, head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table of cells that are HTML already; the first of each row names it."""
    titles = "".join(f'<th scope="col" style="{_CELL}">{escape(t)}</th>' for t in head)
    body = "".join(
        f'<tr style="background:none"><th scope="row" style="{_CELL}">{escape(name)}</th>{"".join(cells)}</tr>'
        for name, cells in rows
    )
    said = f'<caption style="text-align:left;padding:2px 6px;white-space:nowrap">{escape(caption)}</caption>'
    return f'<table style="{_TABLE}">{said}<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>'


def grid_html(
    rows: Mapping[str, Sequence[float | None]], columns: Sequence[str], caption: str, *, corner: str = ""
) -> str:
    """A grid of errors as a table: what is judged down, where across, each cell the worst share of its bound.

    Parameters
    ----------
    rows
        Shares by name, one a column; None where nothing is judged.
    columns
        Their names.
    corner
        Over the names of the rows.
    """
    filled = []
    for name, shares in rows.items():
        cells = []
        for share in shares:
            if share is None:
                cells.append(f'<td style="{_CELL}"></td>')
                continue
            strong = ";font-weight:bold" if not share <= 1 else ""
            cells.append(f'<td style="{_CELL};background:{_fill(share)}{strong}">{words_of(share)}</td>')
        filled.append((name, cells))
    return _table(caption, [corner, *columns], filled)


def tile_html(tile: Mapping[str, Any]) -> str:
    """The map of a tile: one square an element, filled where it is beyond its bound, framed where one looks.

    `tile` has `shares`, `down`, `across`, `first_down`, `first_across` and `at`.
    """
    shares = [[float(x) for x in row] for row in tile["shares"]]
    height, width = len(shares), len(shares[0])
    parts = []
    for down, row in enumerate(shares):
        for across, share in enumerate(row):
            if not share <= 0.005:
                place = f'x="{_LEFT + across * _PIXELS}" y="{_TOP + down * _PIXELS}"'
                parts.append(f'<rect {place} width="{_PIXELS}" height="{_PIXELS}" fill="{_fill(share)}"/>')
    inner = f'x="{_LEFT}" y="{_TOP}" width="{width * _PIXELS}" height="{height * _PIXELS}"'
    parts.append(f'<rect {inner} fill="none" stroke="currentColor" stroke-opacity="0.4"/>')
    down, across = tile["at"]
    where = f'x="{_LEFT + across * _PIXELS}" y="{_TOP + down * _PIXELS}"'
    parts.append(f'<rect {where} width="{_PIXELS}" height="{_PIXELS}" fill="none" stroke="currentColor" '
                 'stroke-width="2"/>')  # fmt: skip
    for n in range(0, width, 8):
        parts.append(f'<text x="{_LEFT + (n + 0.5) * _PIXELS}" y="{_TOP - 6}" text-anchor="middle">'
                     f'{tile["first_across"] + n}</text>')  # fmt: skip
    for n in range(0, height, 4):
        parts.append(f'<text x="{_LEFT - 6}" y="{_TOP + (n + 0.9) * _PIXELS}" text-anchor="end">'
                     f'{tile["first_down"] + n}</text>')  # fmt: skip
    size = _LEFT + width * _PIXELS + 6, _TOP + height * _PIXELS + 6
    said = tile_words(tile)
    svg = (f'<svg role="img" aria-label="{escape(said)}" width="{size[0]}" height="{size[1]}" '
           f'viewBox="0 0 {size[0]} {size[1]}" font-size="11" fill="currentColor" style="max-width:100%;height:auto">'
           f'{"".join(parts)}</svg>')  # fmt: skip
    return f'<div style="margin:4px 0">{svg}<div style="font-size:12px;padding:0 6px">{escape(said)}</div></div>'


def tile_words(tile: Mapping[str, Any]) -> str:
    """What the map of a tile shows, in one sentence."""
    bad = [(tile["first_down"] + i, tile["first_across"] + j) for i, row in enumerate(tile["shares"])
           for j, share in enumerate(row) if not float(share) <= 1]  # fmt: skip
    total = sum(map(len, tile["shares"]))
    of = f"{tile['stage']}, {place_words(tile)}: "
    if not bad:
        return f"{of}all {total:,} elements of this tile are within their bounds."
    spans = [f"{tile[axis]} {_span([pair[i] for pair in bad])}" for i, axis in enumerate(("down", "across"))]
    return f"{of}{len(bad):,} of {total:,} elements of this tile are beyond their bounds, in {' and '.join(spans)}."


def place_words(part: Mapping[str, Any]) -> str:
    """Batch, head and page of a tile or a window."""
    return ", ".join(f"{k} {part[k]}" for k in ("batch", "head", "page") if part.get(k) is not None)


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    if low == high:
        return str(low)
    count = len(set(numbers))
    return f"{low} to {high}" + (f" ({count} of these)" if count <= high - low else "")


def numbers_html(window: Mapping[str, Any]) -> str:
    """Got, expected and difference around an element as three small tables, the element itself underlined."""
    down, across = window["at"]
    panels = {"got": window["got"], "expected": window["expected"], "difference": differences(window)}
    largest = max((abs(x) for row in panels["difference"] for x in row if math.isfinite(x)), default=0.0) or 1.0
    tables = []
    for name in PANELS:
        rows = []
        for i, values in enumerate(panels[name]):
            cells = []
            for j, value in enumerate(map(float, values)):
                css = _CELL
                if name == "difference" and value != 0:
                    strength = abs(value) / largest if math.isfinite(value) else 1.0
                    css += f";background:rgba({_rgb('target')},{0.08 + 0.4 * strength:.2f})"
                text = number_of(value)
                at = (i, j) == (down, across)
                cells.append(f'<td style="{css}">{f"<u><b>{text}</b></u>" if at else text}</td>')
            rows.append((str(window["first_down"] + i), cells))
        columns = [str(window["first_across"] + n) for n in range(len(panels[name][0]))]
        tables.append(_table(f"{name} ({window['down']} down, {window['across']} across)", ["", *columns], rows))
    return f'<div style="display:flex;flex-wrap:wrap;column-gap:1.5em">{"".join(tables)}</div>'


def numbers_text(window: Mapping[str, Any]) -> str:
    """The same for a terminal: the element itself in square brackets."""
    down, across = window["at"]
    panels = {"got": window["got"], "expected": window["expected"], "difference": differences(window)}
    lines = []
    for name in PANELS:
        table = [[""] + [str(window["first_across"] + n) for n in range(len(panels[name][0]))]]
        for i, values in enumerate(panels[name]):
            shown = [number_of(float(v)) for v in values]
            if i == down:
                shown[across] = f"[{shown[across]}]"
            table.append([str(window["first_down"] + i), *shown])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines.append(f"{name} ({window['down']} down, {window['across']} across)")
        lines += ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in table]
    return "\n".join(lines)
