"""The verdict: gates on records, never GO without complete and fresh evidence, whatever the records hold."""

from __future__ import annotations

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import synthetic_records as synthetic

from flashcore.decision import verdict
from flashcore.errors import GatesError
from flashcore.problem import PRESETS, parse_problem
from flashcore.records import RunFolder, Timing, Trial

GATES = verdict.load_gates()
GOOD = synthetic.gpu_trials(synthetic.FAST)
REPORT, LATENCY = PRESETS["report"], PRESETS["latency"]


def decide(trials, *, environment=None, current=None, **more) -> verdict.Decision:
    environment = synthetic.environment() if environment is None else environment
    current = synthetic.HASHES if current is None else current
    return verdict.decide(trials, GATES, environment=environment, current_hashes=current, **more)


def gate(decision: verdict.Decision, name: str) -> verdict.GateResult:
    return next(g for g in decision.gates if g.id == name)


def replaced(trials, wanted, **changes) -> list[Trial]:
    """The trials with some changed; at least one must be."""
    changed = [t.model_copy(update=changes) if wanted(t) else t for t in trials]
    assert changed != trials
    return changed


def timing_at(backend, problem):
    return lambda t: t.kind == "attention_timing" and t.backend == backend and t.problem == problem


def with_timing(trials, wanted, **changes) -> list[Trial]:
    assert any(wanted(t) for t in trials)
    return [t.model_copy(update={"timing": t.timing.model_copy(update=changes)}) if wanted(t) else t for t in trials]


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
    assert missed.n == 30 and missed.spread[0] < missed.measured < missed.spread[1]
    assert "320 TFLOPS" in decision.reason and missed.fix


def test_no_records_are_inconclusive():
    decision = decide([])
    assert decision.verdict == "INCONCLUSIVE" and decision.exit_code == 4
    assert {g.state for g in decision.gates} == {"INCONCLUSIVE"} and all(g.fix for g in decision.gates)


def test_a_gate_that_is_not_required_decides_nothing():
    wrong_peer = [*GOOD, synthetic.correctness("sdpa-math", REPORT, status="failed")]
    decision = decide(wrong_peer)
    assert gate(decision, "peers-correct").state == "FAIL" and decision.verdict == "GO"


def test_the_decision_becomes_a_record_and_comes_back(run):
    written = run.append(decide(GOOD).to_trial())
    assert run.trials(kind="verdict") == [written]
    assert written.data["verdict"] == "GO" and len(written.data["gates"]) == len(GATES)


# --- what must keep a verdict from GO ------------------------------------------------------------------------------


def test_one_wrong_check_fails_the_gate_and_says_where():
    decision = decide([*GOOD, synthetic.correctness("wmma", REPORT, status="failed")])
    found = gate(decision, "wmma-correct")
    assert decision.verdict == "NO-GO" and found.state == "FAIL"
    assert "B=16,H=16,S=2048,D=64" in found.reason and "17 of" in found.reason
    assert gate(decision, "report-320").state == "INCONCLUSIVE"  # the speed of a wrong kernel counts for nothing


@pytest.mark.parametrize("changes", [{"num_bad": 3}, {"passed": False}, {"max_abs_error": math.nan}])
def test_an_ok_that_contradicts_its_figures_is_wrong(changes):
    def wanted(t):
        return t.kind == "correctness" and t.backend == "wmma" and t.problem == REPORT

    trials = [
        t.model_copy(update={"correctness": t.correctness.model_copy(update=changes)}) if wanted(t) else t for t in GOOD
    ]
    assert gate(decide(trials), "wmma-correct").state == "FAIL"


def test_other_kernel_source_makes_the_evidence_stale():
    edited = {**synthetic.HASHES, "attention_wmma": "f" * 16}
    decision = decide(GOOD, current=edited)
    assert decision.verdict == "INCONCLUSIVE"
    assert "other kernel source" in gate(decision, "wmma-correct").reason
    assert gate(decision, "cpu-correct").state == "PASS"


