"""Read HTML and SVG back in tests: figures, their text alternatives, and the cells of tables."""

from __future__ import annotations

import re
from html.parser import HTMLParser


def svgs(html: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", html, flags=re.S)


def label(text: str) -> str:
    return re.search(r'aria-label="([^"]*)"', text)[1]


class Cells(HTMLParser):
    """Rows of the tables in some HTML, as lists of their cells' text."""

    def __init__(self, html: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def row(html: str, first: str) -> dict[str, str]:
    rows = Cells(html).rows
    return dict(zip(rows[0], next(r for r in rows[1:] if r[0] == first), strict=True))
