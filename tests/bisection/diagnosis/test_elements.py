"""Elements that are taken for others: each way does what its name says, and what is right stays as it is."""

from __future__ import annotations

import pytest
import torch

from flashcore.bisection.diagnosis.elements import FEWER_BITS, as_contiguous, scrambled
from flashcore.problem import Problem

PROBLEM = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=6, seqlen_k=6, head_dim=8)
T = torch.arange(2 * 4 * 6 * 8, dtype=torch.float64).view(2, 4, 6, 8)


def test_offsets_wrap_in_the_whole_tensor_or_in_each_head():
    assert torch.equal(scrambled(T, "wrapped at 100", PROBLEM).flatten(), T.flatten() % 100)
    inside = scrambled(T, "wrapped in a head at 16", PROBLEM)
    assert torch.equal(inside[1, 2, :, :], T[1, 2, :2].repeat(3, 1))
    round_ = scrambled(T, "written round at 100", PROBLEM).flatten()
    assert round_[0] == 300 and round_[83] == 383 and round_[84] == 284 and not round_[100:].any()
    for how in ("wrapped at 384", "wrapped in a head at 48", "written round at 384"):
        assert torch.equal(scrambled(T, how, PROBLEM), T)


def test_orders_and_turns():
    assert torch.equal(scrambled(T, "reshaped", PROBLEM)[0, 0, 0], T[0, 0].flatten()[::6])
    pairs, halves = scrambled(T, "rotated in pairs", PROBLEM), scrambled(T, "rotated", PROBLEM)
    assert torch.allclose(pairs.norm(dim=-1), T.norm(dim=-1)) and torch.equal(halves[:, :, 0], T[:, :, 0])
    assert not torch.allclose(pairs.sort(-1).values, halves.sort(-1).values)
    assert torch.allclose(scrambled(T + 1, "normed", PROBLEM).square().mean(-1), torch.ones(2, 4, 6).double())
    small = scrambled(T * 0 + 1e-3, "normed with 1e-06", PROBLEM)
    assert torch.allclose(small, torch.full_like(small, 2**-0.5))
    with pytest.raises(ValueError, match="no such way"):
        scrambled(T, "turned over", PROBLEM)


@pytest.mark.parametrize("kind", FEWER_BITS)
def test_fewer_bits_stay_near_and_are_fewer(kind):
    given = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rounded = scrambled(given, f"in {kind}", PROBLEM)
    off = (rounded - given).abs()
    most = 0.13 * given.abs() + 1e-3 if kind.startswith("float8") else given.abs().max() * 0.005 + 0 * off
    assert bool((off <= most).all()) and bool(off.any())
    assert torch.allclose(scrambled(rounded, f"in {kind}", PROBLEM), rounded, rtol=1e-12, atol=0)


def test_memory_that_is_taken_for_contiguous():
    turned = T.transpose(1, 2)
    assert torch.equal(as_contiguous(turned).flatten(), T.flatten()) and torch.equal(as_contiguous(T), T)
