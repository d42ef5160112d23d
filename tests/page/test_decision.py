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


def test_go_says_what_to_ship_and_what_that_means(tmp_path):
    trials = [t for t in synthetic.gpu_trials(synthetic.FAST) if t.kind != "paging"] + paging.everything()
    run = synthetic.write_run(tmp_path / "run", trials, synthetic.environment())
    decision = verdict.judge(run)
    html = page.blockers_html(decision)
    assert decision.verdict == "GO"
    assert "Nothing blocks" in html and "Ship option" in html
    assert decision.flip not in html, "the banner says it"


def test_every_option_stands_with_its_result_and_the_details_are_folded():
    decision = decide(synthetic.gpu_trials(synthetic.FAST))
    html = page.options_html(decision)
    table, folded = html.split("<details", 1)
    rows = Cells(table).rows
    assert [r[0][0] for r in rows[1:]] == [o.id for o in decision.options]
    assert rows[1][1] == "SHIP, recommended3 of 3 hold" and "Effort" not in table
    assert "Effort and risk, as the status report of October 2025 judged them" in folded
    assert "Every condition of every option" in folded and folded.count("<table") == 2
    assert 'class="pass"' in table and 'class="fail"' not in table


def test_an_option_that_fails_says_how_far_it_is():
    html = page.options_html(decide(TRIALS)).split("<details", 1)[0]
    b = next(r for r in Cells(html).rows if r[0].startswith("B"))
    assert b[1].startswith("DO NOT SHIP") and b[2].startswith("Farthest from holding: ") and 'class="fail"' in html


def test_a_gate_links_to_the_section_that_shows_its_records():
    html = page.gates_html(decide(TRIALS))
    unseen = '<span class="fc-unseen">, shown under Correctness</span></a>'
    assert re.search(rf'<a href="#correctness" data-row="[a-z0-9-]+">live{unseen}', html)
    assert re.search(r'<a href="#speed" data-row="[a-z0-9-]+">live', html)
    nothing = page.gates_html(decide([]))
    assert "<a " not in nothing and {r[4] for r in Cells(nothing).rows[1:]} == {"none"}


def test_recorded_evidence_carries_its_day():
    other = verdict.Recorded(tuple(TRIALS), synthetic.environment(), "synthetic")
    decision = decide(synthetic.cpu_trials(), environment=synthetic.environment(None), recorded=other)
    rows = Cells(page.gates_html(decision)).rows
    assert "recorded 2001-02-03, shown under Speed" in {r[5] for r in rows[1:]}


def test_margins_have_a_sign_and_a_share_has_no_second_one():
    rows = {r[0].split("Required")[0].split("An aim")[0]: r for r in Cells(page.gates_html(decide(TRIALS))).rows[1:]}
    missed = next(r for name, r in rows.items() if "320" in r[3])
    assert re.fullmatch(r"−\d+ TFLOPS \(−59\.1 %\)", missed[4])
    assert re.fullmatch(r"131 TFLOPS [\d.]+ to [\d.]+, n 30", missed[2])
    whole = next(r for r in rows.values() if r[3].startswith("at least 100 %"))
    assert whole[4] == "none needed" and re.fullmatch(r"100 % \d+ checks?", whole[2])
    nothing = Cells(page.gates_html(decide([]))).rows[1]
    assert (nothing[2], len(nothing)) == ("none", 6), "what would be empty is no column"


def test_where_a_threshold_comes_from_is_said_beside_it():
    rows = {r[0]: r for r in Cells(page.gates_html(decide(TRIALS))).rows[1:]}
    told = next(r for name, r in rows.items() if name.startswith("320 TFLOPS"))
    assert "wmma at B=16, H=16, S=2048, D=64." in told[6]
    assert told[6].endswith("320 TFLOPS is the target of the status report of October 2025.")


def test_one_reason_for_several_gates_is_said_once():
    html = page.blockers_html(decide([]))
    blocked, commands = html.split("What to do next")
    assert len(re.findall("<li>", blocked)) < len(decide([]).blocking) and "are not settled" in blocked
    assert "measures all of them." in commands or commands.count("<code>") > 1
