"""Rows that see no key, keys that a mask hides, and one odd number in an input."""

from __future__ import annotations

import pytest
import torch
from support import wrong_attention as zoo

from flashcore.bisection.diagnosis.calling import candidate_of
from flashcore.bisection.diagnosis.promises import values
from flashcore.bisection.diagnosis.promises.asking import Asked
from flashcore.problem import Problem

HOME = Problem(batch=1, num_heads_q=2, num_heads_kv=1, seqlen_q=9, seqlen_k=7, head_dim=16)


def of(function):
    return candidate_of(function, device="cpu")


def test_rows_that_see_no_key_hold_0():
    asked = Asked(HOME.with_(causal=True), HOME)
    assert values.empty_rows(of(zoo.two_pass), asked) is None

    def mean(q, k, v, causal=False):
        out = zoo.two_pass(q, k, v, causal)
        out[:, :, 1] = 0.5 if causal else out[:, :, 1]
        return out

    assert values.empty_rows(of(mean), asked).startswith("row 1 sees no key, and its output is 0.5 where 0 is meant")


@pytest.mark.parametrize("key", ["k nan", "q inf", "k -inf"])
def test_an_odd_number_does_what_it_does_in_float64(key):
    def honest(q, k, v):
        a, b, c, scale = zoo.parts(q, k, v)
        return (torch.softmax(a @ b.mT * scale, dim=-1) @ c).to(q.dtype)

    asked = Asked(HOME, HOME, key)
    assert values.planted(of(honest), asked) is None
    assert "finite where float64 gives NaN" in values.planted(of(zoo.two_pass), asked), "it makes zeros of NaN"


def test_keys_behind_the_mask_may_not_be_read():
    length = values.HIDDEN_LENGTH
    problem = HOME.with_(num_heads_q=1, seqlen_q=length, seqlen_k=length, causal=True)

    def by_tiles(q, k, v, causal=True):
        out = torch.empty_like(q)
        for first in range(0, length, 64):
            rows, keys = slice(first, first + 64), slice(0, first + 64)
            out[:, :, rows] = zoo.two_pass(q[:, :, rows], k[:, :, keys], v[:, :, keys], causal)
        return out

    asked = Asked(problem, HOME, "v")
    assert values.masked(of(by_tiles), asked) is None
    assert "NaN" in values.masked(of(zoo.two_pass), asked), "it multiplies them by weights of 0"
