"""The test on samples: its words are right where the truth is known."""

from __future__ import annotations

import math
import random

import pytest
from support.synthetic_history import snapshot, words

from flashcore.history import interval


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


def test_unchanged_code_is_hardly_ever_called_changed():
    wrong = total = 0
    for seed in range(20):
        found = words(snapshot(f"before {seed}", noise=0.02), snapshot(f"now {seed}", noise=0.02))
        wrong += found["faster"] + found["slower"]
        total += found.total()
    assert total == 240 and wrong <= 1


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
