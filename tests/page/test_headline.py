"""The four figures that matter: they agree with the gates, and what was not measured is said."""

from __future__ import annotations

import pytest
from support import synthetic_records as synthetic
from support.decisions import decide

from flashcore import page
from flashcore.decision import verdict
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
