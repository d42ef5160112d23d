"""The least and the largest key of each page, elementwise: enough to bound every score of the page from above.

For a query q and any key k of the page, ``q . k <= sum_d max(q_d * least_d, q_d * largest_d)`` (Quest, Tang et al.
2024). A page's bounds cover every key written to it since it was given out, so that a sequence which shares only the
beginning of a page, or was truncated inside it, has bounds that are loose and never too low.
"""

from __future__ import annotations

import math

import torch

from flashcore.numerics import ambient
from flashcore.paging._pages import Pages

LEAST, LARGEST = 0, 1


def empty_bounds(num_pages: int, num_heads_kv: int, head_dim: int, dtype, device) -> torch.Tensor:
    """``[num_pages, num_heads_kv, 2, head_dim]`` of pages that hold no key: least +inf, largest -inf."""
    bounds = torch.empty(num_pages, num_heads_kv, 2, head_dim, dtype=dtype, device=device)
    bounds[:, :, LEAST] = math.inf
    bounds[:, :, LARGEST] = -math.inf
    return bounds


def widen_bounds(
    key_bounds: torch.Tensor, keys: torch.Tensor, page: torch.Tensor, offset: torch.Tensor, wanted: torch.Tensor
) -> None:
    """Take new keys into the bounds of their pages; the first key of a page (offset 0) begins them anew.

    Parameters
    ----------
    key_bounds
        ``[num_pages, num_heads_kv, 2, head_dim]``, changed.
    keys
        ``[tokens, num_heads_kv, head_dim]``.
    page, offset, wanted
        ``[tokens]`` int64, int64, bool: slot of each key, and whether it is to be written at all.
    """
    begins = wanted & (offset == 0)
    # As in `append_tokens`: what begins no page repeats one that does, and with none all write back page 0's own.
    source = torch.where(begins, torch.arange(page.shape[0], device=page.device), begins.int().argmax())
    some = begins.any()
    empty = empty_bounds(1, *keys.shape[1:], keys.dtype, keys.device)
    key_bounds[torch.where(some, page[source], 0)] = torch.where(some, empty, key_bounds[:1])
    target = torch.where(wanted, page, 0)[:, None, None].expand_as(keys)
    unreal = ~wanted[:, None, None]
    key_bounds[:, :, LEAST].scatter_reduce_(0, target, keys.masked_fill(unreal, math.inf), "amin")
    key_bounds[:, :, LARGEST].scatter_reduce_(0, target, keys.masked_fill(unreal, -math.inf), "amax")


def held_slots(kv: Pages) -> torch.Tensor:
    """``[num_pages, page_size]`` bool: slots of the pool that hold a token of any sequence. No synchronisation."""
    columns = torch.arange(kv.max_pages, device=kv.device)
    held = (kv.lengths[:, None] - columns * kv.page_size).clamp(0, kv.page_size)
    known = (kv.page_table >= 0) & (kv.page_table < kv.num_pages)
    page = kv.page_table.clamp(0, kv.num_pages - 1).long()
    filled = torch.zeros(kv.num_pages, dtype=torch.int64, device=kv.device)
    filled.scatter_reduce_(0, page.flatten(), (held * known).long().flatten(), "amax")
    return torch.arange(kv.page_size, device=kv.device) < filled[:, None]


@ambient.judging
def bounds_of_pool(kv: Pages) -> torch.Tensor:
    """Bounds of every page in use, from the keys themselves: of a page's users, the longest decides what it holds."""
    bounds = empty_bounds(kv.num_pages, kv.num_heads_kv, kv.head_dim, kv.dtype, kv.device)
    empty = ~held_slots(kv)[:, None, :, None]
    bounds[:, :, LEAST] = kv.k_pool.masked_fill(empty, math.inf).amin(dim=2)
    bounds[:, :, LARGEST] = kv.k_pool.masked_fill(empty, -math.inf).amax(dim=2)
    return bounds
