"""Dense keys and values as pages out of order: every key is there, and NaN wherever there is none."""

from __future__ import annotations

import torch

from flashcore.paging import paginate


def test_paginate_mixes_pages_up_and_keeps_every_key():
    k, v = (torch.randn(3, 2, 150, 64) for _ in range(2))
    cache = paginate(k.half(), v.half(), 64)
    table = cache.page_table.flatten().tolist()
    assert len(set(table)) == 9 and table != sorted(table) and cache.num_pages > 9
    for row in range(3):
        pages = cache.page_table[row].long()
        assert torch.equal(cache.k_pool[pages].transpose(0, 1).flatten(1, 2)[:, :150], k[row].half())
        assert cache.v_pool[pages].transpose(0, 1).flatten(1, 2)[:, 150:].isnan().all()