def test_a_kernel_of_ours_without_a_source_hash_proves_nothing():
    trials = replaced(GOOD, lambda t: t.backend == "wmma", source_hash=None)
    assert decide(trials).verdict == "INCONCLUSIVE"


def test_records_of_another_machine_are_not_mixed_in():
    trials = replaced(GOOD, timing_at("wmma", REPORT), environment="env-other")
    decision = decide(trials)
    assert decision.verdict == "INCONCLUSIVE" and "another machine" in gate(decision, "report-320").reason


def test_a_notebook_that_failed_outweighs_a_failing_gate():
    slow = [t for t in synthetic.gpu_trials() if t.data.get("name") != "04_tflops_sweep"]
    died = synthetic.finished("04_tflops_sweep", status="error", reason="its kernel died")
    for trials, word in ((slow, "no record"), ([*slow, died], "its kernel died")):
        decision = decide(trials)
        assert decision.verdict == "INCONCLUSIVE" and "04_tflops_sweep" in decision.reason and word in decision.reason
        assert gate(decision, "report-320").state == "FAIL"  # what was measured is still shown


def test_a_run_that_does_not_say_what_it_planned_is_not_complete():
    environment = synthetic.environment(parameters={})
    assert decide(GOOD, environment=environment).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("status", ["error", "failed", "unavailable"])
def test_a_timing_that_did_not_succeed_cannot_carry_a_gate(status):
    decision = decide(replaced(GOOD, timing_at("wmma", REPORT), status=status, reason="it crashed"))
    assert gate(decision, "report-320").state == "INCONCLUSIVE" and decision.verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -4.0])
def test_a_latency_that_is_no_number_is_no_evidence(value):
    decision = decide(with_timing(GOOD, timing_at("wmma", LATENCY), latency_us=value))
    assert gate(decision, "latency-5us").state == "INCONCLUSIVE"


def test_tflops_that_contradict_the_latency_are_refused():
    decision = decide(with_timing(GOOD, timing_at("wmma", REPORT), tflops=900.0))
    assert "contradict" in gate(decision, "report-320").reason


def test_a_median_outside_its_samples_is_refused():
    decision = decide(with_timing(GOOD, timing_at("wmma", LATENCY), latency_us=1.0, tflops=None))
    assert gate(decision, "latency-5us").state == "INCONCLUSIVE"


def test_speed_without_a_correctness_check_does_not_count():
    trials = [t for t in GOOD if not (t.kind == "correctness" and t.backend == "wmma" and t.problem == REPORT)]
    assert "correctness check" in gate(decide(trials), "report-320").reason


def test_a_difference_within_the_spread_is_no_difference():
    near = Timing(
        method="graph_replay", latency_us=4.99, samples_us=[4.5, 4.8, 4.99, 5.2, 5.4] * 6, round="r", l2="warm",
        tflops=LATENCY.flops() / 4.99 / 1e6,
    )  # fmt: skip
    for median, samples in ((4.99, near.samples_us), (5.01, [s + 0.02 for s in near.samples_us])):
        changes = {"latency_us": median, "samples_us": samples, "tflops": LATENCY.flops() / median / 1e6}
        decision = decide(with_timing(GOOD, timing_at("wmma", LATENCY), **changes))
        found = gate(decision, "latency-5us")
        assert found.state == "INCONCLUSIVE" and "within the spread" in found.reason and found.measured == median


def test_too_few_samples_tell_no_spread():
    decision = decide(with_timing(GOOD, timing_at("wmma", REPORT), samples_us=[]))
    assert gate(decision, "report-320").state == "INCONCLUSIVE"


def test_a_ratio_needs_the_same_round_and_every_peer_that_was_tried():
    for changes in ({"round": "another"}, {"latency_us": math.nan}):
        decision = decide(with_timing(GOOD, timing_at("sdpa-cudnn", REPORT), **changes))
        assert gate(decision, "report-ahead").state == "INCONCLUSIVE", changes
    broken = replaced(GOOD, timing_at("sdpa-cudnn", REPORT), status="error", reason="it crashed")
    assert gate(decide(broken), "report-ahead").state == "INCONCLUSIVE"


