"""The headline figures beside those of the run before."""

from __future__ import annotations

import pytest
from support import synthetic_records as synthetic

from flashcore.decision.gates import load_gates
from flashcore.page.history import views
from flashcore.page.history.runs import Snapshot
from flashcore.page.history.since import since

GATES = list(load_gates())


@pytest.mark.slow
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
    html = views.since_body(found)
    assert "Speed at the workload that decides" in html and "Nothing: no timing" in html


def run(name="now", speed=synthetic.SPEED, *, trials=None, **environment) -> Snapshot:
    return Snapshot(name, tuple(synthetic.gpu_trials(speed) if trials is None else trials),
                    synthetic.environment(**environment))  # fmt: skip


def test_a_figure_that_only_one_run_has_is_left_out():
    untimed = [t for t in synthetic.gpu_trials() if t.kind != "attention_timing"]
    for before, now in ((run(trials=untimed), run()), (run(), run(trials=untimed))):
        assert set(since(now, before, gates=GATES).deltas) == {"correct_percent"}
    assert since(run(), run(trials=[]), gates=GATES).deltas == {}


@pytest.mark.slow
def test_without_gates_there_is_no_headline_figure_and_still_a_comparison():
    found = since(run(), run("before"), gates=[])
    assert found.deltas == {} and found.before.name == "before" and found.comparison.rows


def test_of_each_metric_the_first_gate_makes_the_figure():
    speeds = [g for g in GATES if g.metric == "tflops"]
    other = speeds[0].model_copy(update={"problem": "latency", "unit": "TF"})
    found = since(run(), run(), gates=[other, *speeds]).deltas["tflops"]
    assert found.unit == "TF" and found.now < 131


def test_another_best_backend_then_is_named():
    then = {**synthetic.SPEED, "scalar": 200.0}
    found = since(run(), run("before", then), gates=GATES).deltas["tflops"]
    assert found.before == pytest.approx(200, rel=0.02) and found.now == pytest.approx(131, rel=0.02)
    assert "since 2001-02-03 (then scalar): slower" in found.sentence


def test_a_latency_is_better_when_it_falls_and_worse_when_it_rises():
    found = since(run(), run("before", synthetic.FAST), gates=GATES).deltas["latency_us"]
    assert (found.before, found.now) == (pytest.approx(4.4, rel=0.02), pytest.approx(14.2, rel=0.02))
    assert found.percent > 200 and found.word == "slower" and found.sentence.startswith("+")


@pytest.mark.parametrize(
    ("then", "now", "word", "said"),
    [
        (["ok"], ["ok"], "same", "1 of 1 right on 2001-02-03: same"),
        (["ok", "failed"], ["ok", "ok"], "better", "1 of 2 right on 2001-02-03: better"),
        (["ok", "ok"], ["ok", "failed"], "worse", "2 of 2 right on 2001-02-03: worse"),
        (["ok"], ["ok"] * 3, "other", "1 of 1 right on 2001-02-03: 2 more checks now"),
        (["ok"] * 3, ["ok"], "other", "3 of 3 right on 2001-02-03: 2 fewer checks now"),
    ],
)
def test_checks_are_counted_and_not_put_in_percent(then, now, word, said):
    def checks(statuses):
        return run(trials=[synthetic.correctness("wmma", p, status=s)
                           for p, s in zip(synthetic.problems(), statuses, strict=False)])  # fmt: skip

    (found,) = since(checks(now), checks(then), gates=GATES).deltas.values()
    assert (found.word, found.sentence, found.percent) == (word, said, None)


def test_what_changed_is_plain_data():
    found = since(run(), run("before"), gates=GATES).as_dict()
    assert found["comparison"]["before"]["name"] == "before"
    assert found["deltas"]["tflops"]["word"] == "same" and found["deltas"]["tflops"]["unit"] == "TFLOPS"
