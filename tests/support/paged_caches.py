"""Small paged caches on the CPU, their keys, and queries for them."""

from __future__ import annotations

import torch

from flashcore.paging import PagedKVCache, PageSelection, gather

HEADS, DIM, SIZE = 2, 8, 16
"""KV heads, head_dim and page size of the small caches."""
LENGTHS = [160, 5, 129, 0, 17]  # pages: 10, 1, 9, 0, 2


def make(num_pages=16, batch=4, page_size=16, **options) -> PagedKVCache:
    options = {"num_heads_kv": HEADS, "head_dim": DIM, "device": "cpu", **options}
    return PagedKVCache(num_pages=num_pages, batch=batch, page_size=page_size, **options)


def tokens(count: int, sequences: int = 1, dtype=torch.float16):
    """k and v ``[sequences, HEADS, count, DIM]``."""
    return torch.randn(2, sequences, HEADS, count, DIM).to(dtype).unbind(0)


def held(cache, sequence):
    """k and v of a sequence as they lie in its pages, ``[HEADS, length, DIM]``."""
    return gather(cache, sequence.row)[:2]


def queries(tokens=1, heads=4, device="cpu"):
    return torch.randn(len(LENGTHS), heads, tokens, DIM).half().to(device)


def chosen(selection: PageSelection, row: int, head: int = 0) -> list[int]:
    return selection.pages[row, head, : selection.counts[row, head]].tolist()
