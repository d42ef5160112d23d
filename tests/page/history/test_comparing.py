"""Two runs side by side: regressions and limits, and nothing that a run may hold breaks them."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import synthetic_records as synthetic
from support.synthetic_history import KEPT, OURS_US, REPORT, at_report, snapshot, timing

from flashcore.decision.gates import load_gates
from flashcore.page import history
from flashcore.page.history import interval, views
from flashcore.page.history.comparing import sentence
from flashcore.page.history.runs import Snapshot
from flashcore.page.history.since import since
from flashcore.page.history.trend import trend
from flashcore.records import SCHEMA_VERSION, Trial

# --- what may be compared ------------------------------------------------------------------------------------------


def test_other_gpus_compare_by_ratio_only_and_make_no_regression():
    found = history.compare_runs(snapshot("before"), snapshot(faster=0.8, gpu="SYNTHETIC H100"))
    row = at_report(found)
    assert (row.word, row.basis, row.regression, row.absolute_percent) == ("slower", "relative", False, None)
    assert not found.regressions and found.judged == 0 and "not known to be alike" in found.limits[0]
    found = history.compare_runs(snapshot("before", peers=False), snapshot(peers=False, gpu="SYNTHETIC H100"))
    assert at_report(found).word == "not compared" and "machines are not the same" in at_report(found).note


def test_a_kernel_with_other_source_is_a_comparison_of_kernels():
    now = snapshot(trials=[timing("wmma", OURS_US, 0.005, seed="now", source_hash="other")])
    now = Snapshot(now.name, now.trials, now.environment | {"kernels": {"attention_wmma": "other"}})
    found = history.compare_runs(snapshot("before"), now)
    assert at_report(found).other_source and any("two kernels" in limit for limit in found.limits)
    said = [d.sentence for d in found.differences if d.topic == "kernel"]
    assert any("attention_wmma has other source" in s for s in said) and any("is gone" in s for s in said)


def test_a_peer_that_slows_down_is_no_regression_of_ours():
    before, now = snapshot("before"), snapshot()
    slow = [t.model_copy(update={"timing": t.timing.model_copy(update={
        "samples_us": [2 * s for s in t.timing.samples_us], "latency_us": 2 * t.timing.latency_us})})
        if t.backend == "sdpa-flash" else t for t in now.trials]  # fmt: skip
    found = history.compare_runs(before, Snapshot("now", tuple(slow), now.environment))
    assert at_report(found, "sdpa-flash").role == "peer" and not found.regressions


def test_evidence_of_a_kernel_that_vanished_is_a_regression():
    hopper = [timing("hopper", OURS_US, 0.005, seed="then"), synthetic.correctness("hopper", REPORT)]
    before = snapshot("before")
    before = Snapshot("before", (*before.trials, *hopper, synthetic.correctness("wmma", REPORT)), before.environment)
    assert not history.compare_runs(before, before).regressions
    for kind, told in (("attention_timing", "timing"), ("correctness", "check")):
        left = tuple(t for t in before.trials if not (t.kind == kind and t.backend == "hopper"))
        found = history.compare_runs(before, Snapshot("now", left, before.environment))
        (sentence_,) = found.regressions
        assert found.judged and f"made none of the 1 {told} of hopper that were made then" in sentence_


@pytest.mark.parametrize(("gpu", "gone"), [(None, True), ("SYNTHETIC H100", False)])
def test_where_all_timings_of_ours_vanished_that_is_a_regression_on_one_kind_of_machine(gpu, gone):
    before = snapshot("before")
    left = tuple(t for t in before.trials if t.kind != "attention_timing" or t.backend.startswith("sdpa"))
    elsewhere = snapshot(gpu=gpu).environment if gpu else before.environment
    found = history.compare_runs(before, Snapshot("now", left, elsewhere))
    assert not found.judged and len(left) < len(before.trials)
    assert [s for s in found.regressions if "made none of the 12 timings of wmma" in s] == found.regressions
    assert bool(found.regressions) == gone


# --- junk ----------------------------------------------------------------------------------------------------------


@functools.cache
def pool():
    trials = [t for t in synthetic.gpu_trials() if t.problem is None or t.problem in KEPT[:3]]
    extreme = [5e-324, 1e308, math.inf, -1.0, 0.0, math.nan]
    for latency in extreme:
        trial = timing("wmma", OURS_US, 0.01, seed="junk")
        changed = {"latency_us": latency, "samples_us": [latency] * 9, "round": None if latency < 0 else "round-2"}
        trials.append(trial.model_copy(update={"timing": trial.timing.model_copy(update=changed)}))
        del changed["latency_us"]
        trials.append(trial.model_copy(update={"timing": trial.timing.model_copy(update=changed)}))
    trials += [
        Trial(kind="attention_timing"), Trial(kind="attention_timing", backend="wmma", problem=REPORT),
        Trial(kind="correctness"), Trial(kind="verdict", data={"gates": 3}), Trial(kind="fault", data={"fault": None}),
        synthetic.correctness("wmma", REPORT, status="failed"), synthetic.correctness("wmma", REPORT, correctness=None),
    ]  # fmt: skip
    return [*trials, *synthetic.cpu_trials()]


ENVIRONMENTS = [synthetic.environment(), synthetic.environment(gpu="SYNTHETIC H100"), synthetic.environment(gpu=None),
                {}, {"before": 3, "kernels": [], "parameters": "x", "date": "yesterday", "gpu": 7}]  # fmt: skip


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_two_sets_of_records_compare_without_an_error(data):
    runs = []
    for name in ("before", "now"):
        size = st.integers(0, len(pool()) - 1)
        chosen = data.draw(st.lists(size, max_size=40))
        runs.append(Snapshot(name, tuple(pool()[i] for i in chosen), data.draw(st.sampled_from(ENVIRONMENTS))))
    found = history.compare_runs(*runs)
    assert all(row.word in interval.WORDS for row in found.rows) and found.summary.endswith(".")
    json.dumps(found.as_dict())
    views.since_body(since(runs[1], runs[0], gates=load_gates()))
    views.trend_html(trend(runs))


# --- words and limits ------------------------------------------------------------------------------------------------


def test_a_row_in_words_carries_its_figures_or_its_reason():
    row = at_report(history.compare_runs(snapshot("before"), snapshot(faster=0.9)))
    said = sentence(replace(row, percent=-10.04, interval_percent=(-1200.0, 0.5)))
    assert said == ("wmma at B=16, H=16, S=2048, D=64: slower, −10.0 % (−1,200.0 to +0.5 %) relative to sdpa-cudnn.")
    plain = sentence(replace(row, basis="absolute", peer=None, other_source=True))
    assert plain.endswith("by its absolute latency; other kernel source.")
    nothing = replace(row, word="not compared", percent=None, note="it crashed")
    assert sentence(nothing) == "wmma at B=16, H=16, S=2048, D=64: not compared; it crashed."


def test_the_summary_counts_ours_by_word():
    found = history.compare_runs(snapshot("before"), snapshot(faster=0.9))
    assert found.summary == "Of 12 timings of ours in both runs: 12 slower." and len(found.regressions) == 12
    empty = history.compare_runs(snapshot("before"), snapshot(trials=[]))
    assert empty.summary == "The runs have no timing of ours in common." and empty.judged == 0


def limits(before, now) -> str:
    return " ".join(history.compare_runs(before, now).limits)


@pytest.mark.slow
def test_how_far_a_comparison_is_honest():
    same = snapshot("a")
    assert "Both are the same records." in limits(same, Snapshot("b", same.trials, same.environment))
    assert "'now' is the older" in limits(snapshot("a", date="2001-02-04"), snapshot("b", date="2001-02-03"))
    facts = synthetic.environment()["before"]
    cards = [snapshot(name, before={**facts, "uuid": name}) for name in ("a", "b")]
    assert "Two cards of one name (SYNTHETIC H200)" in limits(*cards) and "Two cards" not in limits(cards[0], cards[0])
    damaged = Snapshot("b", same.trials, same.environment, ("line 3 is cut off.",))
    assert "b: line 3 is cut off." in limits(same, damaged)
    assert "b is not a finished run" in limits(same, snapshot("b")), "it has no record of a notebook"
    older = [t.model_copy(update={"schema_version": 0}) for t in same.trials]
    assert f"schema versions [0] and [{SCHEMA_VERSION}]" in limits(
        Snapshot("a", tuple(older), same.environment), snapshot("b")
    )


def test_the_drift_is_told_only_for_what_was_compared_and_is_the_usual_one_elsewhere():
    found = history.compare_runs(snapshot("before"), snapshot("now"))
    assert list(found.drift_percent) == ["relative"]
    assert found.drift("relative") == found.drift_percent["relative"] / 100
    assert found.drift("absolute") == interval.USUAL_DRIFT
