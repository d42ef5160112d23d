"""The audit of claims on the page."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from support.html_tools import Cells

from flashcore import page
from flashcore.decision import claims, verdict
from flashcore.decision.claims import Finding
from flashcore.page.claims import WORDS, audit_html, own_figure


def test_the_claims_that_do_not_stand_come_first_with_our_own_figure(gpu_run):
    html = page.claims_html(verdict.gather(gpu_run))
    words = re.findall(r'<strong class="\w+">([a-z ]+)</strong>', html)
    order = ["beyond the data sheet", "contradicted", "undefined", "not checkable", "confirmed"]
    assert words == sorted(words, key=order.index) and {"beyond the data sheet", "confirmed"} <= set(words)
    assert "(wmma)" in html and "256 of every 4096 scores" in html and "nothing to measure" in html
    assert "Measured by FlashCore" in html and audit_html([]).startswith('<p class="fc-none">')


def test_a_claims_file_that_cannot_be_read_is_a_sentence(gpu_run, monkeypatch):
    def broken():
        raise claims.file.ClaimsError("claims.toml", 3, "it is no TOML")

    monkeypatch.setattr(claims, "load_claims", broken)
    assert "could not be audited: claims.toml, line 3" in page.claims_html(verdict.gather(gpu_run))


@pytest.fixture
def audits(gpu_run):
    """The audits of the shipped claims by id, beside a SYNTHETIC run."""
    evidence = verdict.gather(gpu_run)
    found = claims.audit(claims.load_claims(), evidence.trials, environment=evidence.environment,
                         current_hashes=evidence.current_hashes)  # fmt: skip
    return {one.claim.id: one for one in found}


def with_findings(one: claims.Audit, *found: Finding) -> claims.Audit:
    return replace(one, findings=found)


def test_our_own_figure_is_the_one_that_settled_the_claim_with_its_unit(audits):
    one = audits["call-270us"]
    assert own_figure(with_findings(one)) == "nothing to measure"
    missing = Finding("measurement", "missing", "Not measured.")
    assert own_figure(with_findings(one, missing)) == "not measured"
    beside = Finding("measurement", "beside", "x", against=1500.0, unit="µs", backend="wmma")
    settled = Finding("measurement", "contradicted", "x", against=2.5, unit="TFLOPS", backend="scalar")
    assert own_figure(with_findings(one, missing, beside)) == "1.50 ms (wmma)"
    assert own_figure(with_findings(one, beside, settled)) == "2.50 TFLOPS (scalar)"
    assert own_figure(with_findings(one, replace(beside, unit="%", against=70.3, backend=None))) == "70.3 %"


def test_the_lead_counts_each_verdict_worst_first(audits):
    html = audit_html([audits["sm-count"], audits["call-270us"], audits["work"]])
    assert "3 published figures: 1 beyond the data sheet, 2 confirmed." in html
    assert audit_html([audits["work"]]).startswith('<p class="fc-lead">1 published figure: 1 confirmed.</p>')
    rows = Cells(html).rows
    assert rows[1][0] == audits["call-270us"].claim.text and rows[1][2] == "beyond the data sheet"


def test_every_finding_is_folded_below_and_text_is_escaped(audits):
    one = audits["call-270us"]
    hostile = replace(one, reason="<script>", claim=one.claim.model_copy(update={"note": "<b>", "text": "<i>"}))
    html = audit_html([hostile])
    assert not re.search("<script>|<b>|<i>", html) and "Note: &lt;b&gt;" in html
    folded = html[html.index("<details") :]
    assert "impossible" not in html and all(WORDS.get(f.outcome, f.outcome) in folded for f in one.findings)
    assert "<details" not in audit_html([with_findings(one)])
