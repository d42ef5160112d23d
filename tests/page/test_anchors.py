"""Rows that can be linked to, and links that lead to them."""

from __future__ import annotations

import re

from support import synthetic_records as synthetic
from support.decisions import decide

from flashcore import page
from flashcore.decision import verdict
from flashcore.page.anchors import anchored, row_id, slug
from flashcore.page.drawing import html_tables, plots


def ids(html: str) -> list[str]:
    return re.findall(r'<tr id="([^"]*)"', html)


def table(caption: str, *names: str) -> str:
    return html_tables.table_html([{"Name": name, "Value": 1} for name in names], caption)


def test_a_slug_is_letters_digits_and_single_dashes():
    assert slug("B=16, H=16, <b>S=2048</b>") == "b-16-h-16-s-2048" and slug(" µs &amp; more ") == "s-more"
    assert len(slug("x" * 200)) == 48 and row_id("A table", "Row 1") == "a-table--row-1"


def test_every_row_gets_an_id_of_its_own():
    html = anchored(table("Same", "a", "a", "b") + table("Same", "a") + table("Other", "a"))
    assert ids(html) == ["same--a", "same--a-2", "same--b", "same--a-3", "other--a"]
    assert anchored(html) == html, "rows that have one keep it"
    assert anchored("<p>no table</p>") == "<p>no table</p>"


def test_a_link_leads_to_its_row_and_to_the_section_where_there_is_none():
    link = '<a href="#speed" data-row="same--a"{}>x</a>'
    rows = table("Same", "a") + table("Same", "a")
    assert '<a href="#same--a">x' in anchored(link.format("") + rows)
    assert '<a href="#same--a-2">x' in anchored(link.format(" data-last") + rows)
    assert '<a href="#speed">x' in anchored(link.format(""))
    turned = '<a class="k" data-last data-row="same--a" href="#speed">x</a>'
    assert '<a href="#same--a-2">x' in anchored(turned + rows), "whatever the order of its attributes"


def test_of_rows_that_begin_alike_a_link_leads_to_the_one_of_its_backend_in_the_last_table():
    def latencies(*backends: str) -> str:
        return html_tables.table_html(
            [{"Problem": "p", "Backend": backend, "µs": "9 fast"} for backend in backends], "T"
        )

    page_ = latencies("fast", "mine") + latencies("peer (9.19)", "mine", "slow")
    link = '<a href="#speed" data-row="t--p"{}>x</a>'
    for given, place in {
        "": "t--p", " data-last": "t--p-3", ' data-cell="mine"': "t--p-2", ' data-cell="mine" data-last': "t--p-4",
        ' data-cell="peer"': "t--p-3", ' data-cell="gone" data-last': "t--p-3",
    }.items():  # fmt: skip
        assert f'<a href="#{place}">x' in anchored(link.format(given) + page_), given


def test_a_table_of_an_executed_notebook_is_led_to_only_where_nothing_else_holds_the_row():
    link = '<a href="#speed" data-last data-row="same--{}">x</a>'
    shown = link + table("Same", "a") + '<section id="evidence">' + table("Same", "a", "b") + "</section>"
    assert '<a href="#same--a">x' in anchored(shown.format("a"))
    assert '<a href="#same--b">x' in anchored(shown.format("b"))


def test_the_evidence_of_each_timed_gate_lands_on_its_row():
    trials = synthetic.gpu_trials(synthetic.FAST)
    evidence = verdict.Evidence(tuple(trials), synthetic.environment(), synthetic.HASHES)
    shown = page.gates_html(decide(trials)) + html_tables.times_table(trials) + page.correctness_html(evidence)
    html = anchored(shown + html_tables.latency_table(plots.small_trials(trials)))
    targets = re.findall(r'<a href="#([^"]*)">live', html)
    assert set(targets) & set(ids(html)) == {t for t in targets if "--" in t}
    assert [t.split("--")[0] for t in targets].count(slug(html_tables.AGAINST_PEERS)) == 3
    assert row_id(html_tables.SMALL, "B=1, H=8, S=512, D=64") in targets
    assert row_id(html_tables.AGREEMENT, "wmma") in targets
    assert "correctness" in targets, "a gate on all of ours is of no one row"
