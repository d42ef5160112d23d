"""Caches to measure on: their rows and dense copies hold the same keys."""

from __future__ import annotations

import torch

from flashcore.paging import DROPPED, AllPages, PagedKVCache, TopK, bounds_of_pool, paged_reference
from flashcore.surveys.paging.caches import (
    NOWHERE,
    dense_of,
    mixed_cache,
    paged_from,
    pages_share,
    random_cache,
    rows_of,
    shuffled_and_poisoned,
)


def test_a_random_caches_rows_and_dense_copies_hold_the_same_keys():
    cache = random_cache(4, 96, 2, 16, page_size=32, dtype=torch.float16, device="cpu")
    assert cache.page_table.flatten().tolist() != list(range(12)), "pages lie in any order"
    part = rows_of(cache, 2, 2)
    k, v = dense_of(part, 96)
    q = torch.randn(2, 4, 1, 16).half()
    paged, _ = paged_reference(q, part, causal=False)
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    torch.testing.assert_close(paged, want)


def test_a_random_cache_has_no_page_to_spare_and_bounds_of_its_keys():
    cache = random_cache(3, 50, 2, 16, page_size=16, dtype=torch.bfloat16, device="cpu", seed=4)
    assert cache.num_pages == 3 * 4 and sorted(cache.page_table.flatten().tolist()) == list(range(12))
    assert cache.lengths.tolist() == [50] * 3 and cache.max_length == 50 and cache.dtype == torch.bfloat16
    assert torch.equal(cache.key_bounds, bounds_of_pool(cache))
    again, other = (
        random_cache(3, 50, 2, 16, page_size=16, dtype=torch.bfloat16, device="cpu", seed=s) for s in (4, 5)
    )
    assert torch.equal(again.k_pool, cache.k_pool) and torch.equal(again.page_table, cache.page_table)
    assert not torch.equal(other.k_pool, cache.k_pool)


def test_rows_of_a_cache_are_over_the_same_pools():
    cache = random_cache(4, 40, 2, 16, page_size=16, dtype=torch.float16, device="cpu")
    part = rows_of(cache, 1, 2)
    assert part.k_pool is cache.k_pool and part.key_bounds is cache.key_bounds and part.max_length == 40
    assert part.batch == 2 and torch.equal(part.page_table, cache.page_table[1:3])
    q = torch.randn(4, 2, 1, 16).half()
    assert torch.equal(paged_reference(q[1:3], part)[0], paged_reference(q, cache)[0][1:3])


def shared_with_holes() -> PagedKVCache:
    cache = PagedKVCache(num_pages=20, batch=3, num_heads_kv=2, head_dim=16, page_size=16, device="cpu")
    first = cache.add()
    cache.add()
    cache.append(*torch.randn(2, 2, 2, 70, 16).half().unbind(0), tokens=[70, 5])
    cache.fork(first, 40)
    cache.drop(first, [1])
    return cache


def test_shuffling_and_poisoning_changes_no_result():
    cache = shared_with_holes()
    poisoned = shuffled_and_poisoned(cache, seed=1)
    q = torch.randn(3, 4, 2, 16).half()
    for policy in (None, TopK(pages=2)):
        found, wanted = ((policy and policy.select(q, c), c) for c in (poisoned, cache))
        if policy:
            assert torch.equal(found[0].pages, wanted[0].pages)
        for a, b in zip(paged_reference(q, found[1], found[0]), paged_reference(q, wanted[1], wanted[0]), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(poisoned.page_table[0, :5], cache.page_table[0, :5])
    assert poisoned.page_table[0, 0] == poisoned.page_table[2, 0] and poisoned.page_table[0, 1] == DROPPED
    assert torch.equal(poisoned.page_table >= NOWHERE, torch.arange(20) >= cache.used_pages()[:, None])


def test_a_poisoned_copy_leaves_the_cache_alone_and_is_nan_where_no_token_lies():
    cache = shared_with_holes()
    before = cache.k_pool.clone(), cache.page_table.clone()
    poisoned = shuffled_and_poisoned(cache)
    assert torch.equal(cache.k_pool, before[0]) and torch.equal(cache.page_table, before[1])
    assert poisoned.lengths is not cache.lengths
    held = 70 - 16 + 5 + 16  # row 0 without its dropped page, row 1, and that page, which the fork still holds
    for pool in (poisoned.k_pool, poisoned.v_pool):
        assert int(pool.isfinite().sum()) == held * 2 * 16 and int(pool.isnan().sum()) == pool.numel() - held * 2 * 16


def test_the_share_of_pages_selected():
    cache = shared_with_holes()  # pages there: 4, 1 and 3
    assert pages_share(cache, None) == 1.0
    q = torch.randn(3, 4, 1, 16).half()
    assert pages_share(cache, AllPages().select(q, cache)) == 1.0
    assert pages_share(cache, TopK(pages=2).select(q, cache)) == (2 + 1 + 2) / 8


def test_dense_keys_and_values_in_pages_are_the_same_ones():
    k, v = (torch.randn(3, 2, 50, 16).half() for _ in range(2))
    for size in (16, 32):
        cache = paged_from(k, v, size, seed=1)
        assert cache.page_size == size and cache.lengths.tolist() == [50] * 3 and cache.lengths_fit
        assert sorted(cache.page_table.flatten().tolist()) == list(range(cache.num_pages)), "no page to spare"
        assert cache.page_table.flatten().tolist() != list(range(cache.num_pages)), "pages lie in any order"
        assert all(torch.equal(found, own) for found, own in zip(dense_of(cache, 50), (k, v), strict=True))


def test_sequences_of_unlike_lengths_share_a_prefix_and_nothing_else():
    cache = mixed_cache((70, 33, 64), 2, 16, page_size=16, dtype=torch.float16, device="cpu", prefix=32, seed=2)
    table = cache.page_table.tolist()
    assert cache.lengths.tolist() == [70, 33, 64] and cache.max_length == 70 and cache.num_pages == 2 + 3 + 1 + 2
    used = [row[:count] for row, count in zip(table, (5, 3, 4), strict=True)]
    assert used[0][:2] == used[1][:2] == used[2][:2]
    assert sorted(used[0] + used[1][2:] + used[2][2:]) == list(range(cache.num_pages))
    assert {entry for row, count in zip(table, (5, 3, 4), strict=True) for entry in row[count:]} == {NOWHERE}
    apart = mixed_cache((70, 33), 2, 16, page_size=16, dtype=torch.float16, device="cpu")
    assert len({p for row, n in zip(apart.page_table.tolist(), (5, 3), strict=True) for p in row[:n]}) == 8
