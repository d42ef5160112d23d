"""How much a behaviour predicts of a wrong call, and where a bound is too wide to say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support import wrong_attention as zoo

from flashcore.bisection.diagnosis import predicting
from flashcore.bisection.diagnosis.behaviour import RIGHT
from flashcore.bisection.diagnosis.calling import candidate_of
from flashcore.bisection.diagnosis.screening import Inputs, screen_one
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=70, seqlen_k=150, head_dim=32)


def wrong(function):
    candidate = candidate_of(function, device="cpu")
    return candidate, screen_one(candidate, Inputs(PROBLEM))


def test_a_prediction_of_the_truth_explains_nothing():
    candidate, one = wrong(zoo.scaled_twice)
    truth = one.inputs.case(candidate).out
    assert predicting.share_of(one.answer.out, truth, one, candidate)[:2] == (0.0, 0)
    assert predicting.share_of(one.answer.out, one.answer.out, one, candidate)[0] == 1.0


def test_a_behaviour_explains_a_call_or_does_not():
    candidate, one = wrong(zoo.scaled_twice)
    assert predicting.explains(candidate, RIGHT.with_(scale_factor=PROBLEM.scale), one)
    assert not predicting.explains(candidate, RIGHT, one)
    assert not predicting.explains(candidate, RIGHT.with_(scale_factor=0.9), one)
    right, fine = wrong(zoo.two_pass)
    assert predicting.explains(right, RIGHT, fine)


@pytest.mark.parametrize(("pattern", "blunt"), [("normal", False), ("large", True), ("rising", False)])
def test_a_bound_as_wide_as_the_output_is_blunt(pattern, blunt):
    candidate = replace(candidate_of(zoo.two_pass, device="cpu"), rounds_scores=True)
    one = screen_one(candidate, Inputs(PROBLEM.with_(head_dim=64), pattern))
    assert predicting.is_blunt(one, candidate) is blunt
    assert not predicting.is_blunt(one, candidate_of(zoo.two_pass, device="cpu"))
