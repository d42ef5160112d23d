"""The proof on the page: checks, planted bugs and the machine, live and recorded apart."""

from __future__ import annotations

from support import synthetic_records as synthetic
from support.html_tools import row

from flashcore import page
from flashcore.decision import verdict

TRIALS = synthetic.gpu_trials()


def test_recorded_evidence_stands_beside_the_live_one_under_its_own_heading():
    other = verdict.Recorded(tuple(TRIALS), synthetic.environment(), "synthetic")
    evidence = verdict.Evidence(
        tuple(synthetic.cpu_trials()), synthetic.environment(None), synthetic.HASHES, recorded=other
    )
    for html in (page.correctness_html(evidence), page.machine_html(evidence)):
        assert html.index("Live, on this machine") < html.index("Recorded on SYNTHETIC H200, 2001-02-03")
    assert row(page.correctness_html(evidence), "wmma")["Result"].startswith("not checked: no CUDA GPU")
    assert "SYNTHETIC H200" in page.machine_html(evidence).split("Recorded on")[1]
