"""How far a figure lies from turning its condition over: the arithmetic, and the words."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.decisions import result

from flashcore.decision import flips

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
        assert change.relative == pytest.approx((threshold - measured) / threshold)
    if far.endswith("times"):
        assert float(far.split()[0].replace(",", "")) == pytest.approx(threshold / measured, rel=0.06)
    elif far.endswith("% of the threshold"):
        percent = float(far.removesuffix(" % of the threshold").replace(",", ""))
        assert percent == pytest.approx(abs(found.margin_percent), abs=0.051), "the margin, on the one basis"
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
    kept = replace(result(100.0, 100, "at least", metric="kept_percent"), n=9000)
    assert flips.change(kept).words == "one of the 9,000 cases behind 'X' broke"


def test_a_figure_has_as_many_digits_as_tell_it_from_its_threshold():
    assert flips.apart(4.9, 5.0) == "4.90" and flips.apart(5.0, 5.0) == "5.00"
    assert flips.apart(4.999, 5.0) == "4.999" and flips.apart(4.99996, 5.0) == "4.99996"
    assert flips.apart(4.9999999, 5.0) == "4.9999999", "and when six do not, all of them"


def test_a_figure_of_nothing_has_a_distance_in_its_unit_and_no_share():
    found = flips.change(result(0.0, 5.0, "at least"))
    assert found.relative == 1.0 and found.distance == math.inf and "(by 5.00 µs)" in found.words
    bytes_spilled = replace(result(0.0, 0.0, "at most", metric="data.spill_bytes"), unit="bytes")
    found = flips.change(bytes_spilled)
    assert found.relative is None
    assert found.distance is None and found.figures == "0 to above 0 bytes (it has no margin)"


@pytest.mark.parametrize(
    ("metric", "subject"),
    [("tflops", "hopper's speed at B=16, H=16, S=2048, D=64"), ("latency_us", "hopper's latency at "),
     ("ratio_to_best_peer", "hopper's speed against fa3 at "), ("data.saved_percent", "the figure behind 'X'"),
     ("correct_percent", "the share of right checks behind 'X'")],
)  # fmt: skip
def test_whose_figure_it_is_stands_before_it(metric, subject):
    found = flips.change(replace(result(3.0, 10, "at least", metric=metric), versus="fa3"))
    assert found.words.startswith(subject) and found.words.endswith(f"rose from {found.figures}")


def test_what_is_not_settled_or_not_measured_has_no_change():
    assert flips.change(replace(result(3.0, 10, "at least"), state="INCONCLUSIVE")) is None
    assert flips.change(replace(result(3.0, 10, "at least"), measured=None)) is None


def test_what_has_no_distance_comes_last_either_way():
    near, far, none = (flips.change(result(v, 10, "at least")) for v in (11.0, 90.0, 10.0))
    assert flips.nearest_first([none, far, near]) == [near, far, none]
    assert flips.farthest_first([none, near, far]) == [far, near, none]
