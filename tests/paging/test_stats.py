"""Pages, tokens and bytes of a cache agree with its tensors and with arithmetic."""

from __future__ import annotations

import pytest
import torch

from flashcore.paging import KVShape, PagedKVCache
from flashcore.paging.memory import fill

SMALL = KVShape(num_heads_kv=1, head_dim=4, page_size=16)


def test_resident_bytes_are_those_of_the_tensors():
    cache = fill([40, 50], prefix=32, shape=SMALL, device="cpu")
    stats = cache.stats()
    assert stats.pages_total == stats.pages_used
    assert (
        stats.pool_bytes
        == stats.resident_bytes
        == sum(p.untyped_storage().nbytes() for p in (cache.k_pool, cache.v_pool))
    )
    beside = (cache.page_table, cache.lengths, cache.key_bounds)
    assert stats.overhead_bytes == sum(tensor.untyped_storage().nbytes() for tensor in beside)
    cache.check()


def test_a_partial_prefix_page_is_counted_once_until_written():
    cache = PagedKVCache(num_pages=8, batch=3, num_heads_kv=1, head_dim=4, page_size=16, device="cpu")
    first = cache.add()
    new = torch.zeros(1, 1, 20, 4, dtype=torch.float16)
    cache.append(new, new)
    cache.fork(first), cache.fork(first, tokens=18)
    stats = cache.stats()
    assert (stats.tokens, stats.tokens_resident, stats.pages_used, stats.pages_shared) == (58, 20, 2, 2)
    assert stats.fragmentation == pytest.approx(12 / 32)
    cache.free(first)
    assert cache.stats().tokens_resident == 20
    cache.free(cache.sequences[0])
    assert cache.stats().tokens_resident == 18 and cache.stats().longest == 18


def test_an_empty_cache():
    stats = PagedKVCache(num_pages=8, batch=3, num_heads_kv=1, head_dim=4, page_size=16, device="cpu").stats()
    assert (stats.sequences, stats.longest, stats.pages_used, stats.fragmentation) == (0, 0, 0, 0.0)
    assert stats.saved_of_dense == stats.saved_of_padded == 0.0
