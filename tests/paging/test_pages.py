"""Whatever holds keys and values in pages has all that the checks and the bounds ask of it."""

from __future__ import annotations

import typing

import torch
from support.paged_caches import make, tokens

from flashcore.paging import PagedKV, paginate
from flashcore.paging._pages import Pages


def test_every_holder_of_pages_has_what_is_asked_of_it():
    cache = make()
    sequence = cache.add()
    cache.append(*tokens(20))
    dense = tokens(20)
    wanted = typing.get_type_hints(Pages)
    assert len(wanted) == 12
    for holder in (
        cache, cache.view([sequence]), paginate(*dense, 16),
        PagedKV.from_tables(cache.k_pool, cache.v_pool, cache.page_table, cache.lengths),
    ):  # fmt: skip
        for name, kind in wanted.items():
            assert isinstance(getattr(holder, name), kind), f"{type(holder).__name__}.{name}"
        assert holder.k_pool.shape == (holder.num_pages, holder.num_heads_kv, holder.page_size, holder.head_dim)
        used = holder.used_pages()
        assert used.dtype == torch.int32 and used.tolist() == [2] + [0] * (holder.batch - 1)
