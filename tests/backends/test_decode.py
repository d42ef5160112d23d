"""Backend `decode`: what it takes, how it cuts keys and heads, and what its kernel is told."""

from __future__ import annotations

import pytest
import torch
from support.paged_tables import queries

import flashcore
from flashcore import backends
from flashcore.paging import paged_reference, paginate
from flashcore.problem import Problem


def test_chains_of_a_traced_decode_cover_every_unit_once():
    decode = backends.get("decode")
    for seqlen in (1, 64, 65, 333, 900, 1900, 8192):
        problem = Problem(batch=1, num_heads_q=1, num_heads_kv=1, seqlen_q=1, seqlen_k=seqlen, head_dim=64)
        shape = type("Shape", (), {"tile_n": 128, "num_splits": 2})
        before = decode.chains(problem, shape)
        assert len(before) == -(-seqlen // 128)
        assert all(b == -1 or b == unit - 2 for unit, b in enumerate(before))


@pytest.mark.gpu
def test_more_heads_than_one_launch_lays_out():
    k, v = (torch.randn(900, 8, 40, 64, device="cuda").half() for _ in range(2))
    cache = paginate(k, v, 16)
    q = queries(cache, 8, 1)
    out = flashcore.paged_attention(q, cache, backend="decode")
    assert float((out.double() - paged_reference(q, cache)[0]).abs().max()) < 4e-3
