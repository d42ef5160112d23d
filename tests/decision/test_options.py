"""Options: weighed by records alone, recommended by a written rule, and told what would turn each of them over."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import synthetic_records as synthetic
from support.decisions import GATES, GOOD, LATENCY, REPORT, decide, hopper, option, result, without_paging

from flashcore import page
from flashcore.decision import advice, options
from flashcore.decision.judging import GateResult
from flashcore.decision.options import OptionResult, all_of
from flashcore.problem import PRESETS
from flashcore.records import RunFolder

# --- what the shipped options come to ------------------------------------------------------------------------------


def test_the_one_option_whose_conditions_all_hold_is_recommended():
    decision = decide(GOOD)
    b = option(decision, "B")
    assert decision.verdict == "GO" and decision.recommended is b and decision.options[0] is b
    assert b.result == "SHIP" and b.holding == len(b.conditions) == 3 and "All 3 conditions hold" in b.reason
    assert {option(decision, name).result for name in "AC"} == {"INCONCLUSIVE"}
    assert decision.recommendation.startswith("Option B (WMMA kernel with sparse paging) is recommended: all 3")


def test_medians_whose_intervals_overlap_do_not_differ_and_the_files_order_decides():
    decision = decide([*GOOD, *hopper(512.4)])
    assert {o.id for o in decision.options if o.result == "SHIP"} == {"B", "C"} and decision.recommended.id == "B"
    apart = decide([*GOOD, *hopper(600)])
    assert {o.id for o in apart.options if o.result == "SHIP"} == {"B", "C"} and apart.recommended.id == "C"
    assert [o.id for o in apart.options[:2]] == ["C", "B"], "the others by their margin"


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


def condition(name: str, measured: float, **changes) -> GateResult:
    """A latency against 10 µs."""
    return replace(result(measured, 10.0, "at most"), id=name, title=name, **changes)


NEAR, FAR = condition("near", 11.0, fix="measure near"), condition("far", 40.0, fix="measure far")
HOLDS, TIGHT = condition("holds", 5.0), condition("tight", 9.0)
OPEN = condition("open", 9.9, state="INCONCLUSIVE", fix="measure open")


def weighed(answer: str, *conditions: GateResult, gates: tuple[GateResult, ...] = ()) -> OptionResult:
    return OptionResult("A", "A", "", "", "", None, answer, conditions, gates, reason="")


def test_what_has_to_change_is_one_thing_to_stop_an_option_and_everything_that_fails_to_ship_it():
    ships = weighed("SHIP", HOLDS, gates=(TIGHT,))
    assert [c.condition for c in ships.changes] == ["tight", "holds"] and ships.commands == ()
    fails = weighed("DO NOT SHIP", NEAR, HOLDS, OPEN, gates=(FAR, replace(OPEN, id="open again")))
    assert [c.condition for c in fails.changes] == ["far", "near"]
    assert fails.commands == ("measure open",), "what is settled is not measured again, and nothing twice"
    assert (ships.holding, fails.holding) == (1, 1)
    [as_data] = weighed("SHIP", replace(HOLDS, interval=None)).as_dict()["conditions"]
    assert as_data["interval"] is None and as_data["state"] == "HOLDS"


@pytest.mark.parametrize(
    ("state", "conditions", "words"),
    [
        ("PASS", [HOLDS, TIGHT], "All 2 conditions hold; the narrowest is 'tight', by 10.0 %."),
        ("PASS", [HOLDS, replace(TIGHT, interval=None)], "All 2 conditions hold; the narrowest is 'holds', by 50.0 %."),
        ("PASS", [replace(HOLDS, interval=None)], "Its only condition holds."),
        ("FAIL", [NEAR, FAR, HOLDS], "2 of 3 conditions fail, foremost 'far': Because."),
        ("FAIL", [OPEN, NEAR], "1 of 2 conditions fails, foremost 'near': Because."),
        ("INCONCLUSIVE", [HOLDS, OPEN], "1 of 2 conditions is not settled, foremost 'open': Because."),
        ("INCONCLUSIVE", [OPEN, OPEN], "2 of 2 conditions are not settled, foremost 'open': Because."),
    ],
)
def test_the_reason_of_an_option_names_what_decides(state, conditions, words):
    assert options._reason(state, conditions, ()) == words


def test_an_option_that_was_not_ranked_is_on_a_par_with_its_like_alone():
    ranked, other, unknown = (replace(weighed("SHIP", HOLDS), rank=rank) for rank in (HOLDS, TIGHT, None))
    open_rank = replace(unknown, rank=replace(HOLDS, margin=None, interval=None))
    assert [options._margin(one) for one in (ranked, other)] == [5.0, 1.0]
    assert options._margin(unknown) == options._margin(open_rank) == -math.inf, "it comes behind all others"
    assert options._on_a_par(unknown, open_rank) and options._on_a_par(ranked, ranked)
    for one, best in ((unknown, ranked), (open_rank, ranked), (other, ranked)):
        assert not options._on_a_par(one, best)
    wide = replace(ranked, rank=replace(HOLDS, interval=(4.0, 9.0)))
    assert options._on_a_par(other, wide), "9 µs lies within the interval of the other one"


def test_all_of_three_values():
    assert all_of([]) == all_of(["PASS"]) == "PASS"
    assert all_of(["PASS", "INCONCLUSIVE"]) == "INCONCLUSIVE" and all_of(["INCONCLUSIVE", "FAIL"]) == "FAIL"


# --- never without evidence ----------------------------------------------------------------------------------------

SMALL = [t for t in [*GOOD, *hopper(600)] if t.problem in (None, REPORT, LATENCY, PRESETS["tiny"])]
SPOILS = [{"status": "error"}, {"environment": "env-x"}, {"source_hash": "0" * 16}, {"timing": None}, {"data": {}},
          {"correctness": None}]  # fmt: skip


@pytest.mark.slow
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
