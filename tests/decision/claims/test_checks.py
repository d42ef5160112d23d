"""Claims against arithmetic, against each other, and against what they leave undefined."""

from __future__ import annotations

import pytest
from support.made_up_claims import audited, claim_text, one, outcomes

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
