"""Key bounds of pages: exact, kept up to date token by token, and never over slots without a token."""

from __future__ import annotations

import torch
from support.paged_caches import held, make, tokens

from flashcore.paging import bounds_of_pool


def test_key_bounds_are_exact_and_kept_up_to_date():
    cache = make(num_pages=6)
    sequence = cache.add()
    cache.append(*tokens(20))
    for _ in range(20):
        cache.append(*tokens(1))
    k = held(cache, sequence)[0]
    for column, page in enumerate(cache.pages(sequence)):
        keys = k[:, column * 16 : (column + 1) * 16]
        assert torch.equal(cache.key_bounds[page, :, 0], keys.amin(dim=1))
        assert torch.equal(cache.key_bounds[page, :, 1], keys.amax(dim=1))
    assert torch.equal(bounds_of_pool(cache), cache.key_bounds)
    child = cache.fork(sequence)
    cache.append(*tokens(1), [child])
    assert torch.equal(bounds_of_pool(cache), cache.key_bounds)
    cache.free(sequence), cache.free(child)
    again = cache.add()
    cache.append(*tokens(96), [again])  # every page a second time: what lay there before must not count
    assert torch.equal(bounds_of_pool(cache), cache.key_bounds)


def test_a_cache_without_bounds():
    cache = make(key_bounds=False)
    cache.add()
    cache.append(*tokens(20))
    assert cache.key_bounds is None and cache.stats().overhead_bytes == 4 * 16 * 4 + 4 * 4
