"""Two runs side by side: regressions and limits, and nothing that a run may hold breaks them."""

from __future__ import annotations

import functools
import json
import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import synthetic_records as synthetic
from support.synthetic_history import KEPT, OURS_US, REPORT, at_report, snapshot, timing

from flashcore import history
from flashcore.decision.gates import load_gates
from flashcore.history import interval, views
from flashcore.history.runs import Snapshot
from flashcore.history.since import since
from flashcore.history.trend import trend
from flashcore.records import Trial

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
    views.since_html(since(runs[1], runs[0], gates=load_gates()))
    views.trend_html(trend(runs))
