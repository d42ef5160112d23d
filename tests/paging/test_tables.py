"""Tables made elsewhere are taken as they are, in the layouts of others."""

from __future__ import annotations

import pytest
import torch
from support.paged_caches import HEADS, SIZE

from flashcore.errors import InvalidProblem, PageTableError
from flashcore.paging import PagedKV, PagedKVCache, gather


def test_nothing_is_copied(tables):
    kv = PagedKVCache.from_tables(*tables)
    assert type(kv) is PagedKV and kv.max_length == 64
    assert all(a is b for a, b in zip((kv.k_pool, kv.v_pool, kv.page_table, kv.lengths), tables, strict=True))
    k, v, present = gather(kv, 1)
    assert torch.equal(k[:, :16], tables[0][5]) and torch.equal(k[:, 16:32], tables[0][3]) and present.all()
    assert torch.equal(v[:, 32:], tables[1][1][:, :1])
    assert not any(hasattr(kv, name) for name in ("append", "fork", "free", "drop"))
    kv.check()


@pytest.mark.parametrize("layout", ["flashinfer-nhd", "flashinfer-hnd", "vllm"])
def test_layouts_of_others(tables, layout):
    k_pool, v_pool, page_table, lengths = tables
    expected = [gather(PagedKV.from_tables(*tables), row)[:2] for row in range(2)]
    if layout == "flashinfer-hnd":
        both = torch.stack([k_pool, v_pool], dim=1)
        kv = PagedKV.from_tables(both[:, 0], both[:, 1], page_table, lengths)
    else:
        dim = 1 if layout == "flashinfer-nhd" else 0
        both = torch.stack([p.transpose(1, 2).contiguous() for p in (k_pool, v_pool)], dim=dim)
        kv = PagedKV.from_tables(both.select(dim, 0), both.select(dim, 1), page_table, lengths, layout="nhd")
    assert (kv.page_size, kv.num_heads_kv) == (SIZE, HEADS) and kv.k_pool.data_ptr() == both.data_ptr()
    for row in range(2):
        assert all(torch.equal(a, b) for a, b in zip(gather(kv, row)[:2], expected[row], strict=True))


def test_wrong_options(tables):
    with pytest.raises(PageTableError, match="layout is 'bshd'"):
        PagedKV.from_tables(*tables, layout="bshd")
    with pytest.raises(PageTableError, match=r"key_bounds is torch.float16 \[6, 2, 8\].*\[6, 2, 2, 8\]"):
        PagedKV.from_tables(*tables, key_bounds=torch.zeros(6, 2, 8, dtype=torch.float16))
    for name in ("key_bounds", "lengths_fit", "holes"):
        with pytest.raises(InvalidProblem, match=f"^{name} has to be True or False; got 'no'"):
            PagedKV.from_tables(*tables, **{name: "no"})
