"""Claims against the data sheet of a GPU."""

from __future__ import annotations

import pytest
from support.made_up_claims import TOY, claim_text, one, outcomes


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
