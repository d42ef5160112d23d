"""What changed since the last run, as the inside of a section of the page."""

from __future__ import annotations

from flashcore.page.history import views
from flashcore.page.history.since import Since
from flashcore.records import RunFolder


def since_html(found: Since | None, run: RunFolder | None = None) -> str:
    """Figures then and now, what became worse, every timing, and the trend over the folder's runs.

    Empty where no run stands beside `run` and none came before it; the page has no such section then.
    """
    body = views.since_body(found) if found is not None else ""
    return body + (views.trend_beside(run) if run is not None else "")
