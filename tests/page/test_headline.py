"""The four figures that matter: they agree with the gates, and what was not measured is said."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from support import synthetic_records as synthetic
from support.decisions import decide

from flashcore import page
from flashcore.decision import verdict
from flashcore.decision.gates import load_gates
from flashcore.history.runs import Snapshot
from flashcore.history.since import since
from flashcore.problem import PRESETS
from flashcore.records import RunFolder

TRIALS = synthetic.gpu_trials()


def headline(run: RunFolder) -> str:
    return page.headline_html(verdict.judge(run), verdict.gather(run))


def headline_of(trials) -> str:
    evidence = verdict.Evidence(tuple(trials), synthetic.environment(), synthetic.HASHES)
    return page.headline_html(decide(trials), evidence)


def test_the_headline_agrees_with_the_gates():
    html = headline_of(TRIALS)
    assert html.count("<li>") == 4 and "131 " in html and "0.281 " in html and "14.2 " in html
    assert (
        "the best peer, sdpa-cudnn" in html
        and "Target at least 320 TFLOPS" in html
        and "Aim at least 450 TFLOPS" in html
    )


def test_nothing_measured_is_said_in_words():
    html = headline_of([])
    assert html.count("not measured") == 4 and "inconclusive" in html


# --- memory saved ----------------------------------------------------------------------------------------------------


def test_the_memory_saved_comes_from_the_last_record_that_holds_it(gpu_run):
    assert "70.3" in headline(gpu_run)
    gpu_run.append(synthetic.memory_saved(64.2))
    assert "64.2" in headline(gpu_run) and "70.3" not in headline(gpu_run)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"what": "memory", "case": "shared_prefix", "saved_percent": "nan"}},
        {"data": {"what": "memory", "case": "shared_prefix", "saved_percent": float("nan")}},
        {"data": {"what": "memory", "case": "shared_prefix"}},
        {"status": "error", "reason": "it broke"},
        {"environment": "env-of-another-machine"},
        {"data": {"what": "memory", "case": "mixed_lengths", "saved_percent": 47.0}},
    ],
)
def test_a_memory_figure_that_cannot_be_used_is_not_measured(tmp_path, changes):
    trials = [t for t in synthetic.gpu_trials() if t.kind != "paging"]
    record = synthetic.memory_saved(70.3, **changes)
    run = synthetic.write_run(tmp_path / "run", [*trials, record], synthetic.environment())
    assert "not measured" in headline(run) and "70.3" not in headline(run)


def test_without_any_record_every_figure_is_not_measured(tmp_path):
    run = synthetic.write_run(tmp_path / "run", [], synthetic.environment())
    assert headline(run).count("not measured") == 4  # speed, its ratio, latency, memory
    assert ">0 <" in headline(run)


# --- the verdict, and what changed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("word", "css"), [("GO", "go"), ("NO-GO", "nogo"), ("INCONCLUSIVE", "inconclusive")])
def test_the_banner_says_the_verdict_in_words_and_escapes_its_reason(word, css):
    html = page.banner_html(verdict.Decision(word, "<b> & more.", (), "Measured <i>."))
    assert f'class="fc-banner {css}"' in html and f"</span> {word}</p>" in html
    assert "&lt;b&gt; &amp; more." in html and "Measured &lt;i&gt;." in html


def test_each_figure_says_how_it_changed_since_the_run_before():
    then = Snapshot("before", tuple(synthetic.gpu_trials()), synthetic.environment())
    fast = [*(t for t in synthetic.gpu_trials(synthetic.FAST) if t.kind != "paging"), synthetic.memory_saved(64.2)]
    now = Snapshot("now", tuple(fast), synthetic.environment())
    evidence = verdict.Evidence(now.trials, now.environment, synthetic.HASHES)
    html = page.headline_html(decide(fast), evidence, since(now, then, gates=load_gates()))
    deltas = re.findall(r'<span class="fc-delta">(.*?)</span>', html)
    assert len(deltas) == 4 and all("since 2001-02-03" in d or "right on 2001-02-03" in d for d in deltas)
    assert "faster, relative to sdpa-cudnn" in deltas[0] and deltas[3] == "−6.1 points since 2001-02-03"
    assert "fc-delta" not in headline_of(fast)


def test_where_speed_and_ratio_went_different_ways_both_are_told():
    snapshot = Snapshot("x", tuple(TRIALS), synthetic.environment())
    found = since(snapshot, snapshot, gates=load_gates())
    apart = {**found.deltas, "tflops": replace(found.deltas["tflops"], word="faster")}
    evidence = verdict.Evidence(tuple(TRIALS), synthetic.environment(), synthetic.HASHES)
    both = page.headline_html(decide(TRIALS), evidence, replace(found, deltas=apart))
    assert both.count("Against the peer ") == 1
    assert "Against the peer " not in page.headline_html(decide(TRIALS), evidence, found)


def test_the_widest_gate_on_checks_is_counted_and_not_their_sum():
    html = headline_of(TRIALS)
    checks = [t for t in TRIALS if t.kind == "correctness" and t.backend in ("cpu", "scalar", "wmma")]
    assert f">{len(checks)} <" in html and f"of {len(checks)}</span>" in html
    wrong = headline_of([*TRIALS, synthetic.correctness("wmma", PRESETS["report"], status="failed")])
    assert f">{len(checks)} <" in wrong and f"of {len(checks) + 1}</span>" in wrong
    assert 'Target all of them: <strong class="fail">missed</strong>' in wrong
