"""The decision on the page: every gate in words, what blocks, and what to do next."""

from __future__ import annotations

import re

from support import synthetic_paging as paging
from support import synthetic_records as synthetic
from support.decisions import decide
from support.html_tools import Cells

from flashcore import page
from flashcore.decision import verdict

TRIALS = synthetic.gpu_trials()


def test_states_are_words_in_the_gates_table():
    html = page.gates_html(decide(TRIALS))
    states = [r[1] for r in Cells(html).rows[1:]]
    assert states == ["PASS", "PASS", "PASS", "FAIL", "FAIL", "FAIL", "FAIL", "PASS"]
    assert not re.search("[✅❌⚠✔✗🔴🟢]", html)


def test_what_blocks_names_gate_reason_and_command():
    html = page.blockers_html(decide(TRIALS))
    assert html.count("<li>") == 4 and "59.1 % below" in html and "make report" in html
    assert "Nothing blocks" in page.blockers_html(decide(synthetic.gpu_trials(synthetic.FAST)))


def test_an_incomplete_run_says_so_where_nothing_else_blocks():
    good = [t for t in synthetic.gpu_trials(synthetic.FAST) if t.kind != "notebook"]
    assert "the run does" in page.blockers_html(decide(good))


def test_go_says_what_to_ship_and_what_would_change_it(tmp_path):
    trials = [t for t in synthetic.gpu_trials(synthetic.FAST) if t.kind != "paging"] + paging.everything()
    run = synthetic.write_run(tmp_path / "run", trials, synthetic.environment())
    decision = verdict.judge(run)
    html = page.blockers_html(decision)
    assert decision.verdict == "GO"
    assert "Nothing blocks" in html and "Ship option" in html and "What would change this" in html
