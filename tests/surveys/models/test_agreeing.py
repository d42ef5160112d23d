"""Tokens are compared where more than noise decides them, and what is wrong is wrong all the same."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore.surveys.models.agreeing import Agreement, agreement, expected, largest_difference, together

EXACT = torch.tensor([[4.0, 1.0, 0.0], [4.0, 3.9, 0.0], [0.0, 1.0, 3.0]])


@pytest.fixture
def wanted():
    """Noise of 0.1: the second row's margin of 0.1 is no decision, the others' of 3 and 2 are."""
    default = EXACT.clone()
    default[0, 2] += 0.1
    return expected(EXACT, default)


def test_noise_is_what_two_right_ways_differ_by(wanted):
    assert wanted.noise == pytest.approx(0.1) and wanted.decided.tolist() == [True, False, True]
    assert expected(EXACT, EXACT).noise == pytest.approx(4.0 * torch.finfo(torch.float32).eps)
    rough = EXACT.bfloat16()
    assert expected(rough, rough).noise == 4.0 * torch.finfo(torch.bfloat16).eps, "a rounding of the largest logit"


def test_an_undecided_token_may_be_another(wanted):
    logits = EXACT.clone()
    logits[1] = torch.tensor([3.92, 3.96, 0.0])
    found = agreement(wanted, logits)
    assert (found.positions, found.decided, found.agreed, found.wrong) == (3, 2, 2, None)
    assert found.worst == pytest.approx(0.08) and found.data()["noise"] == pytest.approx(0.1)


def test_a_decided_token_may_not(wanted):
    logits = EXACT.clone()
    logits[2] = torch.tensor([0.0, 3.1, 3.0])
    assert agreement(wanted, logits).wrong == "1 of 2 decided tokens are others"


def test_numbers_that_lie_too_far_off_are_wrong_although_tokens_agree(wanted):
    logits = EXACT.clone()
    logits[0, 2] -= 0.5
    assert agreement(wanted, logits).wrong == "a logit lies 0.5 off, and the noise of torch's own attention is 0.1"
    logits[0, 2] = math.nan
    found = agreement(wanted, logits)
    assert math.isnan(found.worst) and found.wrong
    assert math.isnan(largest_difference(EXACT, logits))


def test_several_comparisons_are_one():
    right, close = Agreement(3, 2, 2, 0.1, 0.1), Agreement(5, 5, 5, 0.3, 0.1)
    off, none = Agreement(1, 0, 0, 0.9, 0.1), Agreement(1, 1, 1, math.nan, 0.1)
    assert together([right, close]) == Agreement(8, 7, 7, 0.3, 0.1)
    assert together([off, close, right]).wrong and together([right, none, off]).wrong
    assert together([right, close]).wrong is None
