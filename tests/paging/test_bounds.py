"""Key bounds of pages: exact, kept up to date token by token, and never over slots without a token."""

from __future__ import annotations

import math

import torch
from support.paged_caches import DIM, HEADS, held, make, tokens

from flashcore.paging import PagedKV, bounds_of_pool
from flashcore.paging import bounds as bounds_module


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


def key(value: float) -> torch.Tensor:
    """One token's key in both heads."""
    return torch.full((HEADS, DIM), value)


def widened(bounds, keys, page, offset, wanted):
    bounds = bounds.clone()
    bounds_module.widen_bounds(
        bounds, torch.stack(keys), torch.tensor(page), torch.tensor(offset), torch.tensor(wanted)
    )
    return bounds[:, 0, :, 0].tolist()


def test_a_key_widens_its_page_and_the_first_one_begins_it_anew():
    """Each page as [least, largest]; page 1 held keys of somebody else from -9 to 9."""
    bounds = bounds_module.empty_bounds(3, HEADS, DIM, torch.float32, "cpu")
    bounds[0, :, 0], bounds[0, :, 1] = -1.0, 2.0
    bounds[1, :, 0], bounds[1, :, 1] = -9.0, 9.0
    none = [math.inf, -math.inf]
    keys = [key(5.0), key(-3.0), key(4.0)]
    assert widened(bounds, keys, [0, 0, 1], [7, 8, 0], [True] * 3) == [[-3, 5], [4, 4], none]
    assert widened(bounds, keys, [1, 1, 2], [0, 1, 0], [True] * 3) == [[-1, 2], [-3, 5], [4, 4]]
    assert widened(bounds, keys, [1, 1, 0], [3, 4, 5], [True] * 3) == [[-1, 4], [-9, 9], none]


def test_a_key_that_is_not_wanted_changes_no_bound():
    bounds = bounds_module.empty_bounds(2, HEADS, DIM, torch.float32, "cpu")
    bounds[0, :, 0], bounds[0, :, 1] = -1.0, 2.0
    keys = [key(math.nan), key(70.0), key(-70.0)]
    assert widened(bounds, keys, [0, 0, 1], [0, 4, 0], [False] * 3) == [[-1, 2], [math.inf, -math.inf]]
    assert widened(bounds, keys, [0, 0, 1], [0, 4, 0], [False, True, False]) == [[-1, 70], [math.inf, -math.inf]]


def test_held_slots_are_those_of_the_longest_user_of_a_page():
    pool = torch.zeros(5, HEADS, 16, DIM, dtype=torch.float16)
    table = torch.tensor([[3, 1, -1, 4], [3, 99, 2, 0]], dtype=torch.int32)
    cache = PagedKV(pool, pool, table, torch.tensor([21, 5], dtype=torch.int32))
    held = bounds_module.held_slots(cache)
    # Page 3 is whole through row 0; 1 holds row 0's last 5; nobody's length reaches 0, 2 and 4.
    assert held.sum(dim=1).tolist() == [0, 5, 0, 16, 0] and held[1, :5].all()
    cache.lengths[1] = 40  # its second page lies outside the pool, its third holds 8
    assert bounds_module.held_slots(cache).sum(dim=1).tolist() == [0, 5, 8, 16, 0]
    cache.lengths.copy_(torch.tensor([7, 5]))
    assert bounds_module.held_slots(cache).sum(dim=1).tolist() == [0, 0, 0, 7, 0]


def test_slots_without_a_token_do_not_count():
    cache = make(num_pages=2)
    sequence = cache.add()
    cache.append(*tokens(20))
    page = cache.pages(sequence)[1]
    cache.k_pool[page, :, 4:] = torch.nan
    found = bounds_of_pool(cache)
    assert torch.equal(found[page], cache.key_bounds[page]) and found[page].isfinite().all()
