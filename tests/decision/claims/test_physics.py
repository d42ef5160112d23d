"""Claims against the data sheet of a GPU."""

from __future__ import annotations

import math

import pytest
from support.made_up_claims import GPU, TOY, claim_text, one, outcomes

from flashcore.decision import claims as library
from flashcore.decision.claims.physics import memory_us, physics
from flashcore.problem import PRESETS, parse_problem, square


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
    assert "Were B=16" in found.reason and "beyond the data sheet" in found.reason


CLOCKED = GPU.replace("boost_ghz = 2", "boost_ghz = 2\npeak_clock_ghz = 1.6")
"""Its peak of 100 TFLOPS is counted at 1.6 GHz, so that the highest clock would allow 125."""


@pytest.mark.parametrize(("rate", "said"), [(120, "125 TFLOPS, and the claim 96.0 %"), (130, None), (90, None)])
def test_a_rate_that_only_the_highest_clock_would_allow_is_told_so(rate, said):
    claim = claim_text("a", "tflops", rate, "TFLOPS", workload="report", gpu="Toy")
    claims = library.parse_claims(claim + CLOCKED)
    first, *more = physics(claims.claims[0], claims.gpu("Toy"))
    assert first.outcome == ("impossible" if rate > 100 else "possible")
    assert [f.outcome for f in more] == (["beside"] if said else [])
    assert not said or said in more[0].sentence


def test_without_the_clock_of_the_peak_nothing_is_said_of_clocks():
    claims = library.parse_claims(claim_text("a", "tflops", 120, "TFLOPS", workload="report", gpu="Toy") + GPU)
    assert [f.outcome for f in physics(claims.claims[0], claims.gpu("Toy"))] == ["impossible"]


def test_the_bytes_that_do_not_fit_the_l2_take_their_time():
    (gpu,) = library.parse_claims(claim_text("a", "count", 1, "x") + GPU).gpus  # 1 TB/s and 1 MB of L2
    problem = square(1, 1, 8192, 64)
    assert memory_us(problem, gpu) == pytest.approx((problem.bytes() - 1e6) / 1e6)
    assert memory_us(square(1, 1, 16, 64), gpu) == 0.0
    assert memory_us(parse_problem(f"B={10**200},H={10**200},S=1,D=64"), gpu) == math.inf


def test_a_dtype_that_the_data_sheet_leaves_out_bounds_nothing():
    found = one(claim_text("a", "tflops", 1e5, "TFLOPS", workload="report", dtype="bfloat16"))
    assert outcomes(found, "physics") == ["missing"] and found.verdict == "not checkable"
    assert "no bfloat16 peak of the Toy" in found.of("physics")[0].sentence
    assert one(claim_text("a", "peak_tflops", 5, "TFLOPS", dtype="bfloat16")).of("physics") == ()


def test_the_figures_of_a_finding_are_the_rate_and_its_roof():
    (found,) = one(claim_text("a", "latency_us", 2.5, "ms", workload="report")).of("physics")
    rate = PRESETS["report"].flops() / 2500 / 1e6
    assert (found.claimed, found.against, found.unit) == (pytest.approx(rate), 100.0, "TFLOPS")
