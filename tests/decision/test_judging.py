"""One gate on the records of one machine: what counts, what is in doubt, and what a margin is worth."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from support import synthetic_records as synthetic
from support.decisions import (
    GATES,
    GOOD,
    LATENCY,
    REPORT,
    WRONG,
    decide,
    gate,
    hopper,
    option,
    recorded,
    replaced,
    result,
    timing_at,
    with_timing,
    without_paging,
)

from flashcore.decision import judging, verdict
from flashcore.decision.gates import Gate
from flashcore.paths import data_dir
from flashcore.records import Trial


def test_one_wrong_check_fails_the_gate_and_says_where():
    decision = decide([*GOOD, synthetic.correctness("wmma", REPORT, status="failed")])
    found = gate(decision, "wmma-correct")
    assert decision.verdict == "NO-GO" and found.state == "FAIL"
    assert "B=16,H=16,S=2048,D=64" in found.reason and "17 of" in found.reason
    assert gate(decision, "report-320").state == "INCONCLUSIVE"  # the speed of a wrong kernel counts for nothing


@pytest.mark.parametrize(
    "changes", [{"num_bad": 3}, {"passed": False}, {"max_abs_error": math.nan}, {"max_abs_error": 9.0}]
)
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
    count = sum(t.kind == "correctness" and t.backend == "wmma" for t in GOOD)
    told = f"Wmma was measured on other kernel source than the current one ({count - 1} more like this)."
    assert gate(decision, "wmma-correct").reason == told
    assert gate(decision, "cpu-correct").state == "PASS"


def test_a_kernel_of_ours_without_a_source_hash_proves_nothing():
    trials = replaced(GOOD, lambda t: t.backend == "wmma", source_hash=None)
    assert decide(trials).verdict == "INCONCLUSIVE"


def test_records_of_another_machine_are_not_mixed_in():
    trials = replaced(GOOD, timing_at("wmma", REPORT), environment="env-other")
    decision = decide(trials)
    assert decision.verdict == "INCONCLUSIVE" and "another machine" in gate(decision, "report-320").reason


@pytest.mark.parametrize("status", ["error", "failed", "unavailable"])
def test_a_timing_that_did_not_succeed_cannot_carry_a_gate(status):
    decision = decide(replaced(GOOD, timing_at("wmma", REPORT), status=status, reason="it crashed"))
    assert gate(decision, "report-320").state == "INCONCLUSIVE" and decision.verdict == "INCONCLUSIVE"
    words = "wmma was not available" if status == "unavailable" else "the timing of wmma did not succeed"
    assert f"{words} (it crashed)" in gate(decision, "report-320").reason


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


def latency_gate(median: float, samples: list[float]):
    """The gate on the small call, whose kernel of ours took these."""
    changes = {"latency_us": median, "samples_us": samples, "tflops": LATENCY.flops() / median / 1e6}
    return gate(decide(with_timing(GOOD, timing_at("wmma", LATENCY), **changes)), "latency-5us")


def test_a_threshold_within_the_interval_of_the_median_is_neither_met_nor_missed():
    near = [4.5, 4.8, 4.99, 5.2, 5.4] * 6
    for median, samples in ((4.99, near), (5.01, [s + 0.02 for s in near])):
        found = latency_gate(median, samples)
        assert found.state == "INCONCLUSIVE" and "interval of that median" in found.reason
        assert found.measured == median and found.interval[0] <= 5 <= found.interval[1]


def test_a_few_slow_samples_do_not_turn_a_median_that_is_known_well():
    """Four of thirty lie above the threshold, so their 95th percentile does as well; the median does not."""
    samples = [4.74, 4.75, 4.76, 4.77, 4.78] * 5 + [4.76, 5.2, 5.3, 5.4, 5.5]
    found = latency_gate(4.76, samples)
    assert found.state == "PASS" and found.interval == (4.75, 4.78) and found.margin_percent == pytest.approx(4.8)
    eight, nine = sorted([4.0] * 22 + [6.0] * 8), sorted([4.0] * 21 + [6.0] * 9)
    assert latency_gate(4.0, eight).state == "PASS" and latency_gate(4.0, nine).state == "INCONCLUSIVE"


@pytest.mark.parametrize("n", [0, 1, 6])
def test_too_few_samples_settle_nothing(n):
    median = next(t.timing.latency_us for t in GOOD if timing_at("wmma", REPORT)(t))
    decision = decide(with_timing(GOOD, timing_at("wmma", REPORT), samples_us=[median] * n))
    found = gate(decision, "report-320")
    assert found.state == "INCONCLUSIVE" and f"{n} sample" in found.reason and "7 can" in found.reason
    enough = decide(with_timing(GOOD, timing_at("wmma", REPORT), samples_us=[median] * 7))
    assert gate(enough, "report-320").state == "PASS"


def test_a_gate_may_ask_for_more_samples_than_an_interval_takes():
    for least, state in ((30, "PASS"), (31, "INCONCLUSIVE")):
        wanted = GATES.get("report-320").model_copy(update={"min_count": least})
        found = judging.judge_gate(wanted, live(*GOOD), None, True)
        assert found.state == state and ("30 samples cannot tell" in found.reason) == (least > 30)
        assert found.n == 30 and ("31 can" in found.reason) == (least > 30)


def test_a_variant_for_checks_is_never_the_best_of_ours():
    """It may be a hair faster than the kernel that ships; the gate names the kernel."""
    kernel = hopper(600.0)
    variant = [t.model_copy(update={"backend": "hopper-unsplit"}) for t in hopper(640.0)]
    found = gate(decide([*GOOD, *kernel, *variant]), "report-320")
    assert found.backend == "hopper" and found.measured == pytest.approx(600, rel=0.02)
    alone = gate(decide([*GOOD, *variant]), "report-320")
    assert alone.backend == "wmma"
    wanted = GATES.get("report-320")
    named = judging.judge_gate(wanted.model_copy(update={"backend": "hopper-unsplit"}), live(*variant), None, True)
    assert (named.state, named.backend) == ("PASS", "hopper-unsplit"), "whoever asks for it by name gets it"
    nothing = judging.judge_gate(wanted, live(*variant), None, True)
    assert (nothing.state, nothing.reason, nothing.n) == ("INCONCLUSIVE", "Nothing was measured.", 0)


def test_of_several_the_worst_counts_where_a_gate_asks_for_it():
    wanted = GATES.get("report-320")
    for reduce, backend in ((None, "wmma"), ("best", "wmma"), ("worst", "scalar")):
        found = judging.judge_gate(wanted.model_copy(update={"reduce": reduce}), live(*GOOD), None, True)
        assert (found.backend, found.state) == (backend, "PASS" if backend == "wmma" else "FAIL")


def test_a_ratio_needs_the_same_round_and_every_peer_that_was_tried():
    for changes in ({"round": "another"}, {"latency_us": math.nan}):
        decision = decide(with_timing(GOOD, timing_at("sdpa-cudnn", REPORT), **changes))
        assert gate(decision, "report-ahead").state == "INCONCLUSIVE", changes
    broken = replaced(GOOD, timing_at("sdpa-cudnn", REPORT), status="error", reason="it crashed")
    assert gate(decide(broken), "report-ahead").state == "INCONCLUSIVE"


def test_a_ratio_without_any_peer_settles_nothing_and_a_peer_that_refuses_the_problem_is_none():
    alone = [t for t in GOOD if t.backend in ("wmma", "scalar")]
    found = gate(decide(alone), "report-ahead")
    assert found.state == "INCONCLUSIVE" and found.reason.startswith("No peer was timed in the same round as ")
    refused = synthetic.timing("fa3", REPORT, 1.0, round_="r", status="unsupported", reason="it refuses", timing=None)
    environment = synthetic.environment()
    environment = {**environment, "parameters": {**environment["parameters"], "peers": ["sdpa-cudnn", "fa3"]}}
    assert gate(decide([*GOOD, refused], environment=environment), "report-ahead").state == "PASS"
    assert gate(decide(GOOD, environment=environment), "report-ahead").reason.startswith(
        "The run has no timing of peer fa3 here, which it was to measure"
    )


def test_tflops_of_nobody_knows_how_many_operations_are_no_figure():
    padded = REPORT.with_(lengths="left")
    timed = synthetic.timing("wmma", padded, 500.0, round_="r")
    timed = timed.model_copy(update={"timing": timed.timing.model_copy(update={"tflops": None})})
    wanted = GATES.get("report-320").model_copy(update={"problem": padded.label()})
    found = judging.judge_gate(wanted, live(timed, synthetic.correctness("wmma", padded)), None, True)
    assert (found.state, found.reason) == ("INCONCLUSIVE", "The timing of wmma holds no such figure.")


AHEAD = {**synthetic.FAST, "sdpa-cudnn": 620.0}
"""One peer is faster than our kernel, and nothing else speaks against a GO."""
HIDDEN = {
    "its latency tripled": lambda t: t.model_copy(
        update={"timing": t.timing.model_copy(update={"latency_us": 3 * t.timing.latency_us})}
    ),
    "its line deleted": lambda t: None,
    "called unavailable": lambda t: t.model_copy(update={"status": "unavailable"}),
    "called unsupported": lambda t: t.model_copy(update={"status": "unsupported"}),
}


@pytest.mark.parametrize("how", HIDDEN)
@pytest.mark.parametrize("planned", [True, False])
def test_a_faster_peer_that_is_edited_out_of_the_way_makes_no_go(how, planned):
    trials, environment = synthetic.gpu_trials(AHEAD), synthetic.environment()
    if planned:
        peers = {"peers": ["sdpa-math", "sdpa-flash", "sdpa-cudnn"]}
        environment = {**environment, "parameters": {**environment["parameters"], **peers}}
    assert decide(trials, environment=environment).verdict == "NO-GO"
    fastest = timing_at("sdpa-cudnn", REPORT)
    edited = [HIDDEN[how](t) if fastest(t) else t for t in trials]
    decision = decide([t for t in edited if t is not None], environment=environment)
    assert decision.verdict == "INCONCLUSIVE" and gate(decision, "report-ahead").state == "INCONCLUSIVE"


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
    refused = synthetic.timing("hopper", REPORT, 1.0, round_="r", status="unsupported", timing=None)
    assert gate(decide([*slow, refused]), "report-320").state == "FAIL", (
        "what does not take the problem is not the best"
    )
    told = gate(decide([*slow, crashed]), "wmma-correct")
    assert (told.state, told.reason) == ("INCONCLUSIVE", "A check of wmma did not finish (out of memory).")
    assert gate(decide([*slow, crashed]), "report-320").state == "INCONCLUSIVE"


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
    timed_alone = [t for t in GOOD if t.kind != "correctness"]
    kept = gate(decide(synthetic.cpu_trials(), environment=no_gpu, recorded=recorded(timed_alone)), "ours-correct")
    assert (kept.state, kept.evidence) == ("PASS", "live"), "a recorded run without checks takes nothing away"
    assert good.source == "SYNTHETIC H200, 2001-02-03" and kept.source is None
    undated = gate(decide(synthetic.cpu_trials(), environment=no_gpu, recorded=recorded(date=None)), "ours-correct")
    assert undated.source == "SYNTHETIC H200, date not known"


def test_a_cpu_timing_never_answers_for_a_gpu():
    fast = synthetic.timing("cpu", REPORT, 1.0, round_="r")
    trials = [*synthetic.cpu_trials(), fast, synthetic.correctness("cpu", REPORT)]
    assert gate(decide(trials, environment=synthetic.environment(None)), "report-320").evidence == "none"


@pytest.mark.parametrize(
    "changes", [{"status": "error"}, {"environment": "env-other"}, {"source_hash": "0" * 16}, {"data": {"x": 1}}]
)
def test_a_failed_foreign_stale_or_empty_paging_record_proves_nothing(changes):
    memory = synthetic.memory_saved(70.3)
    bad = memory.model_copy(update={**changes, "data": {**memory.data, **changes.get("data", {})}})
    if "data" in changes:
        bad = bad.model_copy(update={"data": {"what": "memory", "case": "shared_prefix"}})
    found = option(decide([*without_paging(GOOD), bad]), "B")
    assert found.result == "INCONCLUSIVE" and found.conditions[-1].state == "INCONCLUSIVE"


@pytest.mark.parametrize("value", [10**400, -(10**400), math.nan, "70", True, None, [70]])
def test_what_is_no_figure_proves_nothing(value):
    memory = synthetic.memory_saved(value)
    found = option(decide([*without_paging(GOOD), memory]), "B")
    assert found.conditions[-1].state == "INCONCLUSIVE" and "holds no number" in found.conditions[-1].reason


def test_records_of_another_case_do_not_answer_for_the_shared_prefix():
    other = synthetic.memory_saved(95.0, data={"what": "memory", "case": "random", "saved_percent": 95.0})
    decode = Trial(kind="paging", environment=synthetic.ENV_ID, data={"what": "decode", "tokens_per_second": 1e6})
    assert option(decide([*without_paging(GOOD), other, decode]), "B").result == "INCONCLUSIVE"
    assert option(decide([*GOOD, other, decode]), "B").result == "SHIP"


def test_confidence_says_what_stands_behind_a_median():
    known = replace(result(5.0, 5.25, "at most"), interval=(4.9, 5.2))
    assert known.confidence == "30 samples, the median within 4.90 to 5.20"
    assert replace(known, interval=None, n=1).confidence == "1 sample"
    assert replace(known, measured=None).confidence == "nothing measured"
    counted = replace(known, interval=None, n=1200)
    for metric, words in (("correct_percent", "1,200 checks"), ("data.saved", "1,200 records")):
        assert replace(counted, metric=metric).confidence == words


def test_a_margin_is_told_in_percent_of_a_threshold_that_is_not_0():
    found = result(5.0, 4.0, "at most")
    assert found.margin_percent == -25 and result(-5.0, -4.0, "at most").margin_percent == 25
    assert replace(found, margin=None).margin_percent is None and replace(found, threshold=0).margin_percent is None


# --- what is told -----------------------------------------------------------------------------------------------------


def test_a_timing_is_told_with_its_distance_from_the_threshold():
    fast, slow = decide(GOOD), decide(synthetic.gpu_trials())
    report, latency = " at B=16, H=16, S=2048, D=64, ", " at B=1, H=8, S=512, D=64, "
    for decision, name, words in (
        (fast, "report-320", f"wmma reaches 512 TFLOPS{report}59.9 % above the threshold of 320 TFLOPS."),
        (slow, "report-320", f"wmma reaches 131 TFLOPS{report}59.1 % below the threshold of 320 TFLOPS."),
        (fast, "latency-5us", f"wmma takes 4.40 µs a call{latency}11.9 % below the threshold of 5 µs."),
        (slow, "latency-5us", f"wmma takes 14.2 µs a call{latency}184.3 % above the threshold of 5 µs."),
        (
            fast,
            "report-ahead",
            f"wmma has 1.10 times the speed of sdpa-cudnn{report}10.0 % above the threshold of 1 ×.",
        ),
    ):
        assert gate(decision, name).reason == words
    anything = judging.judge_gate(GATES.get("report-320").model_copy(update={"at_least": 0.0}), live(*GOOD), None, True)
    assert anything.reason == f"wmma reaches 512 TFLOPS{report}512 TFLOPS above the threshold of 0 TFLOPS."
    never = judging.judge_gate(GATES.get("latency-5us").model_copy(update={"at_most": 0.0}), live(*GOOD), None, True)
    assert never.reason == f"wmma takes 4.40 µs a call{latency}4.40 µs above the threshold of 0 µs."


def test_a_figure_of_several_records_is_their_best_or_worst_and_a_doubt_matters_where_it_could_turn_that():
    low, high = synthetic.memory_saved(40.0), synthetic.memory_saved(60.0)
    broken = synthetic.memory_saved(0.0, status="failed", reason="it broke")
    refused = synthetic.memory_saved(0.0, status="unsupported", reason="it refuses")
    needed, but = "at least 50 % is needed.", " But a record did not succeed (it broke)."
    for reduce, trials, state, reason in (
        (None, [low, high, refused], "FAIL", f"The worst of 2 records has 40.0 %; {needed}"),
        ("worst", [high, low], "FAIL", f"The worst of 2 records has 40.0 %; {needed}"),
        ("best", [low, high], "PASS", f"The best of 2 records has 60.0 %; {needed}"),
        ("worst", [low, broken], "FAIL", f"The only record has 40.0 %; {needed}"),
        ("worst", [high, broken], "INCONCLUSIVE", f"The only record has 60.0 %; {needed}{but}"),
        ("best", [low, refused], "FAIL", f"The only record has 40.0 %; {needed}"),
        ("best", [high, broken], "PASS", f"The only record has 60.0 %; {needed}"),
        ("best", [low, broken], "INCONCLUSIVE", f"The only record has 40.0 %; {needed}{but}"),
    ):
        found = judging.judge_gate(SAVED.model_copy(update={"reduce": reduce}), live(*trials), None, True)
        assert (found.state, found.reason) == (state, reason), (reduce, trials)
    for least, trials, reason in (
        (2, [low, high], f"The worst of 2 records has 40.0 %; {needed}"),
        (3, [low, high], "Only 2 records were found."),
        (2, [low], "Only 1 record was found."),
        (2, [low, broken], "A record did not succeed (it broke)."),
    ):
        found = judging.judge_gate(SAVED.model_copy(update={"min_count": least}), live(*trials), None, True)
        assert (found.reason, found.n) == (reason, sum(t.status == "ok" for t in trials))


def test_a_check_that_names_no_problem_and_no_figures_still_counts():
    wrong = synthetic.correctness("wmma", REPORT, status="failed")
    bare = wrong.model_copy(update={"problem": None, "correctness": None})
    found = judging.judge_gate(RIGHT, live(bare), None, True)
    assert (found.state, found.reason) == ("FAIL", "1 of 1 checks fail, the first for wmma.")


def test_checks_are_counted_each_also_where_they_are_alike():
    right, wrong = (synthetic.correctness("wmma", REPORT) for _ in range(2))
    wrong = wrong.model_copy(update={"correctness": wrong.correctness.model_copy(update={"num_bad": 3})})
    found = judging.judge_gate(RIGHT, live(right, wrong), None, True)
    assert (found.state, found.measured, found.n) == ("FAIL", 50, 2)
    one = judging.judge_gate(RIGHT, live(right), None, True)
    assert one.reason == f"The only check passes ({right.correctness.checked:,} elements compared)."
    two = judging.judge_gate(RIGHT, live(right, right), None, True)
    assert two.reason == f"All 2 checks pass ({2 * right.correctness.checked:,} elements compared)."
    few = judging.judge_gate(RIGHT.model_copy(update={"min_count": 3}), live(right, right), None, True)
    assert (few.state, few.n, few.reason) == ("INCONCLUSIVE", 2, "Only 2 checks were made; 3 settle it.")


def test_a_timing_by_another_method_or_with_another_cache_is_not_the_one_asked_for():
    wanted = GATES.get("latency-5us")
    assert judging.judge_gate(wanted, live(*GOOD), None, True).state == "PASS"
    for changes in ({"method": "events", "l2": None}, {"method": None, "l2": "rotating"}):
        other = judging.judge_gate(wanted.model_copy(update=changes), live(*GOOD), None, True)
        assert (other.state, other.evidence) == ("INCONCLUSIVE", "none"), changes


def test_stale_speeds_are_shown_by_the_best_of_them():
    both = [t for t in [*GOOD, *hopper(600.0)] if t.backend != "scalar"]
    stale = decide(both, current={**synthetic.HASHES, "attention_wmma": "f" * 16, "attention_hopper": "f" * 16})
    found = gate(stale, "report-320")
    assert found.state == "INCONCLUSIVE" and found.measured == pytest.approx(600, rel=0.02)
    assert found.interval[0] <= found.measured <= found.interval[1] and found.n == 30
    assert found.reason.startswith("Wmma was measured on other kernel source") and "(1 more" in found.reason
    assert gate(stale, "latency-5us").measured == pytest.approx(4.2, rel=0.02)
    doubted = with_timing(both, timing_at("sdpa-cudnn", REPORT), tflops=1e6)
    ahead = gate(decide(doubted), "report-ahead")
    assert ahead.state == "INCONCLUSIVE" and ahead.versus is None
    assert ahead.measured == pytest.approx(600 / 465, rel=0.02), "shown, and trusted by nobody"


def test_a_record_that_names_its_kernel_is_held_against_that_kernel_alone():
    def doubt(kernel, source_hash: str = synthetic.HASHES["attention_wmma"]) -> str | None:
        data = {} if kernel is None else {"kernel": kernel}
        return live().doubt(Trial(kind="build", environment=synthetic.ENV_ID, source_hash=source_hash, data=data))

    other = "was measured on other kernel source than the current one"
    assert doubt("attention_wmma") is None and doubt("attention_scalar") == f"attention_scalar {other}"
    assert doubt(None) is None and doubt("attention_unknown") is None and doubt(["attention_scalar"]) is None
    assert doubt(None, "0" * 16) == f"build {other}" and doubt("attention_wmma", "0" * 16) == f"attention_wmma {other}"


def test_a_function_of_the_users_has_no_kernel_source_to_be_stale():
    mine = synthetic.correctness("mine", REPORT)
    named = {"kernel": {"backend": "mine", "hash": "0" * 16}}
    for parameters, adopted in (
        (named, "mine"),
        ({"kernel": {"backend": 3}}, None),
        ({"kernel": "mine"}, None),
        ([], None),
    ):
        source = judging.Source(
            "live", (mine,), {**synthetic.environment(), "parameters": parameters}, synthetic.HASHES
        )
        assert source.adopted == adopted and (source.doubt(mine) is None) == (adopted == "mine"), parameters


# --- cases of batch invariance ---------------------------------------------------------------------------------------

SAME_BITS = Gate(
    id="invariance", title="The same bits in every batch", kind="invariance", backend="ours", metric="kept_percent",
    where={"mode": "invariant"}, min_count=500, at_least=100, required=True, measure="flashcore invariance",
)  # fmt: skip


SAVED = Gate(
    id="saved", title="Half of the memory is saved", kind="paging", metric="data.saved_percent", at_least=50, unit="%",
    required=True, measure="flashcore paging",
)  # fmt: skip
RIGHT = Gate(
    id="right", title="wmma is right", kind="correctness", backend="wmma", metric="correct_percent", at_least=100,
    required=True, measure="make report",
)  # fmt: skip


def live(*trials: Trial) -> judging.Source:
    return judging.Source("live", trials, synthetic.environment(), synthetic.HASHES)


def asked(backend: str = "wmma", mode: str = "invariant", cases: int = 600, kept: int | None = None, **more) -> Trial:
    kept = cases if kept is None else kept
    status = "failed" if kept < cases and mode == "invariant" else "ok"
    hashed = synthetic.HASHES.get(f"attention_{backend}")
    data = {"mode": mode, "cases": cases, "kept": kept, **more.pop("data", {})}
    fields = {"status": status, "environment": synthetic.environment()["id"], "source_hash": hashed, **more}
    return Trial(kind="invariance", backend=backend, variant=mode, data=data, **fields)


def same_bits(*trials: Trial):
    return judging.judge_gate(SAME_BITS, live(*trials), None, True)


def test_all_cases_have_to_be_kept_by_what_promises_them():
    refused = asked("hopper", status="unsupported", reason="it refuses")
    others = asked(mode="ordinary", kept=2), asked("fa3", cases=9, kept=1), refused
    found = same_bits(asked(), asked("cpu", cases=300), *others)
    assert found.state == "PASS" and (found.measured, found.n) == (100, 900) and found.confidence == "900 cases"
    assert found.reason == "All 900 cases are kept, by wmma, cpu."
    broken = same_bits(asked(kept=597), asked("cpu", cases=300))
    assert broken.state == "FAIL" and broken.reason == "3 of 900 cases are broken, by wmma." and broken.fix
    assert broken.backend == "wmma"
    assert same_bits(asked(kept=0)).reason == "600 of 600 cases are broken, by wmma."


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([asked(cases=499)], "Only 499 cases were asked; 500 settle it"),
        ([asked(), asked("cpu", status="error", reason="it died")], "cases of cpu were not all asked (it died)"),
        ([asked(), asked("cpu", status="error")], "cases of cpu were not all asked (no reason)"),
        ([asked(cases=0)], "does not say how many"),
        ([asked(source_hash="0" * 16)], "other kernel source"),
        ([asked(data={"sources": {"attention_hopper": "0" * 16}})], "other source of attention_hopper"),
        ([asked(environment="elsewhere")], "another machine"),
        ([asked(data={"kept": 601})], "does not say how many cases it keeps"),
        ([asked(data={"kept": True})], "does not say how many"),
        ([asked(data={"kept": "600"})], "does not say how many"),
        ([asked(data={"kept": 599.5})], "does not say how many"),
        ([asked(data={"cases": None})], "does not say how many"),
        ([asked(status="failed")], "says that it failed, and that every case is kept"),
        ([asked(status="unsupported", reason="it refuses")], "There is no record of it."),
        ([asked(status="unavailable", reason="no GPU.")], "There is no record of it: no GPU."),
    ],
)
def test_cases_that_prove_nothing_settle_nothing(trials, words):
    found = same_bits(*trials)
    assert found.state == "INCONCLUSIVE" and words in found.reason


def test_a_share_below_all_needs_as_many_cases_and_checks_as_any_other():
    """That some are broken does not make few of them enough."""
    nine_of_ten = {"at_least": 90.0, "min_count": 100}
    kept = SAME_BITS.model_copy(update=nine_of_ten)
    for cases, state in ((10, "INCONCLUSIVE"), (99, "INCONCLUSIVE"), (100, "PASS")):
        found = judging.judge_gate(kept, live(asked(cases=cases, kept=cases - 1, status="ok")), None, True)
        assert found.state == state and found.measured == pytest.approx(100 * (cases - 1) / cases), cases
        assert f"1 of {cases} cases are broken" in found.reason or f"{cases} cases were asked; 100" in found.reason
    right, wrong = (synthetic.correctness("wmma", REPORT, status=status) for status in ("ok", "failed"))
    of_checks = RIGHT.model_copy(update={**nine_of_ten, "min_count": 20})
    for n, state in ((10, "INCONCLUSIVE"), (20, "PASS")):
        checks = [right] * (n - n // 10) + [wrong] * (n // 10)
        found = judging.judge_gate(of_checks, live(*checks), None, True)
        assert (found.state, found.n, found.measured) == (state, n, 90)
    assert found.margin == 0 and found.fix is None and found.reason.startswith("2 of 20 checks fail")


def test_the_gate_that_ships_commented_out_can_be_required(tmp_path):
    text = (data_dir("reports") / "gates.toml").read_text()
    assert verdict.load_gates().get("invariance") is None and text.count("\n#~ ") > 10
    (tmp_path / "gates.toml").write_text(text.replace("\n#~ ", "\n"))
    gates = verdict.load_gates(tmp_path / "gates.toml")
    found = gates.get("invariance")
    assert found.required and len(gates) == len(verdict.load_gates()) + 1
    assert (found.metric, found.where, found.threshold) == (SAME_BITS.metric, SAME_BITS.where, 100)
