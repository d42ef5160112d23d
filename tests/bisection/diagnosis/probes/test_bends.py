"""Ladders of scores that are bent, and what is added to scores."""

from __future__ import annotations

import pytest
import torch
from support import wrong_attention as zoo
from support.inquiries import CAUSAL, inquiry_of

from flashcore.bisection.diagnosis.probes import bends, keys
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=40, seqlen_k=100, head_dim=64)


def ladders(of):
    return [(at, of(at) - of(at[-1])) for low in (0.0, -10.0, 40.0, 70.0)
            for at in [torch.linspace(low, low + 10, 11, dtype=torch.float64)]]  # fmt: skip


@pytest.mark.parametrize(
    ("of", "bend"),
    [
        (lambda x: x, None),
        (lambda x: 50 * torch.tanh(x / 50), ("tanh", 50.0)),
        (lambda x: x.clamp(-5, 5), ("clip", 5.0)),
        (lambda x: x.clamp(max=47), ("clip above", 47.0)),
        (torch.abs, ("abs", 0.0)),
    ],
)
def test_bent_scores(of, bend):
    found = bends.of_ladder(ladders(of))
    assert (found is None) if bend is None else (found.changes["bend"] == bend)
    assert bends.of_ladder(ladders(lambda x: x.sign() * x.abs().sqrt())) is None


def test_what_is_added_to_scores():
    row, key = torch.arange(40)[:, None] + 60, torch.arange(100)[None]
    far = (row - key).abs().double()
    found = bends.of_bias((-0.1 * far).expand(8, -1, -1), PROBLEM)
    assert found.name == "bias by distance" and "-0.1 for each key" in found.sentence
    per_head = -far * torch.linspace(0.1, 0.8, 8)[:, None, None].double()
    assert "-0.1 in the first head, -0.8 in the last" in bends.of_bias(per_head, PROBLEM).sentence
    one = torch.zeros(8, 40, 100).double()
    one[7, 39, 99] = 0.25
    assert "0.25 is added to the score of key 99 in row 39 of batch 1, head 3" in bends.of_bias(one, PROBLEM).sentence


def test_a_ladder_shows_a_cap():
    inquiry = inquiry_of(zoo.capped)
    assert "a softcap that nobody asked for" in bends.ladder(inquiry) and inquiry.state.bend[0] == "tanh"
    assert bends.ladder(inquiry_of(zoo.two_pass)) is None


def test_scores_below_0_that_are_lost():
    inquiry = inquiry_of(zoo.relu_of_scores)
    assert "scores below 0 become 0" in bends.ladder(inquiry) and inquiry.state.bend == ("relu", 0.0)
    assert not inquiry.unexplained()


def test_a_softcap_that_bends_the_mask_too():
    inquiry = inquiry_of(zoo.capped_after_the_mask, CAUSAL.with_(seqlen_q=100), ("normal", "outlier"))
    keys.hidden(inquiry)
    assert [h.name for h in inquiry.found] == ["mask too small"], "so it looks until the cap is known"
    assert "the cap is taken of hidden keys too: their -inf becomes -30" in bends.ladder(inquiry)
    assert [h.name for h in inquiry.found] == ["softcap not asked for", "cap after the mask"]
    assert inquiry.state.masked_score == -30.0
    assert not inquiry.unexplained()
    inquiry = inquiry_of(lambda q, k, v: zoo.capped_after_the_mask(q, k, v))
    assert bends.ladder(inquiry) and [h.name for h in inquiry.found] == ["softcap not asked for"]
