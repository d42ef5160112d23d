"""Caches that several files of this folder test on."""

from __future__ import annotations

import pytest
import torch
from support.paged_caches import DIM, HEADS, LENGTHS, SIZE

from flashcore.paging import PagedKVCache


@pytest.fixture
def tables():
    """Pools of 6 pages, and two sequences of 20 and 33 tokens that share their first page."""
    k_pool, v_pool = torch.randn(2, 6, HEADS, SIZE, DIM).half().unbind(0)
    page_table = torch.tensor(
        [[5, 0, 0, 0], [5, 3, 1, 77]], dtype=torch.int32
    )  # 77 lies past the end: it means nothing
    return k_pool, v_pool, page_table, torch.tensor([20, 33], dtype=torch.int32)


@pytest.fixture
def cache() -> PagedKVCache:
    cache = PagedKVCache(num_pages=40, batch=5, max_pages=12, num_heads_kv=HEADS, head_dim=DIM, page_size=SIZE,
                         device="cpu")  # fmt: skip
    k, v = torch.randn(2, 5, HEADS, 160, DIM).half().unbind(0)
    for _ in LENGTHS:
        cache.add()
    cache.append(k, v, tokens=LENGTHS)
    return cache
