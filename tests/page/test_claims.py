"""The audit of claims on the page."""

from __future__ import annotations

import re

from flashcore import page
from flashcore.decision import claims, verdict
from flashcore.page.claims import audit_html


def test_the_claims_that_do_not_stand_come_first_with_our_own_figure(gpu_run):
    html = page.claims_html(verdict.gather(gpu_run))
    words = re.findall(r'<strong class="\w+">([a-z ]+)</strong>', html)
    order = ["impossible", "contradicted", "undefined", "not checkable", "confirmed"]
    assert words == sorted(words, key=order.index) and {"impossible", "confirmed"} <= set(words)
    assert "(wmma)" in html and "256 of every 4096 scores" in html and "nothing to measure" in html
    assert "Measured by FlashCore" in html and audit_html([]).startswith('<p class="fc-none">')


def test_a_claims_file_that_cannot_be_read_is_a_sentence(gpu_run, monkeypatch):
    def broken():
        raise claims.file.ClaimsError("claims.toml", 3, "it is no TOML")

    monkeypatch.setattr(claims, "load_claims", broken)
    assert "could not be audited: claims.toml, line 3" in page.claims_html(verdict.gather(gpu_run))