def test_the_ratio_is_paired_sample_by_sample():
    """Both drift together by 30 %: their latencies' spreads overlap, their ratio does not move."""
    drift = [1 + 0.01 * i for i in range(31)]
    peer, ours = [600 * d for d in drift], [560 * d for d in drift]
    trials = GOOD
    for backend, samples in (("wmma", ours), ("sdpa-cudnn", peer)):
        median = sorted(samples)[15]
        changes = {"latency_us": median, "samples_us": samples, "tflops": REPORT.flops() / median / 1e6}
        trials = with_timing(trials, timing_at(backend, REPORT), **changes)
    found = gate(decide(trials), "report-ahead")
    assert found.state == "PASS" and found.measured == pytest.approx(600 / 560) and found.versus == "sdpa-cudnn"


def test_a_crashed_check_of_ours_keeps_the_best_of_ours_open():
    slow = [t for t in synthetic.gpu_trials() if not timing_at("wmma", REPORT)(t)]
    crashed = synthetic.correctness("wmma", REPORT, status="error", correctness=None, reason="out of memory")
    slow = [t for t in slow if not (t.kind == "correctness" and t.backend == "wmma" and t.problem == REPORT)]
    assert gate(decide(slow), "report-320").state == "FAIL"
    assert gate(decide([*slow, crashed]), "report-320").state == "INCONCLUSIVE"


# --- recorded evidence ---------------------------------------------------------------------------------------------


def recorded(trials=GOOD, **changes) -> verdict.Recorded:
    return verdict.Recorded(tuple(trials), synthetic.environment(**changes), "synthetic")


def test_without_a_gpu_the_recorded_run_fills_the_gaps_and_is_labelled():
    decision = decide(synthetic.cpu_trials(), environment=synthetic.environment(None), recorded=recorded())
    assert decision.verdict == "GO"
    assert gate(decision, "cpu-correct").evidence == "live"
    found = gate(decision, "wmma-correct")
    assert found.evidence == "recorded" and found.source == "SYNTHETIC H200, 2001-02-03"
    assert decision.evidence == "Recorded on SYNTHETIC H200, 2001-02-03; kernel sources match the current ones."


def test_checks_of_the_cpu_alone_do_not_stand_for_all_backends():
    """A kernel that is wrong in the recorded run is wrong on the page of a machine that cannot run it, too."""
    wrong = [
        t.model_copy(update={"status": "failed", "correctness": t.correctness.model_copy(update=WRONG)})
        if t.kind == "correctness" and t.backend == "wmma" and t.problem == REPORT else t
        for t in GOOD
    ]  # fmt: skip
    no_gpu = synthetic.environment(None)
    decision = decide(synthetic.cpu_trials(), environment=no_gpu, recorded=recorded(wrong))
    found = gate(decision, "ours-correct")
    assert decision.verdict == "NO-GO" and found.state == "FAIL" and found.evidence == "recorded"
    good = gate(decide(synthetic.cpu_trials(), environment=no_gpu, recorded=recorded()), "ours-correct")
    checks = [t for t in GOOD if t.kind == "correctness" and t.backend in ("wmma", "scalar", "cpu", "hopper")]
    assert good.state == "PASS" and good.evidence == "recorded" and good.n >= len(checks) > 0
    here = [
        t.model_copy(update={"status": "failed", "correctness": t.correctness.model_copy(update=WRONG)})
        if t.kind == "correctness" and t.backend == "cpu" else t
        for t in synthetic.cpu_trials()
    ]  # fmt: skip
    live = gate(decide(here, environment=no_gpu, recorded=recorded()), "ours-correct")
    assert live.state == "FAIL" and live.evidence == "live", "what fails here is not made good by another machine"
    nowhere = gate(decide(synthetic.cpu_trials(), environment=no_gpu), "ours-correct")
    assert nowhere.evidence == "live"


