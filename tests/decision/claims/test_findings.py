"""Intervals and words that every check of a claim uses."""

from __future__ import annotations

import math

import pytest
from support.made_up_claims import claim_text

from flashcore.decision.claims import Claim, parse_claims
from flashcore.decision.claims.findings import apart, divided, dtype_of, latency_us, time_words, work, work_words
from flashcore.problem import parse_problem, square


def test_intervals():
    assert apart((1, 2), (3, 4)) and apart((3, 4), (1, 2)) and not apart((1, 3), (3, 4))
    assert divided((2, 4), (1, 2)) == (1, 4)
    assert divided((2, math.inf), (1, 2)) == (1, math.inf) and divided((2, 4), (0, 1)) == (2, math.inf)
    assert divided((1, 1), (5, math.inf)) == (0, 0.2)


@pytest.mark.parametrize(
    ("us", "words"),
    [(0.5, "0.500 µs"), (999.0, "999 µs"), (1000.0, "1.00 ms"), (999_000.0, "999 ms"), (2_500_000.0, "2.50 s")],
)
def test_a_time_has_the_unit_of_its_size(us, words):
    assert time_words(us) == words


@pytest.mark.parametrize(
    ("flop", "words"), [(5e5, "0.500 MFLOP"), (2.5e8, "250 MFLOP"), (1e9, "1.00 GFLOP"), (2.748e12, "2.75 TFLOP")]
)
def test_work_has_the_unit_of_its_size(flop, words):
    assert work_words(flop) == words
    assert work_words(33_554_432, 4) == "33.55 MFLOP"


def claim(quantity: str, value, unit: str, **keys) -> Claim:
    return parse_claims(claim_text("a", quantity, value, unit, **keys)).claims[0]


def test_work_is_a_share_of_the_problems_flops_or_beyond_reckoning():
    problem = square(2, 4, 128, 64)
    assert work(problem) == problem.flops() == 4 * 2 * 4 * 128 * 128 * 64
    assert work(problem, 0.25) == problem.flops() / 4
    assert work(parse_problem(f"B={10**40},H={10**40},S={10**200},D={10**60}")) == math.inf


def test_a_claim_of_speed_allows_an_interval_of_times():
    problem = square(1, 1, 500, 500)  # 0.5 GFLOP
    assert latency_us(claim("latency_us", 2, "ms", bound="at most"), None) == (0.0, 2000.0)
    fast = claim("tflops", "2.0", "TFLOPS")
    assert latency_us(fast, problem) == pytest.approx((500 / 2.05, 500 / 1.95))
    assert latency_us(claim("tflops", 2, "TFLOPS", bound="at least"), problem) == (0.0, 250.0)
    assert latency_us(claim("tflops", 2, "TFLOPS", bound="at most"), problem) == (250.0, math.inf)


def test_a_rate_without_a_workload_or_beyond_reckoning_allows_no_time_to_be_told():
    assert latency_us(claim("tflops", 2, "TFLOPS"), None) is None
    huge = parse_problem(f"B={10**40},H={10**40},S={10**200},D={10**60}")
    assert latency_us(claim("tflops", 2, "TFLOPS"), huge) is None
    assert latency_us(claim("clock_ghz", 2, "GHz"), square(1, 1, 500, 500)) is None


def test_the_dtype_is_the_claims_own_else_its_workloads_else_half():
    assert dtype_of(claim("tflops", 2, "TFLOPS", dtype="float32", workload="report")) == "float32"
    assert dtype_of(claim("tflops", 2, "TFLOPS", workload="B=1,H=1,S=8,D=64,bf16")) == "bfloat16"
    assert dtype_of(claim("tflops", 2, "TFLOPS")) == "float16"
