"""Caches to measure on: their rows and dense copies hold the same keys."""

from __future__ import annotations

import torch

from flashcore.paging import paged_reference
from flashcore.paging_survey.caches import dense_of, random_cache, rows_of


def test_a_random_caches_rows_and_dense_copies_hold_the_same_keys():
    cache = random_cache(4, 96, 2, 16, page_size=32, dtype=torch.float16, device="cpu")
    assert cache.page_table.flatten().tolist() != list(range(12)), "pages lie in any order"
    part = rows_of(cache, 2, 2)
    k, v = dense_of(part, 96)
    q = torch.randn(2, 4, 1, 16).half()
    paged, _ = paged_reference(q, part, causal=False)
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    torch.testing.assert_close(paged, want)