WRONG = {"passed": False, "num_bad": 256}


def test_a_recorded_run_of_older_source_is_stale_and_says_so():
    edited = {**synthetic.HASHES, "attention_wmma": "f" * 16}
    environment = synthetic.environment(None)
    decision = decide(synthetic.cpu_trials(), environment=environment, recorded=recorded(), current=edited)
    assert decision.verdict == "INCONCLUSIVE" and "kernel sources differ: attention_wmma" in decision.evidence


def test_an_incomplete_recorded_run_decides_nothing():
    half = [t for t in GOOD if t.kind != "notebook"]
    decision = decide(synthetic.cpu_trials(), environment=synthetic.environment(None), recorded=recorded(half))
    assert decision.verdict == "INCONCLUSIVE" and "recorded run" in decision.reason


def test_a_run_with_a_gpu_never_borrows():
    decision = decide([synthetic.finished(n) for n in synthetic.NOTEBOOKS], recorded=recorded())
    assert {g.evidence for g in decision.gates} == {"none"} and decision.verdict == "INCONCLUSIVE"


def test_a_cpu_timing_never_answers_for_a_gpu():
    fast = synthetic.timing("cpu", REPORT, 1.0, round_="r")
    trials = [*synthetic.cpu_trials(), fast, synthetic.correctness("cpu", REPORT)]
    assert gate(decide(trials, environment=synthetic.environment(None)), "report-320").evidence == "none"


def test_gather_reads_the_run_and_the_newest_recorded_run(tmp_path):
    run = synthetic.write_run(tmp_path / "run", synthetic.cpu_trials(), synthetic.environment(None))
    for name, date in (("h100", "2001-01-01"), ("h200", "2002-02-02")):
        environment = synthetic.environment(f"SYNTHETIC {name}", date=date)
        synthetic.write_run(tmp_path / "recorded" / name, synthetic.gpu_trials(), environment)
    evidence = verdict.gather(run, recorded_dir=tmp_path / "recorded")
    assert evidence.recorded.gpu == "SYNTHETIC h200" and len(evidence.trials) == len(synthetic.cpu_trials())
    assert evidence.gpu_trials == evidence.recorded.trials and not evidence.problems


def test_gather_without_a_recorded_run_says_there_is_none(tmp_path):
    run = synthetic.write_run(tmp_path / "run", synthetic.cpu_trials(), synthetic.environment(None))
    evidence = verdict.gather(run, recorded_dir=tmp_path / "nowhere")
    assert evidence.recorded is None and "no recorded run" in evidence.label


def test_a_cut_off_line_rules_out_go(tmp_path):
    run = synthetic.write_run(tmp_path / "run", GOOD, synthetic.environment())
    assert verdict.judge(run).verdict == "GO"
    with open(run.records_path, "a", encoding="utf-8") as file:
        file.write('{"schema_version": 1, "kind": "corr')
    decision = verdict.judge(run)
    assert decision.verdict == "INCONCLUSIVE" and "records.jsonl" in decision.reason


def test_a_recorded_run_that_cannot_be_read_is_left_out_aloud(tmp_path):
    run = synthetic.write_run(tmp_path / "run", synthetic.cpu_trials(), synthetic.environment(None))
    newer = RunFolder.create(tmp_path / "recorded" / "h300")
    newer.records_path.write_text('{"schema_version": 99, "kind": "ceiling"}\n', encoding="utf-8")
    evidence = verdict.gather(run, recorded_dir=tmp_path / "recorded")
    assert evidence.recorded is None and "h300" in evidence.problems[0]


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


# --- gates file ----------------------------------------------------------------------------------------------------

GATE = """
[[gate]]
id = "speed"
title = "Fast enough"
kind = "attention_timing"
problem = "report"
metric = "tflops"
at_least = 320
required = true
measure = "flashcore report"
"""


def load(tmp_path, text: str) -> verdict.Gates:
    path = tmp_path / "gates.toml"
    path.write_text(text, encoding="utf-8")
    return verdict.load_gates(path)


