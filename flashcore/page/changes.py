"""What changed since the last run, as the inside of a section of the page."""

from __future__ import annotations

from flashcore.history import views
from flashcore.history.since import Since

BEGINNING, END = '<section id="since"><h2>Since the last run</h2>', "</section>"
"""The wrapping that `history.views` gives the section when it stands alone; here the page wraps it."""


def since_html(found: Since | None) -> str:
    """Figures then and now, what became worse, and every timing; empty without a run before, and the page has no
    such section then."""
    return views.since_html(found).removeprefix(BEGINNING).removesuffix(END) if found is not None else ""
