"""Pages, tokens and bytes of a cache agree with its tensors and with arithmetic."""

from __future__ import annotations

import pytest
import torch

from flashcore.paging import CacheStats, KVShape, PagedKVCache
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


def counted(**changes) -> CacheStats:
    """Three sequences of 100 tokens in all, the longest of 50, in 10 pages of 16 tokens of 8 bytes."""
    fields = {"page_size": 16, "sequences": 3, "longest": 50, "tokens": 100, "tokens_resident": 100, "pages_total": 12,
              "pages_used": 10, "pages_shared": 0, "bytes_per_token": 8, "overhead_bytes": 0}  # fmt: skip
    return CacheStats(**fields | changes)


def test_the_figures_by_hand():
    stats = counted()
    assert stats.fragmentation == pytest.approx(60 / 160)
    assert (stats.resident_bytes, stats.pool_bytes) == (10 * 16 * 8, 12 * 16 * 8)
    assert (stats.dense_bytes, stats.padded_bytes) == (800, 3 * 50 * 8)
    assert stats.saved_of_dense == pytest.approx(1 - 1280 / 800) and stats.saved_of_dense < 0
    assert stats.saved_of_padded == pytest.approx(1 - 1280 / 1200)
    shared = counted(pages_used=5, tokens_resident=60)
    assert shared.saved_of_dense == pytest.approx(0.2) and shared.fragmentation == pytest.approx(20 / 80)


def test_dropped_and_reserved_pages_as_the_books_have_them():
    cache = PagedKVCache(num_pages=8, batch=2, num_heads_kv=2, head_dim=4, page_size=16, device="cpu", key_bounds=False)
    sequence = cache.add()
    new = torch.zeros(1, 2, 40, 4, dtype=torch.float16)
    cache.append(new, new)
    cache.drop(sequence, [1])
    stats = cache.stats()
    assert (stats.tokens, stats.tokens_resident, stats.pages_used, stats.longest) == (40, 24, 2, 40)
    assert stats.bytes_per_token == 2 * 2 * 4 * 2 and stats.overhead_bytes == 4 * (2 * 8 + 2)
    cache.reserve(30)
    ahead = cache.stats()
    assert (ahead.tokens_resident, ahead.pages_used) == (24, 4) and ahead.fragmentation == pytest.approx(40 / 64)