def test_a_small_gates_file_loads(tmp_path):
    (only,) = load(tmp_path, GATE)
    assert only.threshold == 320 and only.comparison == "at least"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("at_least = 320", "at_least = ", 8, "not TOML"),
        ("at_least = 320", "", 2, "exactly one of at_least and at_most"),
        ("at_least = 320", "at_least = 320\nat_most = 1", 2, "exactly one"),
        ("at_least = 320", "at_least = inf", 8, "at_least"),
        ("at_least = 320", 'at_least = "many"', 8, "at_least"),
        ("at_least = 320", "at_leest = 320", 8, "no key 'at_leest'"),
        ('"tflops"', '"gflops"', 7, "no metric 'gflops'"),
        ('"tflops"', '"correct_percent"', 2, "belongs to kind 'correctness'"),
        ('"report"', '"reprot"', 6, "no problem 'reprot'"),
        ('"report"', '"B=0,H=1,S=1,D=64"', 6, "batch"),
        ('"report"', '"any"', 2, "on one problem"),
        ('"attention_timing"', '"timing"', 5, "no kind 'timing'"),
        ('id = "speed"\n', "", 2, "'id' is missing"),
        ('"speed"', '"Speed gate"', 3, "id"),
        ("required = true", "required = false", None, "no gate is required"),
        ("[[gate]]", "[[gates]]", 2, "no 'gates' here"),
        ("at_least = 320", 'at_least = "320"', 8, "at_least"),
        ("required = true", 'required = "yes"', 9, "required"),
        ("at_least = 320", 'why = """\n[[gate]]\nid = 3\n"""\nat_leest = 320', 12, "no key 'at_leest'"),
        ("[[gate]]", 'rank_options_by = "fast"\n[[gate]]', 2, "no gate 'fast' to rank options by"),
    ],
)
def test_a_bad_gates_file_is_one_error_with_line_and_reason(tmp_path, old, new, line, words):
    assert old in GATE
    with pytest.raises(GatesError) as caught:
        load(tmp_path, GATE.replace(old, new, 1))
    assert words in caught.value.reason and caught.value.line == line
    assert "gates.toml" in str(caught.value) and "\n" not in caught.value.reason


def test_duplicate_gates_are_an_error_at_the_second(tmp_path):
    with pytest.raises(GatesError) as caught:
        load(tmp_path, GATE + GATE)
    assert caught.value.line == 13 and "two gates" in caught.value.reason


@pytest.mark.parametrize("text", ["", "gate = 3\n", "gate = []\n"])
def test_a_file_without_gates_is_an_error(tmp_path, text):
    with pytest.raises(GatesError, match="there is no gate in it"):
        load(tmp_path, text)


def test_a_gates_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(GatesError, match="cannot be read"):
        verdict.load_gates(tmp_path / "none.toml")


def test_a_gate_on_any_kind_of_record(tmp_path):
    text = GATE + (
        '[[gate]]\nid = "spills"\ntitle = "No spills"\nkind = "build"\nmetric = "data.spill_bytes"\nat_most = 0\n'
        'where = { kernel = "attention_wmma" }\nrequired = true\nmeasure = "flashcore build"\n'
    )
    gates = load(tmp_path, text)
    spilled = [t.model_copy(update={"data": {**t.data, "spill_bytes": 8}}) if t.kind == "build" else t for t in GOOD]
    for trials, state in ((GOOD, "PASS"), (spilled, "FAIL"), ([], "INCONCLUSIVE")):
        decision = verdict.decide(trials, gates, environment=synthetic.environment(), current_hashes=synthetic.HASHES)
        assert gate(decision, "spills").state == state


def test_shipped_gates_cover_the_targets():
    by_id = {g.id: g for g in GATES}
    assert by_id["report-320"].threshold == 320 and by_id["report-450"].threshold == 450
    assert by_id["latency-5us"].threshold == 5 and by_id["latency-5us"].comparison == "at most"
    assert parse_problem(by_id["report-ahead"].problem) == REPORT
