"""The headline figures beside those of the run before."""

from __future__ import annotations

import pytest
from support import synthetic_records as synthetic

from flashcore.decision.gates import load_gates
from flashcore.history import views
from flashcore.history.runs import Snapshot
from flashcore.history.since import since


def test_the_headline_figures_change_in_words(tmp_path):
    before = Snapshot("before", tuple(synthetic.gpu_trials()), synthetic.environment())
    now = Snapshot("now", tuple(synthetic.gpu_trials(synthetic.FAST)), synthetic.environment())
    found = since(now, before, gates=load_gates())
    assert set(found.deltas) == {"tflops", "ratio_to_best_peer", "latency_us", "correct_percent"}
    speed, latency = found.deltas["tflops"], found.deltas["latency_us"]
    assert speed.percent == pytest.approx(100 * (512 / 131 - 1), rel=0.01) and speed.word == "faster"
    assert "relative to sdpa-cudnn" in speed.sentence and "since 2001-02-03" in speed.sentence
    assert latency.percent < 0 and latency.word == "faster"
    assert found.deltas["correct_percent"].word == "same"
    html = views.since_html(found)
    assert '<section id="since">' in html and "Best speed of ours" in html and "Nothing: no timing" in html
