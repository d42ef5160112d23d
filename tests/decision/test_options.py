"""Options: weighed by records alone, recommended by a written rule, and told what would turn each of them over."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import synthetic_records as synthetic

from flashcore import page
from flashcore.decision import advice, flips, verdict
from flashcore.decision.gates import Gate
from flashcore.decision.judging import GateResult
from flashcore.decision.options import all_of
from flashcore.errors import GatesError
from flashcore.problem import PRESETS
from flashcore.records import RunFolder, Trial

GATES = verdict.load_gates()
GOOD = synthetic.gpu_trials(synthetic.FAST)
REPORT, LATENCY = PRESETS["report"], PRESETS["latency"]
HOPPER = synthetic.HASHES["attention_hopper"]


def decide(trials, gates=GATES, **more) -> verdict.Decision:
    given = {"environment": synthetic.environment(), "current_hashes": synthetic.HASHES, **more}
    return verdict.decide(trials, gates, **given)


def option(decision: verdict.Decision, name: str):
    return next(o for o in decision.options if o.id == name)


def hopper(tflops: float, latency_us: float = 4.2) -> list[Trial]:
    """Records of a hopper kernel of this speed, in the rounds of the others."""
    found = []
    for problem, latency in ((REPORT, REPORT.flops() / tflops / 1e6), (LATENCY, latency_us)):
        like = next(t for t in GOOD if t.kind == "attention_timing" and t.backend == "wmma" and t.problem == problem)
        timed = synthetic.timing("hopper", problem, latency, round_=like.timing.round, source_hash=HOPPER)
        found += [timed, synthetic.correctness("hopper", problem, source_hash=HOPPER)]
    return found


def without_paging(trials) -> list[Trial]:
    return [t for t in trials if t.kind != "paging"]


# --- what the shipped options come to ------------------------------------------------------------------------------


def test_the_one_option_whose_conditions_all_hold_is_recommended():
    decision = decide(GOOD)
    b = option(decision, "B")
    assert decision.verdict == "GO" and decision.recommended is b and decision.options[0] is b
    assert b.result == "SHIP" and b.holding == len(b.conditions) == 3 and "All 3 conditions hold" in b.reason
    assert {option(decision, name).result for name in "AC"} == {"INCONCLUSIVE"}
    assert decision.recommendation.startswith("Option B (WMMA kernel with sparse paging) is recommended: all 3")


def test_the_option_further_ahead_is_recommended_and_the_other_says_from_where_on_it_would_be():
    decision = decide([*GOOD, *hopper(600)])
    assert [o.id for o in decision.options if o.result == "SHIP"] == ["C", "B"] and decision.recommended.id == "C"
    ahead = option(decision, "C").rank.measured
    said = advice.flip(option(decision, "B"), decision.options)
    assert f"above option C's {ahead:.2f} ×" in said
    assert "option B would take its place" in decision.flip


def test_a_difference_inside_the_spread_is_none_and_the_files_order_decides():
    decision = decide([*GOOD, *hopper(512.4)])
    assert {o.id for o in decision.options if o.result == "SHIP"} == {"B", "C"} and decision.recommended.id == "B"


def test_an_unmeasured_condition_is_inconclusive_and_names_its_command():
    decision = decide(without_paging(GOOD))
    b = option(decision, "B")
    missing = next(c for c in b.conditions if c.id == "memory-saved")
    assert b.result == missing.state == "INCONCLUSIVE" and missing.fix == "flashcore paging"
    assert advice.flip(b, decision.options) == "'flashcore paging' would settle it."
    row = next(r for r in advice.condition_rows(decision.options) if "Paging" in r["Condition"])
    assert row["Result"] == "INCONCLUSIVE" and "'flashcore paging' measures it" in row["Confidence"]
    assert decision.verdict == "INCONCLUSIVE" and "no option is known to hold" in decision.reason


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


def test_records_of_another_case_do_not_answer_for_the_shared_prefix():
    other = synthetic.memory_saved(95.0, data={"what": "memory", "case": "random", "saved_percent": 95.0})
    decode = Trial(kind="paging", environment=synthetic.ENV_ID, data={"what": "decode", "tokens_per_second": 1e6})
    assert option(decide([*without_paging(GOOD), other, decode]), "B").result == "INCONCLUSIVE"
    assert option(decide([*GOOD, other, decode]), "B").result == "SHIP"


def test_no_option_that_holds_is_no_go_though_every_gate_passes():
    slow = [*(t for t in without_paging(GOOD)), synthetic.memory_saved(12.0)]
    text = [o for o in GATES.options if o.id == "B"]
    decision = decide(slow, replace(GATES, options=tuple(text)))
    assert {g.state for g in decision.gates if g.required} == {"PASS"}
    assert decision.verdict == "NO-GO" and "The only option does not hold" in decision.reason
    assert "rose from 12.0 to 70 % (5.8 times)" in decision.flip


def test_a_required_gate_that_fails_stops_an_option_whose_own_conditions_hold():
    wrong = synthetic.correctness("scalar", REPORT, status="failed")
    decision = decide([*GOOD, *hopper(600), wrong])
    c = option(decision, "C")
    assert decision.verdict == "NO-GO" and c.holding == 4 and c.result == "DO NOT SHIP" and not decision.recommended
    assert "required gate 'Our kernels are right'" in c.reason


def test_an_option_that_was_not_measured_is_open_though_the_best_of_ours_fails():
    decision = decide(synthetic.gpu_trials())
    assert decision.verdict == "NO-GO"
    assert option(decision, "C").result == "INCONCLUSIVE" and option(decision, "B").result == "DO NOT SHIP"


def test_an_incomplete_run_settles_no_option():
    decision = decide([t for t in GOOD if t.kind != "notebook"])
    assert decision.verdict == "INCONCLUSIVE" and {o.result for o in decision.options} == {"INCONCLUSIVE"}
    assert all(o.reason.startswith("The evidence is not complete") for o in decision.options)
    assert "the run were complete" in decision.flip or "settle" in decision.flip


def test_a_file_without_options_is_judged_by_its_gates_alone():
    decision = decide(without_paging(GOOD), replace(GATES, options=()))
    assert decision.verdict == "GO" and decision.options == () and decision.recommendation == decision.flip == ""
    assert page.options_html(decision) == ""


def test_the_recorded_run_recommends_the_hopper_kernel():
    from flashcore.paths import data_dir

    run = RunFolder(data_dir("reports") / "recorded" / "h200")
    environment = run.environment()
    decision = decide(run.trials(), environment=environment, current_hashes=environment["kernels"])
    assert {o.id for o in decision.options if all(c.state == "PASS" for c in o.conditions)} == {"C"}
    if all(option.complete for option in decision.options):
        assert decision.verdict == "GO" and decision.recommended.id == "C"
        assert {o.id for o in decision.options if o.result == "SHIP"} == {"C"}
    else:  # a run that was interrupted decides nothing, however well its conditions stand
        assert decision.verdict == "INCONCLUSIVE" and decision.recommended is None
        assert {o.result for o in decision.options} == {"INCONCLUSIVE"}


# --- figures and sentences -----------------------------------------------------------------------------------------


def test_all_of_three_values():
    assert all_of([]) == all_of(["PASS"]) == "PASS"
    assert all_of(["PASS", "INCONCLUSIVE"]) == "INCONCLUSIVE" and all_of(["INCONCLUSIVE", "FAIL"]) == "FAIL"


def result(measured: float, threshold: float, comparison: str, *, metric: str = "latency_us") -> GateResult:
    margin = measured - threshold if comparison == "at least" else threshold - measured
    return GateResult(
        id="x", title="X", state="PASS" if margin >= 0 else "FAIL", threshold=threshold, measured=measured,
        margin=margin, unit="µs", n=30, spread=(measured, measured), evidence="live", reason="Because.", fix=None,
        required=True, comparison=comparison, metric=metric, problem="report", backend="hopper",
    )  # fmt: skip


FIGURES = st.floats(1e-3, 1e6)


@settings(max_examples=300, deadline=None)
@given(
    measured=FIGURES, threshold=st.integers(1, 10**5).map(float), comparison=st.sampled_from(["at least", "at most"])
)
def test_the_flip_sentence_is_arithmetically_right(measured, threshold, comparison):
    found = result(measured, threshold, comparison)
    change = flips.change(found)
    pattern = r"hopper's latency at .* (rose|fell) from (\S+) to (above |below |)(\S+) µs \((.*)\)"
    way, old, beyond, new, far = re.fullmatch(pattern, change.words).groups()
    told = float(old.replace(",", ""))
    assert told == pytest.approx(measured, rel=6e-3) and float(new) == pytest.approx(threshold, rel=1e-5)
    holds = found.state == "PASS"
    assert bool(beyond) == holds, "what holds ends beyond the threshold, what fails begins to hold at it"
    assert (way == "rose") == ((comparison == "at most") == holds)
    if measured != threshold:
        assert (way == "rose") == (threshold > measured)
        assert change.relative == pytest.approx((threshold - measured) / measured)
    if far.endswith("times"):
        assert float(far.split()[0].replace(",", "")) == pytest.approx(threshold / measured, rel=0.06)
    elif far.endswith("%"):
        percent = float(far.removesuffix(" %").replace("−", "-"))
        assert percent == pytest.approx(100 * (threshold / measured - 1), abs=0.051)
    else:
        assert measured == threshold


def test_distances_count_half_as_far_as_twice_and_none_at_the_threshold():
    half, twice = (flips.change(result(v, 10, "at least")) for v in (20.0, 5.0))
    assert half.distance == pytest.approx(twice.distance)
    even = flips.change(result(10.0, 10, "at least"))
    assert even.distance is None and flips.nearest_first([even, half])[0] is half
    assert flips.change(replace(result(9.0, 10, "at least"), state="INCONCLUSIVE")) is None


def test_a_share_of_checks_is_told_by_the_check():
    right = replace(result(100.0, 100, "at least", metric="correct_percent"), n=49)
    assert flips.change(right).words == "one of the 49 checks behind 'X' failed"


def test_confidence_says_whether_the_margin_exceeds_the_spread():
    near, far = (replace(result(5.0, t, "at most"), spread=(4.9, 5.2)) for t in (5.25, 50.0))
    assert "is within the spread" in near.confidence and "exceeds the spread" in far.confidence
    assert near.margin_over_spread == pytest.approx(0.25 / 0.3)


def test_rows_frame_json_and_page_hold_the_same():
    decision = decide([*without_paging(GOOD), *hopper(600)])
    frame = advice.frame(decision.options)
    assert list(frame["Option"]) == [f"{o.id}: {o.title}" for o in decision.options]
    conditions = advice.frame(decision.options, conditions=True)
    assert len(conditions) == sum(len(o.conditions) for o in decision.options)
    assert set(conditions["Result"]) <= {"HOLDS", "FAILS", "INCONCLUSIVE"}
    data = json.loads(json.dumps(decision.as_dict()))
    assert [o["flip"] for o in data["options"]] == list(frame["What would change it"])
    html = page.options_html(decision)
    assert "SHIP, recommended" in html and html.count("<table") == 3 and html.index("<details") > html.index("<table")


# --- never without evidence ----------------------------------------------------------------------------------------

SMALL = [t for t in [*GOOD, *hopper(600)] if t.problem in (None, REPORT, LATENCY, PRESETS["tiny"])]
SPOILS = [{"status": "error"}, {"environment": "env-x"}, {"source_hash": "0" * 16}, {"timing": None}, {"data": {}},
          {"correctness": None}]  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    dropped=st.sets(st.integers(0, len(SMALL) - 1), max_size=8),
    spoiled=st.dictionaries(st.integers(0, len(SMALL) - 1), st.sampled_from(SPOILS), max_size=4),
)
def test_nothing_ships_without_complete_fresh_evidence(dropped, spoiled):
    trials = [
        t.model_copy(update=spoiled.get(i, {})) for i, t in enumerate(SMALL) if i not in dropped
    ]  # fmt: skip
    decision = decide(trials)
    for found in decision.options:
        flip = advice.flip(found, decision.options)
        assert found.reason.endswith(".") and flip.endswith(".") and advice.nearest(found)
    shipping = [o for o in decision.options if o.result == "SHIP"]
    assert (decision.verdict == "GO") == bool(shipping) == bool(decision.recommended)
    for found in shipping:
        mine = [t for t in trials if t.backend == found.backend and t.status == "ok" and t.source_hash
                and t.source_hash in synthetic.HASHES.values() and t.environment == synthetic.ENV_ID]  # fmt: skip
        assert any(t.kind == "correctness" and t.problem == REPORT and t.correctness for t in mine)
        assert any(t.kind == "attention_timing" and t.problem == REPORT and t.timing for t in mine)
        assert {c.state for c in found.conditions} == {"PASS"} and all(c.evidence != "none" for c in found.conditions)
        finished = {t.data.get("name") for t in trials if t.kind == "notebook" and t.status == "ok"}
        assert set(synthetic.NOTEBOOKS) <= finished
        if found.id == "B":
            assert any(t.kind == "paging" and t.status == "ok" and t.data for t in trials)


# --- options in the file -------------------------------------------------------------------------------------------

FILE = '''
[[gate]]
id = "speed"
title = "Fast enough"
kind = "attention_timing"
backend = "ours"
problem = "report"
metric = "tflops"
at_least = 320
required = true
measure = "flashcore report"

[[option]]
id = "A"
title = "One"
means = """
[[option]]
id = "not a header"
"""
effort = "none"
risk = "none"
backend = "wmma"
conditions = [
    "speed",
]

[[option]]
id = "B"
title = "Two"
means = "Another thing."
effort = "much"
risk = "high"
[[option.condition]]
id = "spills"
title = "No spills"
kind = "build"
metric = "data.spill_bytes"
at_most = 0
measure = "flashcore build"
'''


def load(tmp_path, text: str) -> verdict.Gates:
    path = tmp_path / "gates.toml"
    path.write_text(text, encoding="utf-8")
    return verdict.load_gates(path)


def test_a_gate_on_ours_asks_the_options_own_backend(tmp_path):
    gates = load(tmp_path, FILE)
    (asked,) = gates.options[0].asked(gates)
    assert asked.backend == "wmma" and asked.title == "Fast enough (wmma)" and gates.get("speed").backend == "ours"
    (own,) = gates.options[1].asked(gates)
    assert isinstance(own, Gate) and own.required and own.metric == "data.spill_bytes"
    assert decide(without_paging(GOOD), gates).recommended.id == "A"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ('    "speed",', '    "sped",', 24, "option 'A': there is no gate 'sped'; use one of speed, or write it"),
        ('    "speed",', '    "speed",\n    "speed",', 24, "named twice"),
        ('conditions = [\n    "speed",\n]\n', "", 13, "it has no condition; name gates in 'conditions'"),
        ('id = "B"', 'id = "A"', 28, "two options with the id 'A'"),
        ('effort = "much"\n', "", 27, "the key 'effort' is missing"),
        ('risk = "high"', 'risk = "high"\nprice = 3', 33, "there is no key 'price'; the keys are id, title"),
        ('risk = "high"', "risk = 3", 32, "risk"),
        ('backend = "wmma"', 'backend = "ours"', 22, "name it instead of a group"),
        ('conditions = [\n    "speed",\n]\n', "conditions = 3\n", 23, "conditions"),
        ('id = "spills"', 'id = "speed"', 34, "there is another gate or condition with the id 'speed'; choose"),
        ("at_most = 0", "at_most = 0\nat_least = 1", 33, "option 'B', condition 'spills': a gate needs exactly one"),
        ("at_most = 0", 'at_most = "none"', 38, "option 'B', condition 'spills': at_most"),
        ('metric = "data.spill_bytes"', 'metric = "spills"', 37, "there is no metric 'spills'"),
        ('kind = "build"', 'kind = "builds"', 36, "there is no kind 'builds'; use one of ceiling"),
        ("at_most = 0", "at_mst = 0", 38, "there is no key 'at_mst'"),
        ("at_most = 0", "at_most = 0\nrequired = false", 39, "required"),
        ('risk = "high"', "risk = ", 32, "not TOML"),
    ],
)
def test_a_bad_option_is_one_error_with_file_line_and_reason(tmp_path, old, new, line, words):
    assert old in FILE
    with pytest.raises(GatesError) as caught:
        load(tmp_path, FILE.replace(old, new, 1))
    assert words in caught.value.reason and caught.value.line == line, caught.value
    assert f"gates.toml, line {line}: " in str(caught.value) and "\n" not in caught.value.reason


@pytest.mark.parametrize("text", ["option = 3\n", "option = [3]\n"])
def test_options_that_are_no_tables_are_an_error(tmp_path, text):
    with pytest.raises(GatesError, match=r"line 1: write each option as a \[\[option\]\] table"):
        load(tmp_path, text + FILE.split("[[option]]")[0])
