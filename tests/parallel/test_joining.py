"""`parallel.joining`: parts joined are the whole, and a part without keys changes no bit."""

from __future__ import annotations

import math

import torch

from flashcore.parallel.joining import join


def part(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 out and lse of some keys, from float64."""
    lse = torch.logsumexp(scores, -1)
    return (torch.exp(scores - lse[..., None]) @ values).float(), lse.float()


def test_parts_joined_are_attention_over_all_keys():
    scores, values = 3 * torch.randn(2, 50, 90, dtype=torch.float64), torch.randn(2, 90, 16, dtype=torch.float64)
    out, lse = part(scores[..., :20], values[:, :20])
    for some in (slice(20, 21), slice(21, 90)):
        join(out, lse, *part(scores[..., some], values[:, some]))
    truth, true_lse = part(scores, values)
    torch.testing.assert_close(out, truth, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(lse, true_lse, atol=1e-6, rtol=1e-6)


def test_a_part_without_keys_changes_nothing_and_the_first_with_keys_is_taken_as_it_is():
    out, lse = torch.randn(5, 8), torch.randn(5) * 40
    nothing = torch.zeros(5, 8), torch.full((5,), -math.inf)
    kept = out.clone(), lse.clone()
    join(out, lse, *nothing)
    assert torch.equal(out, kept[0]) and torch.equal(lse, kept[1])
    empty = nothing[0].clone(), nothing[1].clone()
    join(*empty, out, lse)
    assert torch.equal(empty[0], out) and torch.equal(empty[1], lse)
    both = nothing[0].clone(), nothing[1].clone()
    join(*both, *nothing)
    assert torch.equal(both[0], nothing[0]) and torch.equal(both[1], nothing[1])


def test_nan_stays_nan_and_is_not_taken_for_a_row_without_keys():
    out, lse = torch.ones(2, 4), torch.zeros(2)
    join(out, lse, torch.full((2, 4), math.nan), torch.tensor([math.nan, 0.0]))
    assert bool(out.isnan().all()) and bool(lse[0].isnan()) and not bool(lse[1].isnan())
