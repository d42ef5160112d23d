"""Dense keys and values as pages out of order: every key is there, and NaN wherever there is none."""

from __future__ import annotations

import pytest
import torch

from flashcore.paging import gather, paginate
from flashcore.paging.paginate import SPARE_PAGES


def test_paginate_mixes_pages_up_and_keeps_every_key():
    k, v = (torch.randn(3, 2, 150, 64) for _ in range(2))
    cache = paginate(k.half(), v.half(), 64)
    table = cache.page_table.flatten().tolist()
    assert len(set(table)) == 9 and table != sorted(table) and cache.num_pages > 9
    for row in range(3):
        pages = cache.page_table[row].long()
        assert torch.equal(cache.k_pool[pages].transpose(0, 1).flatten(1, 2)[:, :150], k[row].half())
        assert cache.v_pool[pages].transpose(0, 1).flatten(1, 2)[:, 150:].isnan().all()


@pytest.mark.parametrize(
    ("batch", "length", "page_size"), [(1, 1, 16), (2, 16, 16), (3, 100, 16), (5, 7, 256), (1, 600, 32)]
)
def test_every_length_lies_in_pages_of_its_own(batch, length, page_size):
    k, v = torch.randn(2, batch, 2, length, 8).bfloat16().unbind(0)
    cache = paginate(k, v, page_size)
    pages = -(-length // page_size)
    table = cache.page_table.flatten().tolist()
    assert len(set(table)) == len(table) == batch * pages and set(table) <= set(range(cache.num_pages))
    assert cache.num_pages == batch * pages + SPARE_PAGES and cache.max_length == length
    cache.check()
    for row in range(batch):
        k_row, v_row, present = gather(cache, row)
        assert torch.equal(k_row, k[row]) and torch.equal(v_row, v[row]) and present.all()
    spare = sorted(set(range(cache.num_pages)) - set(table))
    assert cache.k_pool[spare].isnan().all() and cache.v_pool[spare].isnan().all()
    assert int(cache.k_pool.isfinite().sum()) == k.numel(), "NaN lies everywhere else"


def test_nothing_is_read_from_the_device_and_nothing_is_random():
    k = torch.randn(2, 1, 40, 8).half()
    first, again = paginate(k, k, 16), paginate(k, k, 16)
    assert torch.equal(first.page_table, again.page_table)
    away = paginate(k.to("meta"), k.to("meta"), 16)  # on `meta` any look at a value raises
    assert away.k_pool.shape == first.k_pool.shape and away.page_table.shape == first.page_table.shape
