"""Give every row of a page's tables an id, so that it can be linked to, and let links to evidence land on their row."""

from __future__ import annotations

import html
import re
from collections import Counter

TABLE = re.compile(r"<table\b[^>]*><caption>(?P<caption>.*?)</caption>.*?</table>", re.DOTALL)
ROW = re.compile(r'<tr(?: role="row")?><th\b[^>]*\bscope="row"[^>]*>(?P<head>.*?)</th>', re.DOTALL)
LINK = re.compile(r'<a\b(?=[^>]* data-row="(?P<row>[^"]*)")(?=[^>]* href="#(?P<section>[^"]*)")(?P<attributes>[^>]*)>')
"""A link that means a row, in whatever order its attributes stand: what writes the page sorts them."""
MOST_LETTERS = 48
"""Of a caption or a row's heading in an id."""


def slug(text: str) -> str:
    """Text as part of an id: its letters and digits in lower case, with single dashes between them."""
    plain = html.unescape(re.sub(r"<[^>]*>", " ", text)).lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:MOST_LETTERS].strip("-")


def row_id(caption: str, heading: str) -> str:
    """The id of the first row with this heading in the first table with this caption."""
    return f"{slug(caption)}--{slug(heading)}"


def anchored(page: str) -> str:
    """A page whose rows have ids, each once, and whose links to rows lead there.

    A link says which row it means in ``data-row``, and with ``data-last`` that of several it means the last one, as
    where a table of this machine stands before the same one of a recorded run. Where there is no such row it keeps the
    section that it leads to. Rows that have an id keep it.
    """
    seen: Counter[str] = Counter()

    def with_ids(table: re.Match[str]) -> str:
        caption = table["caption"]

        def with_id(row: re.Match[str]) -> str:
            base = row_id(caption, row["head"])
            seen[base] += 1
            number = seen[base]
            return row[0].replace("<tr", f'<tr id="{base if number == 1 else f"{base}-{number}"}"', 1)

        return ROW.sub(with_id, table[0])

    page = TABLE.sub(with_ids, page)

    def resolved(link: re.Match[str]) -> str:
        base = link["row"]
        if not seen[base]:
            return f'<a href="#{link["section"]}">'
        last = " data-last" in link["attributes"] and seen[base] > 1
        return f'<a href="#{base}-{seen[base]}">' if last else f'<a href="#{base}">'

    return LINK.sub(resolved, page)
