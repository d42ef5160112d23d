"""Attention made to order is what it says: its mass lies where the pattern puts it, by seed."""

from __future__ import annotations

import pytest
import torch
from support.attention_patterns import PATTERN, probabilities

from flashcore.errors import InvalidProblem, UnknownName
from flashcore.paging import make_attention


@pytest.mark.parametrize("scale", [None, 0.5, -0.2])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_patterns_are_what_they_say(scale, dtype):
    problem = PATTERN.with_(softmax_scale=scale, dtype=dtype)
    needle = probabilities("needle", problem)
    assert (needle.amax(-1) > 0.8).all() and needle[..., 256:1024].sum(-1).min() > 0.8
    peaked = probabilities("peaked", problem).sort(descending=True).values
    assert (peaked[..., :16].sum(-1) > 0.8).all() and (peaked[..., 0] < 0.2).all()
    diffuse = probabilities("diffuse", problem)
    assert (diffuse.amax(-1) < 0.05).all()
    by_tenths = probabilities("drifting", problem)[..., -2000:].unflatten(-1, (10, 200)).sum(-1).mean(dim=(0, 1))
    assert (by_tenths.diff() > 0).all() and by_tenths[-3:].sum() > 0.8


def test_a_seed_gives_the_same_numbers_and_another_gives_others():
    first, again, other = (make_attention(PATTERN, "peaked", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert [t.shape for t in first] == [(1, 8, 1, 64), (1, 2, 2048, 64), (1, 2, 2048, 64)]


def test_wrong_patterns():
    with pytest.raises(
        UnknownName, match="no attention pattern 'flat'; choose one of: peaked, diffuse, drifting, needle"
    ):
        make_attention(PATTERN, "flat")
    with pytest.raises(InvalidProblem, match="channels is 65"):
        make_attention(PATTERN, "needle", channels=65)
    with pytest.raises(InvalidProblem, match="softmax_scale is 0"):
        make_attention(PATTERN.with_(softmax_scale=0.0), "needle")


def test_values_of_keys_that_stand_out_are_three_times_as_long():
    problem = PATTERN.with_(batch=8, head_dim=128)
    _, k, v = make_attention(problem, "needle")
    longest = k.float().norm(dim=-1).argmax(dim=-1)  # the gain makes the needle the longest key by far
    lengths = v.float().norm(dim=-1)
    needle = lengths.gather(-1, longest[..., None]).squeeze(-1)
    ratio = needle / lengths.median(dim=-1).values
    assert ((ratio > 2.3) & (ratio < 3.7)).all() and ratio.mean() == pytest.approx(3.0, abs=0.2)


@pytest.mark.parametrize(("channels", "entries"), [(1, 1), (4, 4), (64, 64)])
def test_queries_of_a_group_look_along_so_many_channels(channels, entries):
    q, _, _ = make_attention(PATTERN.with_(num_heads_q=32), "diffuse", channels=channels)
    direction = q.float().view(2, 16, 64).mean(dim=1) * PATTERN.scale  # their own noise averages out
    strong = direction.abs() > 0.5 / channels**0.5
    assert strong.sum(dim=-1).tolist() == [entries, entries]
    torch.testing.assert_close(direction.norm(dim=-1), torch.ones(2), rtol=0.1, atol=0.0)


def test_fewer_keys_than_peaks():
    probs = probabilities("peaked", PATTERN.with_(seqlen_k=5))
    torch.testing.assert_close(probs.sum(-1), torch.ones(1, 8, dtype=torch.float64))
    assert (probs > 0.1).all(), "all five stand out alike"
