"""Make paged caches to measure on: random keys and values, pages in any order, and NaN where no token lies."""

from __future__ import annotations

import torch

from flashcore.paging import PagedKV, PageSelection
from flashcore.paging.bounds import held_slots
from flashcore.paging.ledger import DROPPED

NOWHERE = 1 << 20
"""What table entries past a sequence's last page are set to: they mean nothing, and whoever follows one shall fall."""


def random_cache(
    sequences: int, length: int, num_heads_kv: int, head_dim: int, *, page_size: int, dtype: torch.dtype, device: str,
    seed: int = 0,
) -> PagedKV:  # fmt: skip
    """Sequences of one length over a pool that holds their pages and no other, in shuffled order, with key bounds."""
    generator = torch.Generator(device=device).manual_seed(seed)
    columns = -(-length // page_size)
    shape = (sequences * columns, num_heads_kv, page_size, head_dim)
    k_pool, v_pool = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    order = torch.randperm(sequences * columns, generator=generator, device=device)
    return PagedKV.from_tables(
        k_pool, v_pool, order.view(sequences, columns).to(torch.int32).contiguous(),
        torch.full((sequences,), length, dtype=torch.int32, device=device), key_bounds=True, max_length=length,
        lengths_fit=True,
    )  # fmt: skip


def rows_of(cache: PagedKV, first: int, count: int) -> PagedKV:
    """Some sequences of a cache, over the same pools."""
    rows = slice(first, first + count)
    return PagedKV(cache.k_pool, cache.v_pool, cache.page_table[rows], cache.lengths[rows],
                   key_bounds=cache.key_bounds, max_length=cache.max_length, lengths_fit=cache.lengths_fit)  # fmt: skip


def dense_of(cache: PagedKV, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same keys and values contiguous, ``[batch, num_heads_kv, length, head_dim]``; all sequences have `length`."""
    table = cache.page_table.long()

    def dense(pool: torch.Tensor) -> torch.Tensor:
        return pool[table].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()

    return dense(cache.k_pool), dense(cache.v_pool)


def shuffled_and_poisoned(cache: PagedKV, *, seed: int = 0) -> PagedKV:
    """A copy of a cache with its pages in another order, NaN wherever no token lies, and nonsense in the table's rest.

    What a kernel lets through from past a length, from a free page or from an entry without meaning is then seen.
    """
    generator = torch.Generator(device=cache.device).manual_seed(seed)
    order = torch.randperm(cache.num_pages, generator=generator, device=cache.device)
    place = torch.empty_like(order)
    place[order] = torch.arange(cache.num_pages, device=cache.device)
    empty = ~held_slots(cache)[:, None, :, None]
    pools = [pool.masked_fill(empty, torch.nan)[order].contiguous() for pool in (cache.k_pool, cache.v_pool)]
    table = torch.where(cache.page_table >= 0, place[cache.page_table.clamp(0, cache.num_pages - 1).long()], DROPPED)
    columns = torch.arange(cache.max_pages, device=cache.device)
    table = table.masked_fill(columns >= cache.used_pages()[:, None], NOWHERE).to(torch.int32)
    bounds = None if cache.key_bounds is None else cache.key_bounds[order].contiguous()
    return PagedKV.from_tables(*pools, table.contiguous(), cache.lengths.clone(), key_bounds=False if bounds is None
                               else bounds, max_length=cache.max_length, lengths_fit=cache.lengths_fit)  # fmt: skip


def pages_share(cache: PagedKV, selection: PageSelection | None) -> float:
    """Pages selected over pages present, over all sequences and KV heads."""
    if selection is None:
        return 1.0
    return float(selection.counts.sum()) / (int(cache.resident_pages().sum()) * cache.num_heads_kv)
