"""The verdict: gates on records, never GO without complete and fresh evidence, whatever the records hold."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import synthetic_records as synthetic
from support.decisions import GATES, GOOD, LATENCY, REPORT, decide, gate, recorded, timing_at

from flashcore.decision import verdict
from flashcore.decision.gates import Gates
from flashcore.problem import PRESETS
from flashcore.records import Trial

SLOW = synthetic.gpu_trials()

# --- the three verdicts --------------------------------------------------------------------------------------------


def test_complete_fresh_evidence_that_meets_every_gate_is_go():
    decision = decide(GOOD)
    assert decision.verdict == "GO" and decision.exit_code == 0
    assert not decision.blocking
    assert {g.state for g in decision.gates if g.required} == {"PASS"}
    assert decision.recommended.id == "B" and "Ship option B" in decision.reason


def test_a_missed_target_is_no_go_with_its_margin():
    decision = decide(synthetic.gpu_trials())
    assert decision.verdict == "NO-GO" and decision.exit_code == 3
    missed = gate(decision, "report-320")
    assert missed.state == "FAIL" and missed.evidence == "live" and missed.backend == "wmma"
    assert missed.measured == pytest.approx(131, rel=0.02)
    assert missed.margin == pytest.approx(missed.measured - 320)
    assert missed.margin_percent == pytest.approx(100 * missed.margin / 320)
    assert missed.n == 30 and missed.interval[0] <= missed.measured <= missed.interval[1]
    assert "320 TFLOPS" in decision.reason and missed.fix
    blocking = [g.id for g in decision.blocking]
    assert blocking == ["report-320", "report-ahead", "latency-5us"], "report-450 fails too, and is not required"
    assert decision.flip == "'make report # on an H100 or H200' would settle it."


def test_no_records_are_inconclusive():
    decision = decide([])
    assert decision.verdict == "INCONCLUSIVE" and decision.exit_code == 4
    assert {g.state for g in decision.gates} == {"INCONCLUSIVE"} and all(g.fix for g in decision.gates)


def test_a_gate_that_is_not_required_decides_nothing():
    wrong_peer = [*GOOD, synthetic.correctness("sdpa-math", REPORT, status="failed")]
    decision = decide(wrong_peer)
    assert gate(decision, "peers-correct").state == "FAIL" and decision.verdict == "GO" and not decision.blocking


def test_the_decision_becomes_a_record_and_comes_back(run):
    written = run.append(decide(GOOD).to_trial())
    assert run.trials(kind="verdict") == [written]
    assert written.data["verdict"] == "GO" and len(written.data["gates"]) == len(GATES)
    assert "sealed" not in written.data and decide(GOOD).to_trial(sealed=True).data["sealed"] is True


def test_a_verdict_says_in_one_sentence_what_decides():
    everything = Gates(GATES.path, GATES.gates)
    one = Gates(GATES.path, (GATES.get("report-320"),))
    stale = {**synthetic.HASHES, "attention_wmma": "f" * 16}
    slow = "wmma reaches 131 TFLOPS at B=16, H=16, S=2048, D=64, 59.1 % below the threshold of 320 TFLOPS."
    narrow = "Ahead of the best peer at the report's workload"
    for trials, gates, current, words in (
        (GOOD, everything, None, f"All 6 required gates pass; the narrowest is '{narrow}', by 10.0 %."),
        (
            GOOD,
            one,
            None,
            "The only required gate passes; the narrowest is '320 TFLOPS at the report's workload', by 59.9 %.",
        ),
        (SLOW, everything, None, f"3 of 6 required gates fail, foremost '320 TFLOPS at the report's workload': {slow}"),
        (SLOW, one, None, f"1 of 1 required gates fails, foremost '320 TFLOPS at the report's workload': {slow}"),
        (GOOD, everything, stale, "5 of 6 required gates lack usable evidence, foremost 'Our kernels are right': "),
        (
            GOOD,
            one,
            stale,
            "1 of 1 required gates lacks usable evidence, foremost '320 TFLOPS at the report's workload': ",
        ),
    ):
        reason = decide(trials, gates, current=current).reason
        assert reason == words or (words.endswith(": ") and reason.startswith(words)), reason
    free = decide(GOOD, Gates(GATES.path, (GATES.get("report-450"),)))
    assert (free.verdict, free.reason) == ("INCONCLUSIVE", "No gate is required, so nothing can be decided.")
    untimed = [t for t in SLOW if not (t.kind == "attention_timing" and t.problem == LATENCY)]
    assert decide(untimed, everything).reason == (
        f"2 of 6 required gates fail, foremost '320 TFLOPS at the report's workload': {slow} 1 more is inconclusive."
    )


# --- what must keep a verdict from GO ------------------------------------------------------------------------------


def test_a_notebook_that_failed_outweighs_a_failing_gate():
    slow = [t for t in synthetic.gpu_trials() if t.data.get("name") != "04_tflops_sweep"]
    died = synthetic.finished("04_tflops_sweep", status="error", reason="its kernel died")
    for trials, word in ((slow, "no record"), ([*slow, died], "its kernel died")):
        decision = decide(trials)
        assert decision.verdict == "INCONCLUSIVE" and "04_tflops_sweep" in decision.reason and word in decision.reason
        assert gate(decision, "report-320").state == "FAIL"  # what was measured is still shown


def test_what_is_missing_is_told_by_the_first_of_it_and_counted():
    first = "The evidence is not complete, so nothing is decided: "
    for problems, more in (
        (["One is lost."], ""),
        (["One is lost.", "Two is."], " (1 more such finding)"),
        (["One is lost.", "Two is.", "Three is."], " (2 more such findings)"),
    ):
        decision = decide(GOOD, problems=problems)
        assert (decision.verdict, decision.reason) == ("INCONCLUSIVE", f"{first}One is lost{more}.")


def test_a_run_that_does_not_say_what_it_planned_is_not_complete():
    planned = [*synthetic.NOTEBOOKS, "06_status_report.ipynb"]  # which shows the verdict, and comes after it
    assert decide(GOOD, environment=synthetic.environment(parameters={"notebooks": planned})).verdict == "GO"
    assert decide(GOOD, environment=synthetic.environment(parameters={"notebooks": ", ".join(planned)})).verdict == "GO"
    for parameters in ({}, {"notebooks": []}, {"notebooks": ""}, {"notebooks": 3}):
        decision = decide(GOOD, environment=synthetic.environment(parameters=parameters))
        assert decision.verdict == "INCONCLUSIVE" and "notebook" in decision.reason, parameters


# --- recorded evidence ---------------------------------------------------------------------------------------------


def test_without_a_gpu_the_recorded_run_fills_the_gaps_and_is_labelled():
    decision = decide(synthetic.cpu_trials(), environment=synthetic.environment(None), recorded=recorded())
    assert decision.verdict == "GO"
    assert gate(decision, "cpu-correct").evidence == "live"
    found = gate(decision, "wmma-correct")
    assert found.evidence == "recorded" and found.source == "SYNTHETIC H200, 2001-02-03"
    assert decision.evidence == "Recorded on SYNTHETIC H200, 2001-02-03; kernel sources match the current ones."


def test_an_incomplete_recorded_run_decides_nothing():
    half = [t for t in GOOD if t.kind != "notebook"]
    decision = decide(synthetic.cpu_trials(), environment=synthetic.environment(None), recorded=recorded(half))
    assert decision.verdict == "INCONCLUSIVE" and "recorded run" in decision.reason


def test_a_recorded_run_of_which_nothing_is_used_may_lack_what_it_likes():
    gates, no_gpu = Gates(GATES.path, (GATES.get("cpu-correct"),)), synthetic.environment(None)
    lent = recorded([t for t in GOOD if t.kind != "notebook"])
    assert decide(synthetic.cpu_trials(), gates, environment=no_gpu, recorded=lent).verdict == "GO"


def test_a_run_with_a_gpu_never_borrows():
    decision = decide([synthetic.finished(n) for n in synthetic.NOTEBOOKS], recorded=recorded())
    assert {g.evidence for g in decision.gates} == {"none"} and decision.verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("left", [("attention_timing", "ceiling"), ("correctness",)])
def test_a_run_whose_gpu_was_struck_out_borrows_no_go_from_the_recorded_one(tmp_path, left):
    """What was measured on it is still there: its timings, or the checks of its kernels."""
    synthetic.write_run(tmp_path / "recorded" / "h200", GOOD, synthetic.environment())
    missed = [t for t in synthetic.gpu_trials() if t.kind in (*left, "notebook")]
    run = synthetic.write_run(tmp_path / "run", missed, synthetic.environment(None))
    decision = verdict.judge(run, recorded_dir=tmp_path / "recorded")
    assert decision.verdict == "INCONCLUSIVE" and "The run's environment names no GPU, and " in decision.reason
    without = synthetic.write_run(tmp_path / "without", synthetic.cpu_trials(), synthetic.environment(None))
    assert verdict.judge(without, recorded_dir=tmp_path / "recorded").verdict == "GO", "it is there to be borrowed"


def test_a_cut_off_line_rules_out_go(tmp_path):
    run = synthetic.write_run(tmp_path / "run", GOOD, synthetic.environment())
    assert verdict.judge(run).verdict == "GO"
    with open(run.records_path, "a", encoding="utf-8") as file:
        file.write('{"schema_version": 1, "kind": "corr')
    decision = verdict.judge(run)
    assert decision.verdict == "INCONCLUSIVE" and "records.jsonl" in decision.reason


# --- properties ----------------------------------------------------------------------------------------------------

JUNK = st.one_of(st.none(), st.text(max_size=5), st.integers(), st.floats(), st.lists(st.integers(), max_size=2))
MUTATIONS = st.sampled_from(
    ["drop", "error", "failed", "nan", "no samples", "other machine", "no machine", "stale", "no hash", "no timing",
     "no correctness", "no problem", "junk data", "other round", "contradict"]
)  # fmt: skip


def mutate(trial: Trial, how: str, junk) -> Trial | None:
    changes = {
        "error": {"status": "error"}, "failed": {"status": "failed"}, "other machine": {"environment": "env-x"},
        "no machine": {"environment": None}, "stale": {"source_hash": "0" * 16}, "no hash": {"source_hash": None},
        "no timing": {"timing": None}, "no correctness": {"correctness": None}, "no problem": {"problem": None},
        "junk data": {"data": {"name": junk, "kernel": junk, "value": junk}},
    }  # fmt: skip
    if how == "drop":
        return None
    if how in changes:
        return trial.model_copy(update=changes[how])
    if trial.timing is None:
        return trial
    more = {
        "nan": {"latency_us": math.nan}, "no samples": {"samples_us": []}, "other round": {"round": None},
        "contradict": {"tflops": 1e6},
    }[how]  # fmt: skip
    return trial.model_copy(update={"timing": trial.timing.model_copy(update=more)})


def proves_go(trials: list[Trial], environment: dict, current: dict) -> bool:
    """A second, plainer statement of what GO needs; written from the rules, not from the code."""

    def fresh(t, kernel):
        return t.environment == environment.get("id") and (kernel is None or t.source_hash == current.get(kernel))

    def right(t):
        return t.status == "ok" and t.correctness and t.correctness.passed and t.correctness.num_bad == 0

    for backend, kernel in (("cpu", None), ("scalar", "attention_scalar"), ("wmma", "attention_wmma")):
        checks = [t for t in trials if t.kind == "correctness" and t.backend == backend]
        if not checks or not all(right(t) and fresh(t, kernel) for t in checks):
            return False
    for problem in (REPORT, LATENCY):
        timed = [t for t in trials if timing_at("wmma", problem)(t) and t.status == "ok" and fresh(t, "attention_wmma")]
        checked = any(t.kind == "correctness" and t.backend == "wmma" and t.problem == problem for t in trials)
        if not checked or not any(
            t.timing and math.isfinite(t.timing.latency_us) and t.timing.samples_us for t in timed
        ):
            return False
    saved = [t for t in trials if t.kind == "paging"]  # the only option that these records can carry is B
    if not saved or not all(t.status == "ok" and fresh(t, None) for t in saved):
        return False
    done = {t.data.get("name") for t in trials if t.kind == "notebook" and t.status == "ok"}
    return set(synthetic.NOTEBOOKS) <= {n for n in done if isinstance(n, str)}


SMALL = [t for t in GOOD if t.problem in (None, REPORT, LATENCY, PRESETS["tiny"])]


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(edits=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), MUTATIONS, JUNK), max_size=6))
def test_no_mutation_of_the_records_says_go_without_complete_fresh_evidence(edits):
    trials: list[Trial | None] = list(SMALL)
    for index, how, junk in edits:
        if trials[index] is not None:
            trials[index] = mutate(trials[index], how, junk)
    left = [t for t in trials if t is not None]
    decision = decide(left)
    if decision.verdict == "GO":
        assert proves_go(left, synthetic.environment(), synthetic.HASHES)


@settings(max_examples=100, deadline=None)
@given(kept=st.sets(st.integers(0, len(SMALL) - 1)))
def test_no_subset_of_the_records_says_go_without_complete_evidence(kept):
    left = [SMALL[i] for i in sorted(kept)]
    if decide(left).verdict == "GO":
        assert proves_go(left, synthetic.environment(), synthetic.HASHES)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    environment=st.dictionaries(
        st.sampled_from(["id", "gpu", "date", "kernels", "parameters", "before"]),
        st.one_of(JUNK, st.dictionaries(st.sampled_from(["notebooks", "x"]), JUNK)),
    ),
    where=st.sampled_from(["live", "recorded"]),
)
def test_no_environment_makes_it_raise_or_say_go_on_the_wrong_machine(environment, where):
    if where == "live":
        decision = decide(GOOD, environment=environment)
    else:
        other = verdict.Recorded(tuple(GOOD), environment, "synthetic")
        decision = decide(synthetic.cpu_trials(), environment=synthetic.environment(None), recorded=other)
    assert decision.verdict != "GO" and decision.reason
