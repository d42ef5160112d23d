"""Tokens written into pages in torch: into tables of others too, and never where a table is wrong."""

from __future__ import annotations

import torch
from support.paged_caches import DIM, HEADS

from flashcore.paging import PagedKV, append_tokens, gather


def test_append_into_tables_of_others(tables):
    """Their owner has put the pages there: the next token of row 0 goes to page 0, of row 1 to page 1."""
    nhd = [pool.transpose(1, 2).contiguous() for pool in tables[:2]]
    kv = PagedKV.from_tables(*nhd, *tables[2:], layout="nhd", key_bounds=True)
    before = [gather(kv, row)[:2] for row in range(2)]
    kv.check(tokens=1)
    k, v = torch.randn(2, 2, HEADS, 3, DIM).half().unbind(0)
    append_tokens(k, v, kv.k_pool, kv.v_pool, kv.page_table, kv.lengths, key_bounds=kv.key_bounds)
    assert tables[3].tolist() == [23, 36]
    for row in range(2):
        for got, old, new in zip(gather(kv, row)[:2], before[row], (k[row], v[row]), strict=True):
            assert torch.equal(got, torch.cat([old, new], dim=1))
    kept = kv.key_bounds.clone()
    kv.refresh_bounds()
    assert torch.equal(kept, kv.key_bounds)


def test_a_wrong_table_never_harms_the_pool(tables):
    tables[2][:] = torch.tensor([[5, 99, 0, 0], [5, 3, -1, 0]])
    k_before = tables[0].clone()
    new = torch.ones(2, HEADS, 2, DIM, dtype=torch.float16)
    append_tokens(new, new, *tables)
    assert torch.equal(tables[0], k_before) and tables[3].tolist() == [20, 33]
    tables[3][0] = 63  # one token fits, two do not: neither is written
    append_tokens(new, new, *tables)
    assert torch.equal(tables[0], k_before) and tables[3].tolist() == [63, 33]
