"""Page tables with pages out of order, queries for them, and selections that share an address."""

from __future__ import annotations

import math

import torch

from flashcore.paging import PagedKV, PageSelection

LENGTHS = (1, 17, 64, 200, 1000)


def cache_of(lengths, heads: int, head_dim: int, page_size: int, dtype, device, *, drop: bool = False) -> PagedKV:
    """Sequences of these lengths in pages out of order; NaN where no token is, and a table full of traps past each."""
    pages = [-(-length // page_size) for length in lengths]
    generator = torch.Generator().manual_seed(page_size + head_dim)
    order = torch.randperm(sum(pages) + 3, generator=generator).tolist()
    pools = [torch.full((len(order), heads, page_size, head_dim), math.nan, dtype=dtype) for _ in range(2)]
    table = torch.full((len(lengths), max(pages) + 2), 1 << 20, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for column in range(pages[row]):
            page = order.pop()
            table[row, column] = page
            tokens = min(page_size, length - column * page_size)
            for pool in pools:
                pool[page, :, :tokens] = torch.randn(heads, tokens, head_dim, generator=generator).to(dtype)
        if drop and pages[row] > 2:
            table[row, 1] = -1
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return PagedKV.from_tables(*(t.to(device) for t in (*pools, table, lengths)))


def queries(cache: PagedKV, heads: int, tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(cache.batch, heads, tokens, cache.head_dim, generator=generator)
    return q.to(cache.dtype).to(cache.device)


def two_selections(device) -> list[PageSelection]:
    """Two of the same pages at the same addresses, with room for 4 pages a row and for 2."""
    room, counts = torch.full((1, 2, 4), -1, dtype=torch.int32, device=device), torch.full((1, 2), 2, device=device)
    counts, flat = counts.int(), room.view(-1)
    return [PageSelection(room, counts), PageSelection(flat[:4].view(1, 2, 2), counts)]
