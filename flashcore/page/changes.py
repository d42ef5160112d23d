"""What changed since the last run, as the inside of a section of the page."""

from __future__ import annotations

from flashcore.history import views
from flashcore.history.since import Since


def since_html(found: Since | None) -> str:
    """Figures then and now, what became worse, and every timing; empty without a run before, and the page has no
    such section then."""
    return views.since_body(found) if found is not None else ""
