"""What changed since the last run, as the inside of a section."""

from __future__ import annotations

from support.synthetic_history import snapshot

from flashcore import page
from flashcore.decision.gates import load_gates
from flashcore.page.history import views
from flashcore.page.history.since import since


def test_without_a_run_before_there_is_nothing_so_that_the_section_is_left_out():
    assert page.since_html(None) == ""


def test_the_section_has_no_heading_of_its_own_since_the_notebook_gives_it_one():
    found = since(snapshot("now", faster=0.9), snapshot("before"), gates=load_gates())
    html = page.since_html(found)
    assert html == views.since_body(found) and "<h2" not in html and "<section" not in html
    assert "What became worse" in html and "12 slower" in html
