"""The audit of claims: each check finds what is planted and leaves what is sound alone; the shipped file's verdicts."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from support import synthetic_paging
from support import synthetic_records as synthetic
from typer.testing import CliRunner

from flashcore.cli import program
from flashcore.decision import claims as library
from flashcore.decision.claims.file import UNITS, shipped_path
from flashcore.decision.claims.findings import apart, divided
from flashcore.errors import ClaimsError
from flashcore.paths import data_dir
from flashcore.pipeline import reporting
from flashcore.problem import PRESETS, square
from flashcore.records import RunFolder, Trial, read_trials

GPU = """
[[gpu]]
id = "Toy"
names = ["Toy 9000"]
peak_tflops = { float16 = 100.0, float32 = 50 }
boost_ghz = 2
sm_count = 10
memory_tb_s = 1
l2_mb = 1
launch_us = 2.0
source = "a made-up data sheet"
"""
"""A GPU of round figures: the workload `report` takes at least 2.749 ms on it."""
TOY = {"gpu": "SYNTHETIC Toy 9000"}


def claim_text(id_: str, quantity: str, value, unit: str, **keys) -> str:
    lines = [f'id = "{id_}"', 'text = "made up"', 'source = "nowhere"', f'quantity = "{quantity}"']
    lines += [f"value = {value}", f'unit = "{unit}"']
    lines += [f"{key} = {json.dumps(value) if not isinstance(value, float) else value}" for key, value in keys.items()]
    return "[[claim]]\n" + "\n".join(lines) + "\n"


def audited(*texts: str, trials=(), environment=None, gpu: str = "Toy") -> dict[str, library.Audit]:
    """The audits of made-up claims by id, all of them about the GPU 'Toy' unless they say otherwise."""
    named = [text if "\ngpu = " in text or not gpu else text + f'gpu = "{gpu}"\n' for text in texts]
    found = library.parse_claims("".join(named) + GPU)
    return {a.claim.id: a for a in library.audit(found, trials, environment=environment)}


def one(*texts: str, **given) -> library.Audit:
    return next(iter(audited(*texts, **given).values()))


def outcomes(audit: library.Audit, check: str) -> list[str]:
    return [finding.outcome for finding in audit.of(check)]


# ------------------------------------------------------------------------------------------------ figures and digits


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("0.45", 0.445, 0.455), ("0.450", 0.4495, 0.4505), ("5.7", 5.65, 5.75), ("711", 710.5, 711.5),
        ("270", 265, 275), ("25000", 24500, 25500), ("1000", 950, 1050), ("3", 2.5, 3.5), ("1.5e3", 1450, 1550),
        ("615.0", 614.95, 615.05),
    ],
)  # fmt: skip
def test_the_digits_given_say_how_far_the_truth_may_lie(value, low, high):
    claim = next(iter(library.parse_claims(claim_text("a", "tflops", value, "TFLOPS"))))
    assert claim.interval == pytest.approx((low, high))


def test_units_and_bounds():
    text = claim_text("a", "latency_us", 0.073, "s") + claim_text("b", "latency_us", 5, "µs", bound="at most")
    a, b, c = library.parse_claims(text + claim_text("c", "tokens_per_s", 25000, "tokens/s", bound="at least"))
    assert a.number == pytest.approx(73000) and a.figure == "0.073 s"
    assert b.interval == (0, 5) and b.figure == "at most 5 µs"
    assert c.interval == (25000, math.inf) and c.figure == "at least 25,000 tokens/s"


def test_intervals():
    assert apart((1, 2), (3, 4)) and apart((3, 4), (1, 2)) and not apart((1, 3), (3, 4))
    assert divided((2, 4), (1, 2)) == (1, 4)
    assert divided((2, math.inf), (1, 2)) == (1, math.inf) and divided((2, 4), (0, 1)) == (2, math.inf)
    assert divided((1, 1), (5, math.inf)) == (0, 0.2)


# ------------------------------------------------------------------------------------------------ physics


@pytest.mark.parametrize(
    ("quantity", "value", "unit", "keys", "outcome"),
    [
        ("latency_us", 2.5, "ms", {"workload": "report"}, "impossible"),
        ("latency_us", 2.9, "ms", {"workload": "report"}, "possible"),
        ("latency_us", 2.5, "ms", {"workload": "report-causal"}, "possible"),
        ("latency_us", 2.9, "ms", {"workload": "B=16,H=16,S=2048,D=64,fp32"}, "impossible"),
        ("latency_us", 2.5, "ms", {"workload": "report", "share": 0.5}, "possible"),
        ("latency_us", 1, "ms", {"workload": "report", "bound": "at most"}, "impossible"),
        ("tflops", 101, "TFLOPS", {"workload": "report"}, "impossible"),
        ("tflops", 99, "TFLOPS", {"workload": "report"}, "possible"),
        ("tflops", 99, "TFLOPS", {"workload": "report", "bound": "at least"}, "possible"),
        ("tflops", 101, "TFLOPS", {"workload": "report", "bound": "at least"}, "impossible"),
        ("tflops", 101, "TFLOPS", {}, "impossible"),
        ("tflops", 99, "TFLOPS", {}, "possible"),
        ("latency_us", 1.0, "us", {"workload": "B=1,H=1,S=16,D=64"}, "impossible"),  # less than an empty kernel
        ("latency_us", 2.5, "us", {"workload": "B=1,H=1,S=16,D=64"}, "possible"),
        ("latency_us", 1.0, "us", {}, "impossible"),
        ("latency_us", 100.0, "us", {"workload": "B=16,H=16,Sq=1,Sk=8192,D=64"}, "impossible"),  # less than its bytes
        ("latency_us", 600.0, "us", {"workload": "B=16,H=16,Sq=1,Sk=8192,D=64"}, "possible"),
        ("clock_ghz", 3.9, "GHz", {}, "impossible"),
        ("clock_ghz", 2000, "MHz", {}, "confirmed"),
        ("clock_ghz", 1.5, "GHz", {}, "possible"),
        ("peak_tflops", 32, "TFLOPS", {}, "contradicted"),
        ("peak_tflops", 100, "TFLOPS", {}, "confirmed"),
        ("peak_tflops", 200, "TFLOPS", {}, "contradicted"),
        ("peak_tflops", 50, "TFLOPS", {"dtype": "float32"}, "confirmed"),
        ("sm_count", 10, "SMs", {}, "confirmed"),
        ("sm_count", 12, "SMs", {}, "contradicted"),
        ("memory_share", 170, "%", {"workload": "report", "definition": "x"}, "impossible"),
    ],
)  # fmt: skip
def test_physics(quantity, value, unit, keys, outcome):
    found = one(claim_text("a", quantity, value, unit, **keys))
    assert outcomes(found, "physics") == [outcome]
    assert all(f.sentence.endswith(".") for f in found.findings)
    if outcome in ("impossible", "contradicted", "confirmed") and not found.of("definition"):
        assert found.verdict == outcome and found.reason.startswith(found.of("physics")[0].sentence)


def test_a_claim_without_a_known_gpu_says_so():
    found = one(claim_text("a", "tflops", 1e6, "TFLOPS", workload="report"), gpu="")
    assert outcomes(found, "physics") == ["missing"] and found.verdict == "not checkable"


def test_a_claim_that_names_no_gpu_is_held_against_the_run_s():
    found = one(claim_text("a", "tflops", 150, "TFLOPS", workload="report"), gpu="", environment=TOY)
    assert found.verdict == "impossible" and "Toy" in found.reason


def test_a_workload_that_may_be_meant_is_tried_and_settles_nothing():
    text = claim_text("a", "latency_us", 5, "µs", bound="at most", may_mean=["report", "B=1,H=1,S=16,D=64"])
    found = one(text)
    assert found.verdict == "undefined" and outcomes(found, "physics") == ["beside"]
    assert "Were B=16" in found.reason and "impossible" in found.reason


def test_measured_ceilings_refute_a_claim_about_the_same_gpu_and_stand_beside_others():
    environment = {**TOY, "id": "e"}
    data = {"name": "matmul_fp16", "value": 70.0, "unit": "TFLOPS"}
    trials = [Trial(kind="ceiling", environment="e", data=data)]
    fast = claim_text("a", "tflops", 90.0, "TFLOPS", workload="report")
    assert one(fast, trials=trials, environment=environment).verdict == "contradicted"
    elsewhere = one(fast, trials=trials, environment={"gpu": "another", "id": "e"})
    assert elsewhere.verdict == "not checkable" and outcomes(elsewhere, "physics") == ["possible", "beside"]
    near = claim_text("a", "tflops", 71.0, "TFLOPS", workload="report")
    assert outcomes(one(near, trials=trials, environment=environment), "physics") == ["possible"]
    empty = [Trial(kind="ceiling", environment="e", data={"name": "graph_node", "value": 3.0, "unit": "us"})]
    short = claim_text("a", "latency_us", 2.5, "us", workload="B=1,H=1,S=16,D=64")
    assert one(short, trials=empty, environment=environment).verdict == "contradicted"


# ------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize(("time", "verdict"), [(73, "confirmed"), (74, "contradicted"), (7.3, "contradicted")])
def test_a_rate_times_a_time_is_the_work(time, verdict):
    rate = claim_text("rate", "tflops", 3.75, "TFLOPS", workload="report")
    found = audited(rate, claim_text("time", "latency_us", time, "ms", same_as=["rate"]))
    assert outcomes(found["rate"], "arithmetic") == [verdict] and found["rate"].verdict == verdict
    assert outcomes(found["time"], "arithmetic") == [verdict]


def test_claims_alike_in_workload_backend_and_gpu_are_compared_without_a_link():
    rate = claim_text("rate", "tflops", 3.75, "TFLOPS", workload="report", backend="x")
    time = claim_text("time", "latency_us", 90, "ms", workload="report", backend="x")
    other = claim_text("other", "latency_us", 90, "ms", workload="report", backend="y")
    found = audited(rate, time, other)
    assert found["rate"].verdict == found["time"].verdict == "contradicted"
    assert found["other"].verdict == "not checkable"


@pytest.mark.parametrize(("ratio", "verdict"), [("5.7", "confirmed"), ("5.8", "confirmed"), ("6.1", "contradicted")])
def test_a_ratio_is_the_quotient_of_its_two_claims(ratio, verdict):
    slow = claim_text("slow", "latency_us", 420, "ms", workload="report")
    fast = claim_text("fast", "latency_us", 73, "ms", workload="report")
    found = audited(claim_text("ratio", "speedup", ratio, "×", of="slow", over="fast"), slow, fast)
    assert outcomes(found["ratio"], "arithmetic") == [verdict] and found["ratio"].verdict == verdict
    assert found["slow"].verdict == found["fast"].verdict == "not checkable"


@pytest.mark.parametrize(
    ("value", "unit", "keys", "verdict"),
    [
        (275, "GFLOP", {"workload": "report"}, "confirmed"),
        (2.8, "TFLOP", {"workload": "report"}, "contradicted"),
        (137, "GFLOP", {"workload": "report", "share": 0.5}, "confirmed"),
        (33.55, "MFLOP", {"factors": [2, 2048, 64, 128]}, "confirmed"),
        (33.5, "MFLOP", {"factors": [2, 2048, 64, 128]}, "contradicted"),
        (33.5, "MFLOP", {"factors": [2, 2048, 64, 128], "plus_minus": 0.1}, "confirmed"),
    ],
)
def test_work(value, unit, keys, verdict):
    assert one(claim_text("a", "work_gflop", value, unit, **keys)).verdict == verdict


def test_a_count_is_the_product_of_its_factors():
    assert one(claim_text("a", "count", 8192, "launches", factors=[16, 2, 256])).verdict == "confirmed"
    found = one(claim_text("a", "count", 4096, "launches", factors=[16, 2, 256]))
    assert found.verdict == "contradicted" and "0.500 times that" in found.reason


@pytest.mark.parametrize(("rate", "verdict"), [(50, "contradicted"), (500, "not checkable")])
def test_a_part_takes_no_longer_than_the_whole(rate, verdict):
    whole = claim_text("whole", "latency_us", 615, "ms", workload="report")
    keys = {"bound": "at most", "workload": "report", "share": 0.5, "part_of": "whole"}
    found = audited(claim_text("part", "tflops", rate, "GFLOPS", **keys), whole)
    assert found["part"].verdict == verdict and found["whole"].verdict == "not checkable"


def test_a_part_is_not_held_against_a_whole_that_is_impossible():
    whole = claim_text("whole", "latency_us", 1, "ms", workload="report")
    keys = {"workload": "report", "share": 0.5, "part_of": "whole"}
    found = audited(claim_text("part", "latency_us", 300, "ms", **keys), whole)
    assert (found["whole"].verdict, found["part"].verdict) == ("impossible", "not checkable")


# ------------------------------------------------------------------------------------------------ contradiction


def test_two_figures_for_one_thing_contradict_each_other_beyond_their_digits():
    a = claim_text("a", "latency_us", 73, "ms", workload="report")
    found = audited(a, claim_text("b", "latency_us", 80.0, "ms", workload="report", same_as=["a"]))
    assert found["a"].verdict == found["b"].verdict == "contradicted"
    assert "'b'" in found["a"].reason and "80.0 ms" in found["a"].reason and "guess" not in found["a"].reason
    found = audited(a, claim_text("b", "latency_us", 73.4, "ms", workload="report", same_as=["a"]))
    assert found["a"].verdict == found["b"].verdict == "not checkable"  # said twice is not confirmed


def test_links_reach_on_and_hardware_needs_none():
    chain = [claim_text("a", "latency_us", 73, "ms", workload="report"),
             claim_text("b", "latency_us", 73, "ms", workload="report", same_as=["a"]),
             claim_text("c", "latency_us", 90, "ms", workload="report", same_as=["b"])]  # fmt: skip
    assert len(audited(*chain)["a"].of("contradiction")) == 2
    clocks = audited(claim_text("a", "clock_ghz", 1.5, "GHz"), claim_text("b", "clock_ghz", 1.7, "GHz"))
    assert clocks["a"].verdict == clocks["b"].verdict == "contradicted"


def test_a_claim_that_falls_by_itself_does_not_drag_a_sound_one_down():
    sound = claim_text("sound", "latency_us", 73, "ms", workload="report")
    rate = claim_text("rate", "tflops", 3.75, "TFLOPS", workload="report", same_as=["sound"])
    bad = claim_text("bad", "latency_us", 270, "µs", workload="report", same_as=["sound"])
    found = audited(sound, rate, bad)
    assert [found[name].verdict for name in ("sound", "rate", "bad")] == ["confirmed", "confirmed", "impossible"]
    assert outcomes(found["sound"], "contradiction") == ["beside"]
    assert outcomes(found["bad"], "contradiction") == ["contradicted"]


@pytest.mark.parametrize(("short", "hint"), [(0.0286, True), (0.027, True), (0.02, False), (0.4, False), (0.456, True)])
def test_a_hint_of_heads_only_where_arithmetic_shows_it(short, hint):
    a = claim_text("a", "latency_us", 7.3, "s", workload="report")
    found = audited(a, claim_text("b", "latency_us", short, "s", workload="report", same_as=["a"]))
    assert found["b"].verdict == "contradicted"
    assert ("guess" in found["b"].of("contradiction")[0].sentence) is hint


# ------------------------------------------------------------------------------------------------ definition


@pytest.mark.parametrize(
    ("quantity", "unit", "keys", "undefined"),
    [
        ("tflops", "TFLOPS", {}, True),
        ("tflops", "TFLOPS", {"workload": "report"}, False),
        ("latency_us", "ms", {}, True),
        ("memory_share", "%", {}, True),
        ("memory_share", "%", {"workload": "report"}, True),
        ("memory_share", "%", {"definition": "pages kept over all pages"}, True),
        ("memory_share", "%", {"workload": "report", "definition": "pages kept over all pages"}, False),
        ("tokens_per_s", "tokens/s", {"workload": "report"}, True),
        ("tokens_per_s", "tokens/s", {"workload": "report", "definition": "32 layers, decode"}, False),
        ("speedup", "×", {}, True),
    ],
)
def test_what_is_undefined(quantity, unit, keys, undefined):
    found = one(claim_text("a", quantity, 42, unit, **keys))
    assert outcomes(found, "definition") == ["undefined"] * undefined
    assert found.verdict == ("undefined" if undefined else "not checkable")


# ------------------------------------------------------------------------------------------------ measurement

TRIALS = synthetic.gpu_trials()
ENVIRONMENT = synthetic.environment()
REPORT = PRESETS["report"]
WMMA = next(t for t in TRIALS if t.kind == "attention_timing" and t.backend == "wmma" and t.problem == REPORT)


def measured(*texts: str, trials=TRIALS, **environment) -> library.Audit:
    return one(*texts, trials=trials, environment={**ENVIRONMENT, **environment}, gpu="")


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "confirmed"), (1.01, "confirmed"), (2.0, "contradicted"),
                                                 (0.5, "contradicted")])  # fmt: skip
@pytest.mark.parametrize("quantity", ["latency_us", "tflops"])
def test_a_claim_about_a_backend_of_this_run_is_decided_by_it(factor, verdict, quantity):
    value, unit = (WMMA.timing.latency_us, "µs") if quantity == "latency_us" else (WMMA.timing.tflops, "TFLOPS")
    found = measured(claim_text("a", quantity, round(value * factor, 3), unit, workload="report", backend="wmma"))
    assert found.verdict == verdict
    (finding,) = found.of("measurement")
    assert finding.backend == "wmma" and finding.n == 30 and finding.spread[0] < finding.against < finding.spread[1]
    assert finding.against == pytest.approx(value)


def test_a_counterpart_another_gpu_or_doubtful_records_only_stand_beside():
    half = round(WMMA.timing.latency_us / 2, 1)
    about = {"workload": "report"}
    found = measured(claim_text("a", "latency_us", half, "µs", backend="old", counterpart="wmma", **about))
    assert (found.verdict, outcomes(found, "measurement")) == ("not checkable", ["beside"])
    assert "2.00 times as slow as the claim" in found.reason and "SYNTHETIC H200" in found.reason
    own = claim_text("a", "latency_us", half, "µs", backend="wmma", **about)
    assert outcomes(measured(own + 'gpu = "Toy"\n'), "measurement") == ["beside"]
    stale = library.audit(library.parse_claims(own), TRIALS, environment=ENVIRONMENT, current_hashes={"wmma": "other"})
    assert outcomes(stale[0], "measurement") == ["beside"] and "other kernel source" in stale[0].reason
    wrong = [WMMA, synthetic.correctness("wmma", REPORT, status="failed")]
    found = measured(own, trials=wrong)
    assert outcomes(found, "measurement") == ["beside"] and "wrong results" in found.reason


def test_what_was_not_measured_names_the_command():
    found = measured(claim_text("a", "latency_us", 9, "µs", backend="old", counterpart="hopper", workload="tiny"))
    assert "'flashcore report --backend hopper --problem tiny' measures it" in found.reason
    found = measured(claim_text("a", "latency_us", 9, "µs", counterpart="fa3", workload="tiny"))
    assert "it is not installed" in found.reason
    share = {"workload": "report", "definition": "x", "measure": "make shares"}
    assert "'make shares' measures it" in measured(claim_text("a", "memory_share", 70, "%", **share)).reason
    assert outcomes(measured(claim_text("a", "latency_us", 9, "µs")), "measurement") == ["missing"]


def test_without_a_backend_the_fastest_of_ours_stands_beside():
    (finding,) = measured(claim_text("a", "latency_us", 5, "µs", workload="latency")).of("measurement")
    assert finding.backend == "wmma" and "the fastest of ours" in finding.sentence


def test_a_ratio_is_measured_within_a_round():
    scalar = next(t for t in TRIALS if t.kind == "attention_timing" and t.backend == "scalar" and t.problem == REPORT)
    truth = scalar.timing.latency_us / WMMA.timing.latency_us
    terms = claim_text("slow", "latency_us", 420, "ms", workload="report", backend="scalar")
    terms += claim_text("fast", "latency_us", 73, "ms", workload="report", backend="wmma")
    found = measured(claim_text("r", "speedup", round(truth, 1), "×", of="slow", over="fast"), terms)
    (finding,) = found.of("measurement")
    assert finding.outcome == "confirmed" and finding.against == pytest.approx(truth) and finding.n == 30
    assert found.verdict == "contradicted"  # by its own two terms


def test_the_machine_itself():
    (clock,) = measured(claim_text("a", "clock_ghz", 3.9, "GHz")).of("measurement")
    assert clock.against == pytest.approx(1.98) and clock.outcome == "beside"
    peak = measured(claim_text("a", "peak_tflops", 320, "TFLOPS"))
    assert outcomes(peak, "measurement") == ["contradicted"] and "758" in peak.reason
    assert outcomes(measured(claim_text("a", "sm_count", 132, "SMs")), "measurement") == ["beside"]


def test_records_of_another_kind_stand_beside_a_claim():
    records = '{ kind = "paging", key = "saved", where = { case = "prefix", share = 0.3 } }'
    text = claim_text("a", "memory_share", 70, "%") + f"records = {records}\n"
    data = {"saved": 70.3, "case": "prefix", "share": 0.3, "definition": "resident pages against dense caches."}
    trials = [Trial(kind="paging", environment=synthetic.ENV_ID, data={**data, "case": "mixed", "saved": 1.0}),
              Trial(kind="paging", environment=synthetic.ENV_ID, data=data)]  # fmt: skip
    (finding,) = measured(text, trials=trials).of("measurement")
    assert finding.against == 70.3 and "resident pages against dense caches" in finding.sentence
    assert outcomes(measured(text, trials=trials[:1]), "measurement") == ["missing"]


def test_each_definition_that_records_state_is_a_figure_of_its_own():
    found = shipped_with([*synthetic_paging.memory(), *synthetic_paging.tokens()])
    saved = found["memory-70"].of("measurement")
    assert [f.against for f in saved] == [70.3, 47.1, -0.8] and {f.outcome for f in saved} == {"beside"}
    assert "shared_prefix" in saved[0].sentence and "−0.800 %" in saved[2].sentence
    rates = found["tokens-25k"].of("measurement")
    assert len(rates) == 2 and all("attention only, batch" in f.sentence for f in rates)
    assert "32 layers" in rates[0].sentence and "1 layer, 16 query heads" in rates[1].sentence
    assert {found[name].verdict for name in ("memory-70", "tokens-25k")} == {"undefined"}, "a figure is no definition"


def test_what_was_not_measured_names_the_command_that_measures_it():
    found = shipped_with([])
    for name in ("memory-70", "tokens-25k"):
        (finding,) = found[name].of("measurement")
        assert finding.outcome == "missing" and "'flashcore paging' measures it" in finding.sentence


def shipped_with(trials: list[Trial]) -> dict[str, library.Audit]:
    audits = library.audit(library.load_claims(), trials, environment=synthetic.environment())
    return {audit.claim.id: audit for audit in audits}


# ------------------------------------------------------------------------------------------------ the shipped file

SHIPPED = {
    "cublaslt-tflops": ("confirmed", "arithmetic", "615 ms"),
    "cublaslt-latency": ("confirmed", "arithmetic", "0.45 TFLOPS"),
    "gap-to-target": ("confirmed", "arithmetic", "711.1"),
    "qk-rate": ("contradicted", "arithmetic", "2.75 s"),
    "launches": ("confirmed", "arithmetic", "8,192"),
    "wmma-tflops": ("confirmed", "arithmetic", "73 ms"),
    "wmma-latency": ("confirmed", "arithmetic", "3.75 TFLOPS"),
    "scalar-latency": ("not checkable", None, "No second figure"),
    "wmma-speedup": ("confirmed", "arithmetic", "5.753"),
    "call-270us": ("impossible", "physics", "1,018 TFLOPS"),
    "memory-70": ("undefined", "definition", "no workload and no definition"),
    "tokens-25k": ("undefined", "definition", "which model"),
    "call-5us": ("undefined", "definition", "names no workload"),
    "fa3-450": ("undefined", "definition", "names no workload"),
    "peak": ("contradicted", "physics", "989.4 TFLOPS"),
    "boost-clock": ("impossible", "physics", "1.98 GHz"),
    "sm-count": ("confirmed", "physics", "132"),
    "work": ("confirmed", "arithmetic", "275 GFLOP"),
    "work-total": ("contradicted", "arithmetic", "10.2 times"),
    "work-head": ("confirmed", "arithmetic", "1.07 GFLOP"),
    "work-page": ("confirmed", "arithmetic", "33.55 MFLOP"),
}
RECORDED = data_dir("reports") / "recorded" / "h200"


def shipped(with_records: bool) -> dict[str, library.Audit]:
    if not with_records:
        return {a.claim.id: a for a in library.audit(library.load_claims())}
    environment = RunFolder(RECORDED).environment()
    trials = read_trials(RECORDED / "records.jsonl")
    return {a.claim.id: a for a in library.audit(library.load_claims(), trials, environment=environment)}


@pytest.mark.parametrize("with_records", [False, True], ids=["alone", "with the recorded run"])
def test_the_shipped_claims_fall_or_stand_for_the_right_reason(with_records):
    found = shipped(with_records)
    assert {id_: a.verdict for id_, a in found.items()} == {id_: verdict for id_, (verdict, _, _) in SHIPPED.items()}
    for id_, (verdict, check, words) in SHIPPED.items():
        assert words in found[id_].reason, id_
        if check:
            assert verdict in outcomes(found[id_], check), id_
    assert "256 heads" in found["call-270us"].reason
    assert "73 ms" in found["call-270us"].of("contradiction")[0].sentence
    assert "54,976 TFLOPS" in found["call-5us"].reason


def test_the_shipped_claims_beside_the_recorded_run():
    found = shipped(True)
    assert found["call-270us"].of("measurement")[0].backend == "wmma"
    assert found["wmma-speedup"].of("measurement")[0].against > 5.7
    assert len(found["call-5us"].of("measurement")) == 2
    assert any("best matrix product" in f.sentence for f in found["call-270us"].of("physics"))


def test_the_shipped_gpus_are_what_their_parts_make():
    for gpu in library.load_claims().gpus:
        flop_a_clock = gpu.sm_count * 4096
        assert gpu.peak_tflops["float16"] == pytest.approx(flop_a_clock * gpu.peak_clock_ghz / 1e3, rel=1e-3)
    assert library.load_claims().gpu("H200").is_named("NVIDIA H200")
    assert library.load_claims().gpu("H100 SXM").is_named("NVIDIA H100 80GB HBM3")


# ------------------------------------------------------------------------------------------------ data out


def test_an_audit_is_frozen_plain_data_and_a_record():
    found = shipped(True)["call-270us"]
    with pytest.raises(FrozenInstanceError):
        found.verdict = "confirmed"
    trial = found.to_trial()
    again = Trial.model_validate_json(trial.model_dump_json())
    assert again.kind == "claim" and again.problem == REPORT and again.data == trial.data
    assert again.data["verdict"] == "impossible" and again.data["findings"][0]["check"] == "physics"
    assert set(library.VERDICTS) >= {a.verdict for a in shipped(False).values()}


# ------------------------------------------------------------------------------------------------ bad files

GOOD = claim_text("good", "latency_us", 73, "ms", workload="report")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("[[claim]\n", 1, "not TOML"),
        ("", None, "no claim"),
        ("claim = 3\n", 1, "[[claim]]"),
        (GOOD + "[[clam]]\n", 9, "'clam'"),
        (GOOD + GOOD, 10, "two claims with the id 'good'"),
        (GOOD + "colour = 3\n", 9, "no key 'colour'"),
        (GOOD.replace('source = "nowhere"\n', ""), 1, "'source' is missing"),
        (GOOD.replace('"latency_us"', '"latency"'), 5, "no quantity 'latency'"),
        (GOOD.replace('"ms"', '"hours"'), 1, "not in 'hours'"),
        (GOOD.replace("value = 73", 'value = "73"'), 6, "without quotes"),
        (GOOD.replace("value = 73", "value = true"), 6, "without quotes"),
        (GOOD.replace("value = 73", "value = nan"), 6, "finite"),
        (GOOD.replace("value = 73", "value = -73"), 6, "greater than 0"),
        (GOOD.replace("value = 73", "value = 1e400"), 1, "beyond"),
        (GOOD.replace('"report"', '"reprot"'), 8, "no problem 'reprot'"),
        (GOOD.replace('"report"', '"B=1,H=0,S=8,D=64"'), 8, "greater than 0"),
        (GOOD.replace('"report"', "{ batch = 1, colour = 2 }"), 8, "no 'colour'"),
        (GOOD.replace('"report"', "{ batch = 1 }"), 8, "num_heads_q"),
        (GOOD + 'gpu = "H900"\n', 9, "no gpu 'H900'"),
        (GOOD + 'same_as = "bad"\n', 9, "no claim 'bad'"),
        (GOOD + 'same_as = "good"\n', 9, "itself"),
        (GOOD + 'of = "good"\n', 1, "go together"),
        (GOOD + "factors = [2]\n", 1, "belong to"),
        (GOOD + 'bound = "roughly"\n', 9, "at least"),
        (GOOD + claim_text("b", "clock_ghz", 1, "GHz", same_as=["good"]), 16, "cannot be compared"),
        (GOOD + claim_text("b", "latency_us", 1, "ms", same_as=["good"], workload="tiny"), 16, "another workload"),
        (GOOD + claim_text("b", "tflops", 1, "TFLOPS")
         + claim_text("c", "speedup", 2, "x", of="good", over="b"), 24, "two quantities"),
        (GOOD + claim_text("b", "tflops", 1, "TFLOPS", share=0.5), 9, "there is none"),
        (GOOD + GPU.replace("sm_count = 10\n", ""), 10, "'sm_count' is missing"),
        (GOOD + GPU.replace("l2_mb = 1", "l2_mb = -1"), 10, "positive"),
        (GOOD + GPU.replace("float32", "float8"), 13, "peak_tflops"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_sentence_with_line_and_reason(tmp_path, text, line, said):
    path = tmp_path / "claims.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ClaimsError) as error:
        library.load_claims(path)
    assert said in error.value.reason and (error.value.path, error.value.line) == (str(path), line), error.value
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}{f', line {line}' if line else ''}: ")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ClaimsError, match="cannot be read"):
        library.load_claims(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ClaimsError, match="UTF-8"):
        library.load_claims(tmp_path / "bytes.toml")


def test_a_file_of_one_s_own_knows_the_shipped_gpus_and_may_correct_them(tmp_path):
    path = tmp_path / "claims.toml"
    path.write_text(GOOD + 'gpu = "H200"\n' + GPU.replace('"Toy"', '"H200"'), encoding="utf-8")
    found = library.load_claims(path)
    assert found.gpu("H200").boost_ghz == 2 and found.gpu("H100 SXM") is not None
    assert library.load_claims(shipped_path()).gpu("H200").boost_ghz == 1.98


def test_a_workload_may_be_a_table():
    table = "{ batch = 16, num_heads_q = 16, num_heads_kv = 16, seqlen_q = 2048, seqlen_k = 2048, head_dim = 64 }"
    assert library.parse_claims(GOOD.replace('"report"', table)).claims[0].workload == square(16, 16, 2048, 64)


# ------------------------------------------------------------------------------------------------ whatever comes

_numbers = st.one_of(
    st.integers(1, 10**25).map(str),
    st.floats(1e-300, 1e300).map(repr),
    st.sampled_from(["0.45", "270", "1e-9", "989.4", "1.98", "3.90", "1e200"]),
)
_workloads = st.sampled_from(["report", "latency", "report-causal", "B=1,H=1,Sq=1,Sk=1,D=1",
                              "B=9,H=4,Hkv=2,S=7,D=64,fp32",
                              f"B={10**40},H={10**40},S={10**200},D={10**60}"])  # fmt: skip
_names = st.sampled_from(["wmma", "scalar", "cublaslt-loop", "fa3", "nobody"])


@st.composite
def _claims(draw) -> str:
    texts = []
    for index in range(draw(st.integers(1, 5))):
        quantity = draw(st.sampled_from(sorted(UNITS)))
        unit = draw(st.sampled_from(sorted(UNITS[quantity] or ["things"])))
        keys = {}
        optional = {"workload": _workloads, "backend": _names, "counterpart": _names, "definition": st.just("words"),
                    "bound": st.sampled_from(["at least", "at most"]), "plus_minus": st.sampled_from([0, 0.5, 1e9]),
                    "gpu": st.sampled_from(["Toy"]), "may_mean": st.lists(_workloads, max_size=2),
                    "dtype": st.sampled_from(["float16", "bfloat16", "float32"]), "share": st.sampled_from([0.5, 1.0]),
                    "factors": st.lists(st.floats(1e-9, 1e300), max_size=4)}  # fmt: skip
        for key, values in optional.items():
            if draw(st.booleans()):
                keys[key] = draw(values)
        links = st.sampled_from([f"c{i}" for i in range(5)])
        for group in (["same_as"], ["of", "over"], ["part_of"]):
            if draw(st.integers(0, 2)) == 0:
                keys |= {key: draw(links) for key in group}
        texts.append(claim_text(f"c{index}", quantity, draw(_numbers), unit, **keys))
    return "".join(texts) + GPU


def _some_trials() -> list[Trial]:
    broken = [WMMA.model_copy(update={"timing": WMMA.timing.model_copy(update={"latency_us": v})})
              for v in (math.nan, math.inf, 0.0, -1.0)]  # fmt: skip
    odd = [Trial(kind="ceiling", data={"name": "matmul_fp16", "value": v}) for v in (None, "x", math.nan, True)]
    return [*broken, *odd, Trial(kind="attention_timing"), Trial(kind="paging"), *TRIALS[:60]]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_claims(), st.sampled_from([(), tuple(_some_trials())]), st.sampled_from([{}, ENVIRONMENT, TOY]))
def test_any_claims_are_audited_or_refused_in_words(text, trials, environment):
    try:
        found = library.parse_claims(text)
    except ClaimsError as error:
        assert error.reason.endswith(".") and error.line
        return
    audits = library.audit(found, trials, environment=environment)
    assert [a.claim for a in audits] == list(found)
    for audit in audits:
        assert audit.verdict in library.VERDICTS and audit.reason.endswith((".", ")"))
        json.loads(audit.to_trial().model_dump_json())
        settled = {f.outcome for f in audit.findings} & {"impossible", "contradicted", "undefined", "confirmed"}
        assert (audit.verdict == "not checkable") == (not settled)


@given(st.floats(1e-3, 1e4), st.floats(1.3, 100), st.booleans())
def test_a_planted_contradiction_is_found_and_a_sound_pair_is_not_flagged(rate, factor, planted):
    """A rate, and the time that follows from it or one that is wrong by more than the digits allow."""
    time = REPORT.flops() / rate / 1e12 * (factor if planted else 1.0)
    a = claim_text("a", "tflops", f"{rate:.3e}", "TFLOPS", workload="report")  # four digits, zeros too
    b = claim_text("b", "latency_us", f"{time:.4e}", "s", workload="report", same_as=["a"])
    found = library.audit(library.parse_claims(a + b))
    assert {f.verdict for f in found} == {"contradicted" if planted else "confirmed"}


# ------------------------------------------------------------------------------------------------ the command

runner = CliRunner()


@pytest.fixture(autouse=True)
def _printed_where_the_runner_looks(monkeypatch):
    monkeypatch.setattr(program, "err", Console(stderr=True, highlight=False, soft_wrap=True))
    monkeypatch.setenv("FLASHCORE_DEBUG", "")  # so that it is put back, whatever a command sets
    monkeypatch.delenv("FLASHCORE_DEBUG")


def test_the_command_prints_the_audit_and_ends_with_0_whatever_it_found(run):
    done = runner.invoke(program.app, ["claims", "--run", str(run.path)])
    assert done.exit_code == 0, done.output
    for words in ("Claims, audited", "impossible", "contradicted", "call-270us: 270 µs, impossible", "21 claims:"):
        assert words in done.stdout
    assert "Recorded on NVIDIA H200" in done.stdout


def test_the_command_takes_a_run_of_its_own_and_a_file(tmp_path):
    run = synthetic.write_run(tmp_path / "run", TRIALS, ENVIRONMENT)
    file = tmp_path / "mine.toml"
    file.write_text(claim_text("mine", "latency_us", 0.9, "s", workload="report", backend="wmma"), encoding="utf-8")
    done = runner.invoke(program.app, ["claims", str(file), "--run", str(run.path), "--json"])
    assert done.exit_code == 0
    (trial,) = [Trial.model_validate_json(line) for line in done.stdout.splitlines()]
    assert (trial.kind, trial.data["verdict"]) == ("claim", "contradicted")
    assert "SYNTHETIC H200" in trial.data["reason"]


def test_without_any_run_the_recorded_one_stands_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reporting, "runs_dir", lambda out=None: tmp_path / "runs")
    done = runner.invoke(program.app, ["claims"])
    assert done.exit_code == 0 and "Recorded on NVIDIA H200" in done.stdout


@pytest.mark.parametrize("arguments", [["none.toml"], ["--run", "no-such-run"], ["--nonsense"]], ids=" ".join)
def test_usage_errors_are_exit_code_2_and_one_sentence(arguments):
    done = runner.invoke(program.app, ["claims", *arguments])
    assert done.exit_code == 2 and "Traceback" not in done.output


def test_help_says_what_the_exit_code_means():
    done = runner.invoke(program.app, ["claims", "--help"], terminal_width=200)
    assert "whatever it found" in " ".join(done.stdout.split())


def test_ids_in_the_shipped_file_are_all_expected():
    assert list(SHIPPED) == [claim.id for claim in library.load_claims()]
    assert all(a.id != b.id for a, b in itertools.combinations(library.load_claims(), 2))
