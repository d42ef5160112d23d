"""The same bits again, beside other neighbours, alone; and inputs that stay."""

from __future__ import annotations

import torch
from support import wrong_attention as zoo

from flashcore.bisection.diagnosis.calling import candidate_of
from flashcore.bisection.diagnosis.promises import bits
from flashcore.bisection.diagnosis.promises.asking import Asked
from flashcore.problem import Problem

HOME = Problem(batch=2, num_heads_q=4, num_heads_kv=2, seqlen_q=9, seqlen_k=17, head_dim=16)


def by_batch_and_head(q, k, v):
    """Every head by products of its own, so that nothing hangs on the number of them."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    each = [[zoo.two_pass(*(t[b : b + 1, h : h + 1] for t in (q, k, v))) for h in range(q.shape[1])]
            for b in range(q.shape[0])]  # fmt: skip
    return torch.cat([torch.cat(row, dim=1) for row in each])


def of(function):
    return candidate_of(function, device="cpu")


def test_bits_that_come_again_and_bits_that_do_not():
    asked = Asked(HOME, HOME)
    assert bits.repeats(of(by_batch_and_head), asked) is None
    assert "elements of out have other bits" in bits.repeats(of(zoo.a_race), asked)


def test_bits_that_hang_on_neighbours():
    def shifted_by_all(q, k, v):
        return (by_batch_and_head(q, k, v).float() * (1 + v.float().mean())).to(q.dtype)

    for key in ("batch other", "head other"):
        asked = Asked(HOME, HOME, key)
        assert bits.neighbours(of(by_batch_and_head), asked) is None
        assert "have other bits" in bits.neighbours(of(shifted_by_all), asked)
    for key in ("batch", "head"):
        asked = Asked(HOME, HOME, key)
        assert bits.alone(of(by_batch_and_head), asked) is None

    def by_size(q, k, v):
        return by_batch_and_head(q, k, v) * (1 + 0.01 * q.shape[0])

    assert "have other bits" in bits.alone(of(by_size), Asked(HOME, HOME, "batch"))


def test_inputs_that_are_written_to():
    asked = Asked(HOME, HOME)
    assert bits.inputs_stay(of(by_batch_and_head), asked) is None
    assert "changes its input q" in bits.inputs_stay(of(zoo.changes_q), asked)
