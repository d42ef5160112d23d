"""Give every row of a page's tables an id, so that it can be linked to, and let links to evidence land on their row."""

from __future__ import annotations

import html
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import count

TABLE = re.compile(r"<table\b[^>]*><caption>(?P<caption>.*?)</caption>.*?</table>", re.DOTALL)
ROW = re.compile(r'<tr(?: role="row")?><th\b[^>]*\bscope="row"[^>]*>(?P<head>.*?)</th>', re.DOTALL)
CELL = re.compile(r"<td\b[^>]*>(.*?)</td>", re.DOTALL)
LINK = re.compile(r'<a\b(?=[^>]* data-row="(?P<row>[^"]*)")(?=[^>]* href="#(?P<section>[^"]*)")(?P<attributes>[^>]*)>')
"""A link that means a row, in whatever order its attributes stand: what writes the page sorts them."""
CELL_NAMED = re.compile(r' data-cell="([^"]*)"')
NOTEBOOKS = '<section id="evidence"'
"""From here on a page shows executed notebooks, which may hold the same tables once more."""
MOST_LETTERS = 48
"""Of a caption or a row's heading in an id."""


def slug(text: str) -> str:
    """Text as part of an id: its letters and digits in lower case, with single dashes between them."""
    plain = html.unescape(re.sub(r"<[^>]*>", " ", text)).lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:MOST_LETTERS].strip("-")


def row_id(caption: str, heading: str) -> str:
    """The id of the first row with this heading in the first table with this caption."""
    return f"{slug(caption)}--{slug(heading)}"


@dataclass(frozen=True)
class _Row:
    """A row that can be linked to: its id, the number of its table on the page, and what its other cells say."""

    id: str
    table: int
    cells: tuple[str, ...]
    notebook: bool


def anchored(page: str) -> str:
    """A page whose rows have ids, each once, and whose links to rows lead there.

    A link says which row it means in ``data-row``. Of several it means the first one; with ``data-cell`` one of which a
    cell begins with that word, where there is such a row; with ``data-last`` one of the last table that has any, as
    where a table of this machine stands before the same one of a recorded run. Executed notebooks hold such tables
    again, and are led to only where nothing else holds the row. Where there is no such row a link keeps the section
    that it leads to. Rows that have an id keep it.
    """
    rows: dict[str, list[_Row]] = defaultdict(list)
    notebooks = page.find(NOTEBOOKS) if NOTEBOOKS in page else len(page)
    tables = count()

    def with_ids(table: re.Match[str]) -> str:
        caption, number = table["caption"], next(tables)

        def with_id(row: re.Match[str]) -> str:
            base = row_id(caption, row["head"])
            place = len(rows[base]) + 1
            found = base if place == 1 else f"{base}-{place}"
            cells = tuple(
                _words(cell) for cell in CELL.findall(row.string[row.end() : row.string.find("</tr>", row.end())])
            )
            rows[base].append(_Row(found, number, cells, table.start() > notebooks))
            return row[0].replace("<tr", f'<tr id="{found}"', 1)

        return ROW.sub(with_id, table[0])

    page = TABLE.sub(with_ids, page)

    def resolved(link: re.Match[str]) -> str:
        there = rows.get(link["row"], [])
        if not there:
            return f'<a href="#{link["section"]}">'
        there = [row for row in there if not row.notebook] or there
        if " data-last" in link["attributes"]:
            there = [row for row in there if row.table == there[-1].table]
        if named := CELL_NAMED.search(link["attributes"]):
            there = [row for row in there if any(cell.split(" ")[0] == named[1] for cell in row.cells)] or there
        return f'<a href="#{there[0].id}">'

    return LINK.sub(resolved, page)


def _words(cell: str) -> str:
    """What a cell says, without markup."""
    return html.unescape(re.sub(r"<[^>]*>", "", cell)).strip()
