"""The test on samples: its words are right where the truth is known."""

from __future__ import annotations

import math
import random

import pytest
from support.synthetic_history import snapshot, words

from flashcore.page.history import interval


@pytest.mark.parametrize(("faster", "word"), [(1.05, "faster"), (0.95, "slower"), (1.0, "same")])
def test_five_percent_with_little_noise_is_seen_everywhere(faster, word):
    found = words(snapshot("before"), snapshot(faster=faster))
    assert found[word] == found.total() == 12


def test_under_one_percent_is_no_change_however_narrow_the_interval():
    found = words(snapshot("before", noise=0.0), snapshot(faster=1.009, noise=0.0))
    assert found == {"same": 12}
    assert words(snapshot("before", noise=0.0), snapshot(faster=1.02, noise=0.0)) == {"faster": 12}


@pytest.mark.parametrize("faster", [1.01, 0.99, 1.0])
def test_one_percent_with_five_percent_of_noise_is_never_called_a_change(faster):
    found = words(snapshot("before", noise=0.05), snapshot(faster=faster, noise=0.05))
    assert found["too noisy to say"] + found["same"] == found.total() == 12
    assert found["too noisy to say"] >= 8


@pytest.mark.slow
def test_unchanged_code_is_hardly_ever_called_changed():
    wrong = total = 0
    for seed in range(10):
        found = words(snapshot(f"before {seed}", noise=0.02), snapshot(f"now {seed}", noise=0.02))
        wrong += found["faster"] + found["slower"]
        total += found.total()
    assert total == 120 and wrong <= 1


@pytest.mark.slow
def test_an_interval_holds_the_median_about_as_often_as_it_says():
    rng, held = random.Random(1), 0
    for _ in range(400):
        found = interval.figure([rng.gauss(10, 1) for _ in range(30)], side="now")
        held += found.low <= 10 <= found.high
    assert 0.97 <= held / 400


@pytest.mark.parametrize("samples", [[], [1.0] * 6, [1.0] * 30 + [math.nan], [1.0] * 30 + [0.0], [1.0, math.inf] * 9])
def test_samples_that_cannot_say_give_no_interval(samples):
    assert interval.figure(samples, side="now") is None


def test_too_few_peers_leave_the_usual_drift():
    found = interval.change(*[interval.Figure(1.0, 0.99, 1.01, 30)] * 2, drift=0.0)
    assert interval.drift([found] * 3) == interval.USUAL_DRIFT
    assert interval.drift([found] * interval.FEWEST_CONTROLS) == 0.0


@pytest.mark.parametrize(
    ("value", "low", "high", "word"),
    [
        (1.05, 1.01, 1.09, "faster"), (0.95, 0.91, 0.99, "slower"), (1.0, 0.99, 1.01, "same"),
        (1.005, 1.001, 1.009, "same"),  # apart, and less than what matters to anybody
        (1.05, 1.0, 1.1, "too noisy to say"), (1.0, 0.96, 1.01, "too noisy to say"), (1.0, 0.97, 1.03, "same"),
    ],
)  # fmt: skip
def test_the_word_follows_from_the_interval(value, low, high, word):
    assert interval.Change(value, low, high, 0.0).word == word


def test_a_change_runs_from_the_worst_pairing_to_the_best_and_is_widened_by_the_drift():
    before, now = interval.Figure(10.0, 9.0, 12.0, 30), interval.Figure(20.0, 18.0, 24.0, 30)
    found = interval.change(before, now, drift=0.0)
    assert (found.value, found.low, found.high) == (2.0, 18 / 12, 24 / 9)
    wider = interval.change(before, now, drift=0.5)
    assert (wider.low, wider.high) == pytest.approx((1.0, 4.0)) and wider.word == "too noisy to say"


def test_figures_too_far_apart_for_a_ratio_have_no_change():
    small, great = interval.Figure(5e-324, 5e-324, 5e-324, 9), interval.Figure(1e308, 1e308, 1e308, 9)
    assert interval.change(small, great, drift=0.0) is None and interval.change(great, small, drift=0.0) is None


@pytest.mark.parametrize(("low", "high", "excess"), [(0.9, 1.1, 0.0), (1.2, 1.3, 0.2), (0.4, 0.5, 1.0)])
def test_excess_is_what_lies_between_the_interval_and_no_change(low, high, excess):
    assert interval.Change(1.0, low, high, 0.0).excess == pytest.approx(excess)


def test_one_peer_that_went_astray_does_not_make_the_drift():
    calm, astray = interval.Change(1.0, 0.99, 1.01, 0.0), interval.Change(2.0, 1.9, 2.1, 0.0)
    assert interval.drift([calm] * 39 + [astray]) == 0.0
    assert interval.drift([astray] * 40) == pytest.approx(0.9)
    assert interval.drift([]) == interval.USUAL_DRIFT


def test_a_figure_is_the_median_and_uses_only_the_first_samples_of_a_long_list():
    found = interval.figure([3.0, 1.0, 2.0, 5.0, 4.0, 7.0, 6.0], side="now")
    assert found.value == 4.0 and 1.0 <= found.low < 4.0 < found.high <= 7.0 and found.n == 7
    long = [1.0] * interval.MOST_SAMPLES + [9.0] * 5000
    assert interval.figure(long, side="before") == interval.Figure(1.0, 1.0, 1.0, interval.MOST_SAMPLES)
