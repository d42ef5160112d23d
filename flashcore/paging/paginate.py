"""Dense keys and values as pages of a pool, in no particular order: what a paged kernel is checked on."""

from __future__ import annotations

import math

import torch

from flashcore.numerics import ambient
from flashcore.paging.tables import PagedKV

SPARE_PAGES = 3
"""Pages of the pool that nobody uses."""


@ambient.judging
def paginate(k: torch.Tensor, v: torch.Tensor, page_size: int) -> PagedKV:
    """Copy dense K and V into a pool, the pages of all sequences mixed up, and NaN wherever there is no key.

    Nothing is random, and nothing is read from the device, so that it can be captured in a CUDA graph.

    Parameters
    ----------
    k, v
        ``[batch, num_heads_kv, seqlen_k, head_dim]``; every sequence has ``seqlen_k`` tokens.
    """
    batch, heads, seqlen, head_dim = k.shape
    pages = -(-seqlen // page_size)
    num_pages = batch * pages + SPARE_PAGES
    step = next(s for s in range(max(1, int(0.618 * num_pages)), num_pages + 1) if math.gcd(s, num_pages) == 1)
    order = (torch.arange(batch * pages, device=k.device) * step + 1) % num_pages

    def pool(dense: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(dense, (0, 0, 0, pages * page_size - seqlen), value=math.nan)
        filled = torch.full((num_pages, heads, page_size, head_dim), math.nan, dtype=k.dtype, device=k.device)
        in_pages = padded.unflatten(2, (pages, page_size)).transpose(1, 2).flatten(0, 1)
        return filled.index_copy_(0, order, in_pages)

    table = order.view(batch, pages).to(torch.int32)
    lengths = torch.full((batch,), seqlen, dtype=torch.int32, device=k.device)
    return PagedKV(pool(k), pool(v), table, lengths, max_length=seqlen, lengths_fit=True)
