"""Factors of the scores, matrices between Q and K, and slopes that differ."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore.bisection.diagnosis.probes import scales
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=40, seqlen_k=100, head_dim=64)


@pytest.mark.parametrize(
    ("factor", "name"),
    [
        (1.001, None), (8.0, "scale missing"), (0.125, "scale twice"), (math.log(2), "base 2 for e"),
        (1 / math.log(2), "log2(e) twice"), (math.sqrt(64 / 96), "scale of another head_dim"),
        (1 / 8, "scale twice"), (-1.0, "scores negated"), (1.7, "scale wrong"), (4.0, "scale of another size"),
    ],
)  # fmt: skip
def test_factors(factor, name):
    found = scales.of_factor(factor, PROBLEM)
    assert (found and found.name) == name
    if found:
        assert abs(found.changes["scale_factor"] / factor - 1) < 0.004


def test_scores_that_count_for_nothing():
    assert scales.of_factor(1e-9, PROBLEM).name == "scores without influence"


def test_matrices_of_scores():
    scale = PROBLEM.scale
    assert scales.of_metric(torch.eye(64).double() * scale * 3, PROBLEM) is None
    half = torch.eye(64).double() * scale
    half[32:] = 0
    assert scales.of_metric(half, PROBLEM).sentence == "columns 32 to 63 of head_dim are left out of the products"
    assert scales.of_metric(torch.eye(64).double().roll(8, 0) * scale, PROBLEM).name.endswith("in another order")
    assert scales.of_metric(torch.ones(64, 64).double() * scale, PROBLEM).name == "columns of head_dim mixed"


def test_slopes_that_differ():
    even = {"heads": torch.ones(8), "rows": torch.ones(40), "keys": torch.ones(7)}
    assert list(scales.of_slopes(even, PROBLEM)) == []
    keys = torch.ones(7)
    keys[4:] = 8.0
    found = next(scales.of_slopes({**even, "keys": keys}, PROBLEM))
    assert "the scores of keys 64 to 99 are 8 times the right ones: the scale is missing" in found.sentence
    assert found.changes["factors"].tolist() == [1.0] * 64 + [8.0] * 36
    found = next(scales.of_slopes({**even, "heads": keys.new_tensor([1, 1, 1, 2, 1, 1, 1, 2])}, PROBLEM))
    assert "of 2 of 8 heads (the first: batch 0, head 3) are 2 times" in found.sentence


def test_constants_in_few_digits():
    assert "log2(e) is taken for 1.44" in scales.of_factor(1.44 * math.log(2), PROBLEM).sentence
    other = PROBLEM.with_(softmax_scale=0.3)
    rounded = float(torch.tensor(0.3, dtype=torch.bfloat16))
    assert "the scale is rounded to bfloat16" in scales.of_factor(rounded / 0.3, other).sentence
    assert scales.of_factor(1.0005, PROBLEM) is None
