"""`parallel.gradients`: what every rank gets for its shards is what the whole attention gives, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from support.ranks import CASES, GRADIENTS, Case, put_together


def expected(case: Case, with_lse: bool) -> tuple[torch.Tensor, ...]:
    """Gradients of the whole, by torch's own autograd through the definition, in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in case.inputs()]
    q, (k, v) = leaves[0], (one.repeat_interleave(case.heads[0] // case.heads[1], 1) for one in leaves[1:])
    to_out, to_lse = (tensor.double() for tensor in case.cotangents())
    scores = q @ k.mT * (1 / math.sqrt(case.head_dim) if case.scale is None else case.scale)
    seen = torch.ones(case.seqlens, dtype=torch.bool)
    if case.causal:
        seen = seen.tril(case.seqlens[1] - case.seqlens[0])
    rows = seen.any(1)  # the others see no key: their out is 0
    scores = scores.masked_fill(~seen, -math.inf)[:, :, rows]
    total = (scores.softmax(-1) @ v * to_out[:, :, rows]).sum()
    if with_lse:
        total = total + (scores.logsumexp(-1) * to_lse[:, :, rows]).sum()
    return torch.autograd.grad(total, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_the_whole(ranks, name, with_lse):
    case = CASES[name]
    got = [ranks[rank]["cases"][name, "gradients"][with_lse] for rank in range(case.ranks)]
    lengths = case.seqlens[0], case.seqlens[1], case.seqlens[1]
    for number, truth in enumerate(expected(case, with_lse)):
        found = put_together([one[number] for one in got], lengths[number])
        torch.testing.assert_close(found.double(), truth, atol=5e-6, rtol=5e-6)
