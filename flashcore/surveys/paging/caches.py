"""Make paged caches to measure on: random keys and values, pages in any order, and NaN where no token lies."""

from __future__ import annotations

from collections.abc import Sequence

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
                   key_bounds=cache.key_bounds, max_length=cache.max_length, lengths_fit=cache.lengths_fit,
                   holes=cache.holes)  # fmt: skip


def dense_of(cache: PagedKV, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same keys and values contiguous, ``[batch, num_heads_kv, length, head_dim]``; all sequences have `length`."""
    table = cache.page_table.long()

    def dense(pool: torch.Tensor) -> torch.Tensor:
        return pool[table].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()

    return dense(cache.k_pool), dense(cache.v_pool)


def paged_from(k: torch.Tensor, v: torch.Tensor, page_size: int, *, seed: int = 0) -> PagedKV:
    """Dense ``[sequences, num_heads_kv, length, head_dim]`` copied into pages, in shuffled order and without bounds."""
    sequences, _, length, _ = k.shape
    columns = -(-length // page_size)
    generator = torch.Generator(device=k.device).manual_seed(seed)
    place = torch.randperm(sequences * columns, generator=generator, device=k.device)

    def pool(dense: torch.Tensor) -> torch.Tensor:
        missing = columns * page_size - length
        dense = torch.nn.functional.pad(dense, (0, 0, 0, missing)) if missing else dense
        pages = torch.empty(sequences * columns, k.shape[1], page_size, k.shape[3], dtype=k.dtype, device=k.device)
        pages[place] = dense.unflatten(2, (columns, page_size)).transpose(1, 2).flatten(0, 1)
        return pages

    return PagedKV.from_tables(
        pool(k), pool(v), place.view(sequences, columns).to(torch.int32),
        torch.full((sequences,), length, dtype=torch.int32, device=k.device), max_length=length, lengths_fit=True,
    )  # fmt: skip


def mixed_cache(
    lengths: Sequence[int], num_heads_kv: int, head_dim: int, *, page_size: int, dtype: torch.dtype, device: str,
    prefix: int = 0, seed: int = 0,
) -> PagedKV:  # fmt: skip
    """Sequences of these lengths, random, whose first `prefix` tokens lie in the same whole pages; pages in any order.

    `prefix` is a multiple of the page size and no longer than the shortest sequence.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    shared = prefix // page_size
    own = [-(-length // page_size) - shared for length in lengths]
    count = shared + sum(own)
    shape = (count, num_heads_kv, page_size, head_dim)
    k_pool, v_pool = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    order = torch.randperm(count, generator=generator, device=device).to(torch.int32)
    table = torch.full((len(lengths), shared + max(own)), NOWHERE, dtype=torch.int32, device=device)
    table[:, :shared] = order[:shared]
    for row, pages in enumerate(order[shared:].split(own)):
        table[row, shared : shared + len(pages)] = pages
    return PagedKV.from_tables(
        k_pool, v_pool, table, torch.tensor(lengths, dtype=torch.int32, device=device), max_length=max(lengths),
        lengths_fit=True,
    )  # fmt: skip


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
                               else bounds, max_length=cache.max_length, lengths_fit=cache.lengths_fit,
                               holes=cache.holes)  # fmt: skip


def pages_share(cache: PagedKV, selection: PageSelection | None) -> float:
    """Pages selected over pages present, over all sequences and KV heads."""
    if selection is None:
        return 1.0
    return float(selection.counts.sum()) / (int(cache.resident_pages().sum()) * cache.num_heads_kv)
